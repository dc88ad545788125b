/**
 * Server-sent events out of text that arrives in any pieces.
 * https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
 */
export class SseParser {
  #rest = "";
  #data = [];
  #event = "";
  #begun = false;

  /**
   * Take the next piece; returns what is complete by now. A comment is an event of the type "comment".
   * @param {string} text
   * @returns {{type: string, data: string}[]}
   */
  push(text) {
    if (!this.#begun && text) {
      this.#begun = true;
      text = text.replace(/^\uFEFF/, "");
    }
    this.#rest += text;
    const events = [];
    for (;;) {
      const end = this.#rest.search(/[\r\n]/);
      if (end < 0) break;
      const crossing = this.#rest[end] === "\r";
      if (crossing && end === this.#rest.length - 1) break; // its \n may be on the way
      const line = this.#rest.slice(0, end);
      this.#rest = this.#rest.slice(end + (crossing && this.#rest[end + 1] === "\n" ? 2 : 1));
      this.#line(line, events);
    }
    return events;
  }

  #line(line, events) {
    if (line === "") {
      if (this.#data.length) events.push({ type: this.#event || "message", data: this.#data.join("\n") });
      this.#data = [];
      this.#event = "";
      return;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (colon === 0) events.push({ type: "comment", data: value });
    else if (field === "data") this.#data.push(value);
    else if (field === "event") this.#event = value;
  }
}

/**
 * The events of a response's body as they arrive.
 * @param {ReadableStream<Uint8Array>} body
 */
export async function* events(body) {
  const parser = new SseParser();
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(value);
    }
  } finally {
    await reader.cancel().catch(() => {}); // whoever leaves early stops the generation
  }
}
