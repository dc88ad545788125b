/** A chat completion as a stream, and how fast it came. */

import { ApiError, request } from "./api.js";
import { events } from "./sse.js";

/**
 * Ask, and yield what the answer says as it comes:
 * `{kind: "open", requestId}`, `{kind: "wait"}` (a comment: it is not forgotten), `{kind: "text"|"reasoning", text}`,
 * `{kind: "finish", reason}`, `{kind: "usage", usage}`. Throws an `ApiError`; aborting `signal` stops the generation.
 * @param {{endpoint: string, key: string, body: Record<string, unknown>, signal: AbortSignal}} options
 */
export async function* complete({ endpoint, key, body, signal }) {
  const path = `v2/${encodeURIComponent(endpoint)}/openai/v1/chat/completions`;
  const response = await request(path, {
    key,
    method: "POST",
    body: { ...body, stream: true, stream_options: { include_usage: true } },
    signal,
  });
  const requestId = response.headers.get("x-request-id");
  yield { kind: "open", requestId };
  try {
    for await (const event of events(response.body)) {
      if (event.type === "comment") {
        yield { kind: "wait" };
      } else if (event.data === "[DONE]") {
        return;
      } else {
        yield* said(JSON.parse(event.data), requestId);
      }
    }
  } catch (error) {
    if (!(error instanceof TypeError)) throw error; // what browsers say of a connection that broke
  }
  throw new ApiError("The answer ended before it was complete.", { code: "stream_ended", requestId });
}

function* said(chunk, requestId) {
  if (chunk.error) {
    throw new ApiError(chunk.error.message, { code: chunk.error.code, requestId });
  }
  const [choice] = chunk.choices ?? [];
  const delta = choice?.delta ?? {};
  const reasoning = delta.reasoning_content ?? delta.reasoning;
  if (reasoning) yield { kind: "reasoning", text: reasoning };
  if (delta.content) yield { kind: "text", text: delta.content };
  if (choice?.finish_reason) yield { kind: "finish", reason: choice.finish_reason };
  if (chunk.usage) yield { kind: "usage", usage: chunk.usage };
}

/**
 * Measures one answer. Tokens per second count from the first token to the last one, as generation does:
 * neither the queue nor the prompt is in it.
 */
export class Meter {
  #now;
  #asked;
  #first = null;
  #last = null;
  #pieces = 0;
  #usage = null;

  /** @param {() => number} now a monotonic clock, in milliseconds */
  constructor(now) {
    this.#now = now;
    this.#asked = now();
  }

  /** A piece of the answer has come. */
  piece() {
    this.#last = this.#now();
    this.#first ??= this.#last;
    this.#pieces += 1;
  }

  /** What the answer says of itself. */
  counted(usage) {
    this.#usage = usage;
  }

  /** Seconds since it was asked. */
  get elapsed() {
    return (this.#now() - this.#asked) / 1000;
  }

  /** Seconds to the first token, or null. */
  get firstToken() {
    return this.#first === null ? null : (this.#first - this.#asked) / 1000;
  }

  /** Tokens of the answer. Without usage, the pieces: a token each, as a rule, hence `exact` is false. */
  get tokens() {
    return { count: this.#usage?.completion_tokens ?? this.#pieces, exact: this.#usage !== null };
  }

  /** Tokens of the prompt, or null. */
  get promptTokens() {
    return this.#usage?.prompt_tokens ?? null;
  }

  /** Tokens per second after the first, or null while there are no two. */
  get perSecond() {
    const spent = (this.#last - this.#first) / 1000;
    const { count } = this.tokens;
    return this.#first === null || spent <= 0 || count < 2 ? null : (count - 1) / spent;
  }
}
