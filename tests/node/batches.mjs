// Files and a batch by the official client for Node; what it has seen, as one line of JSON.
// Asked by tests/contract/test_openai_node.py; OPENAI_BASE_URL and OPENAI_API_KEY say whom.
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ maxRetries: 0 });
const model = process.argv[2];
const endpoint = "/v1/chat/completions";
const ask = (custom_id, content, more = {}) => ({
  custom_id, method: "POST", url: endpoint,
  body: { model, messages: [{ role: "user", content }], temperature: 0, ...more },
});
const jsonl = (lines) => Buffer.from(lines.map((line) => JSON.stringify(line) + "\n").join(""));
const seen = {};

async function run(lines) {
  const file = await client.files.create({
    file: await toFile(jsonl(lines), "ü.jsonl"), purpose: "batch",
    expires_after: { anchor: "created_at", seconds: 3600 },
  });
  let batch = await client.batches.create({
    input_file_id: file.id, endpoint, completion_window: "24h", metadata: { by: "node" },
  });
  while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
    batch = await client.batches.retrieve(batch.id);
  }
  return [file, batch];
}

const read = async (id) =>
  (await (await client.files.content(id)).text()).trim().split("\n").map((line) => JSON.parse(line));

const [file, batch] = await run([
  ask("france", "What is the capital of France?"),
  ask("bad", "Hello", { temperature: 9 }),
]);
seen.file = [file.object, file.filename, file.purpose, file.expires_at - file.created_at];
seen.batch = [batch.object, batch.status, batch.metadata, batch.request_counts, batch.errors ?? null];
seen.outputs = (await read(batch.output_file_id)).map((line) => [
  line.custom_id, line.response.status_code, line.response.body.choices[0].message.content, line.error,
]);
seen.errors = (await read(batch.error_file_id)).map((line) => [
  line.custom_id, line.response.status_code, line.response.body.error.param,
]);

const [, refused] = await run([ask("a", "Hello"), ask("a", "Hello")]);
seen.refused = [refused.status, refused.errors.data.map((error) => [error.line, error.code])];

const listed = [];
for await (const one of client.batches.list({ limit: 1 })) listed.push(one.id);
seen.batches = listed.includes(batch.id) && listed.includes(refused.id);
const results = [];
for await (const one of client.files.list({ purpose: "batch_output", limit: 1 })) results.push(one.id);
seen.results = results.includes(batch.output_file_id) && results.includes(batch.error_file_id);

seen.deleted = (await client.files.delete(file.id)).deleted;
seen.gone = await client.files.retrieve(file.id).catch((error) => [error.constructor.name, error.status]);
seen.over = await client.batches.cancel(batch.id).catch((error) => [error.constructor.name, error.status]);

console.log(JSON.stringify(seen));
