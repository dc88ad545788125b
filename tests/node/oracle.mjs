// What the official client for Node makes of our answers, as one line of JSON.
// Asked by tests/contract/test_openai_node.py; OPENAI_BASE_URL and OPENAI_API_KEY say whom.
import OpenAI from "openai";

const client = new OpenAI({ maxRetries: 0 });
const model = process.argv[2];
const messages = [{ role: "user", content: "What is the capital of France?" }];
const seen = {};

const listed = await client.models.list();
seen.models = listed.data.map((entry) => entry.id);
seen.model = (await client.models.retrieve(model)).object;

const answer = await client.chat.completions.create({ model, messages, temperature: 0 });
seen.chat = [answer.object, answer.choices[0].message.content, answer.choices[0].finish_reason];

let text = "";
let usage = null;
const stream = await client.chat.completions.create({
  model, messages, temperature: 0, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
seen.stream = text;
seen.sameUsage = usage.completion_tokens === answer.usage.completion_tokens;

const completion = await client.completions.create({ model, prompt: "Hello", max_tokens: 3, temperature: 0 });
seen.completion = [completion.object, completion.usage.completion_tokens];

const leaving = await client.chat.completions.create({
  model, messages, stream: true, max_tokens: 900, ignore_eos: true,
});
for await (const _ of leaving) break; // closes the connection

async function failure(work) {
  try {
    await work();
  } catch (error) {
    return [error.constructor.name, error.status, error.code, error.type, error.param, Boolean(error.requestID)];
  }
}
seen.noModel = await failure(() => client.chat.completions.create({ model: "none", messages }));
seen.badKey = await failure(() => new OpenAI({ apiKey: "wrong", maxRetries: 0 }).models.list());
seen.badValue = await failure(() => client.chat.completions.create({ model, messages, temperature: 9 }));

console.log(JSON.stringify(seen));
