import assert from "node:assert/strict";
import { test } from "node:test";

import { SseParser, events } from "../../../gateway/page/sse.js";

const all = async (parts) => {
  const found = [];
  for await (const part of parts) found.push(part);
  return found;
};
const parse = (...pieces) => {
  const parser = new SseParser();
  return pieces.flatMap((piece) => parser.push(piece));
};
const message = (data) => ({ type: "message", data });

const WHOLE =
  '\uFEFF: keep-alive\r\n\r\ndata: {"a":1}\n\nevent: done\rdata:é 😀\rdata:  two\r\revent: none\n\nid: 7\ndata\n\ndata: cut';
const EVENTS = [
  { type: "comment", data: "keep-alive" },
  message('{"a":1}'),
  { type: "done", data: "é 😀\n two" },
  message(""),
];

test("every kind of line and of line end is understood, and what is not complete is not told", () => {
  assert.deepEqual(parse(WHOLE), EVENTS);
});

test("it does not matter where the text is cut, even between a carriage return and its line feed", () => {
  for (let at = 0; at <= WHOLE.length; at += 1) {
    assert.deepEqual(parse(WHOLE.slice(0, at), WHOLE.slice(at)), EVENTS, `cut at ${at}`);
  }
  assert.deepEqual(parse(...WHOLE), EVENTS);
});

test("a character whose bytes come in two chunks is one character", async () => {
  const bytes = new TextEncoder().encode("data: é😀\n\n");
  for (let at = 0; at <= bytes.length; at += 1) {
    const body = new ReadableStream({
      start(controller) {
        controller.enqueue(bytes.slice(0, at));
        controller.enqueue(bytes.slice(at));
        controller.close();
      },
    });
    assert.deepEqual(await all(events(body)), [message("é😀")]);
  }
});

test("whoever leaves the loop cancels the body", async () => {
  let cancelled;
  const left = new Promise((resolve) => (cancelled = resolve));
  const body = new ReadableStream({
    start: (controller) => controller.enqueue(new TextEncoder().encode("data: 1\n\n")),
    cancel: cancelled,
  });
  for await (const event of events(body)) {
    assert.equal(event.data, "1");
    break;
  }
  await left;
});
