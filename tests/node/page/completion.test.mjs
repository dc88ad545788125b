import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import { Meter, complete } from "../../../gateway/page/completion.js";

globalThis.document = { baseURI: "http://gateway.test/folder/" };

const all = async (parts) => {
  const found = [];
  for await (const part of parts) found.push(part);
  return found;
};
let asked;
const answer = (body, { status = 200, headers = {} } = {}) => {
  globalThis.fetch = async (url, options) => {
    asked = { url: String(url), ...options };
    return new Response(body, { status, headers: { "x-request-id": "req_1", ...headers } });
  };
};
const frames = (...values) =>
  values.map((value) => `data: ${value === "[DONE]" ? value : JSON.stringify(value)}\n\n`).join("");
const piece = (delta, finish_reason = null) => ({ choices: [{ index: 0, delta, finish_reason }] });
const run = () => all(complete({ endpoint: "a b", key: "secret", body: { model: "m" }, signal: undefined }));

beforeEach(() => (asked = undefined));

test("an answer is its parts in order, and asks for usage", async () => {
  answer(
    ": keep-alive\n\n" +
      frames(
        piece({ role: "assistant", content: "" }),
        piece({ reasoning_content: "hm" }),
        piece({ content: "Hel" }),
        piece({ content: "lo" }, "stop"),
        { choices: [], usage: { completion_tokens: 2 } },
        "[DONE]",
      ),
  );
  assert.deepEqual(await run(), [
    { kind: "open", requestId: "req_1" },
    { kind: "wait" },
    { kind: "reasoning", text: "hm" },
    { kind: "text", text: "Hel" },
    { kind: "text", text: "lo" },
    { kind: "finish", reason: "stop" },
    { kind: "usage", usage: { completion_tokens: 2 } },
  ]);
  assert.equal(asked.url, "http://gateway.test/folder/v2/a%20b/openai/v1/chat/completions");
  assert.equal(asked.headers.authorization, "Bearer secret");
  assert.deepEqual(JSON.parse(asked.body), {
    model: "m",
    stream: true,
    stream_options: { include_usage: true },
  });
});

test("a refusal is what the API said", async () => {
  answer(JSON.stringify({ error: { message: "Slow down.", code: "rate_limit_exceeded" } }), {
    status: 429,
    headers: { "retry-after": "12" },
  });
  await assert.rejects(run(), {
    message: "Slow down.",
    status: 429,
    code: "rate_limit_exceeded",
    requestId: "req_1",
    retryAfter: "12",
  });
});

test("a proxy's own page is a refusal too", async () => {
  answer("<h1>Bad gateway</h1>", { status: 502 });
  await assert.rejects(run(), { message: "The answer was 502", status: 502, code: null });
});

test("an error in mid-stream and a stream without an end are errors", async () => {
  answer(frames(piece({ content: "Hel" }), { error: { message: "Gone.", code: "upstream_failed" } }));
  await assert.rejects(run(), { message: "Gone.", code: "upstream_failed", requestId: "req_1" });
  answer(frames(piece({ content: "Hel" })));
  await assert.rejects(run(), { code: "stream_ended", requestId: "req_1" });
});

test("so is a connection that breaks", async () => {
  answer(new ReadableStream({ pull: (controller) => controller.error(new TypeError("network error")) }));
  await assert.rejects(run(), { code: "stream_ended", requestId: "req_1" });
  globalThis.fetch = async () => {
    throw new TypeError("Failed to fetch");
  };
  await assert.rejects(run(), {
    message: "The gateway can't be reached.",
    status: 0,
    code: "connection_failed",
  });
});

test("speed is that of generation: from the first token to the last", () => {
  let now = 1000;
  const meter = new Meter(() => now);
  assert.deepEqual([meter.firstToken, meter.perSecond, meter.promptTokens], [null, null, null]);
  now = 1500;
  meter.piece();
  assert.deepEqual([meter.firstToken, meter.perSecond], [0.5, null]);
  now = 2500;
  meter.piece();
  now = 9000; // what comes after the last token does not count
  assert.deepEqual([meter.tokens, meter.perSecond, meter.elapsed], [{ count: 2, exact: false }, 1, 8]);
  meter.counted({ prompt_tokens: 5, completion_tokens: 41 });
  assert.deepEqual([meter.tokens, meter.perSecond, meter.promptTokens], [{ count: 41, exact: true }, 40, 5]);
});
