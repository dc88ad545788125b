/** The playground: a conversation with one endpoint. It lives as long as the page and is kept nowhere. */

import { Meter, complete } from "./completion.js";
import { h, say, show, template } from "./dom.js";
import { count, elapsed, perSecond, plural, seconds } from "./format.js";
import { callJson, current, expired, listen } from "./session.js";
import { endpointOf, watch } from "./status.js";

/** The view of the session that is signed in: an answer goes on while another view is looked at. */
let kept = null;

/** @param {import("./session.js").Session} session */
export function chat(session) {
  if (kept?.session !== session) kept = { session, ...build(session) };
  return kept.open();
}

listen((session) => {
  if (kept && kept.session !== session) {
    kept.stop();
    kept = null;
  }
});

/** @param {import("./session.js").Session} session */
function build(session) {
  const element = template("chat-view");
  const find = (selector) => element.querySelector(selector);
  const field = (name) => find(`[name=${name}]`);
  const [transcript, prompt, said] = [find(".transcript"), find("#prompt"), find("[data-said]")];
  const [sendButton, stopButton] = [find("[data-send]"), find("[data-stop]")];
  let messages = [];
  let running = null;

  field("endpoint").append(...session.endpoints.map(({ id }) => h("option", { value: id }, id)));
  field("model").value = modelOf(session.endpoints[0]);
  find("#models").append(...(session.models ?? []).map((model) => h("option", { value: model })));
  if (matchMedia("(max-width: 60rem)").matches) find(".chat-side").open = false;
  transcript.append(greeting());

  function greeting() {
    return h(
      "p",
      { class: "empty" },
      session.endpoints.length
        ? "Say something to the model. Time to first token, tokens per second and usage are below each answer."
        : "This key may use no endpoint.",
    );
  }

  /** What to ask for first: the endpoint's model, or one that the key may use. */
  function modelOf(endpoint) {
    const { model = "" } = endpoint ?? {};
    return session.models && !session.models.includes(model) ? session.models[0] : model;
  }

  function endpoint() {
    return session.endpoints.find(({ id }) => id === field("endpoint").value) ?? session.endpoints[0];
  }

  function busy(now) {
    show(stopButton, now);
    show(sendButton, !now);
    if (!now && document.activeElement === document.body) prompt.focus();
  }

  function add(turn) {
    transcript.querySelector(".empty")?.remove();
    transcript.append(turn);
  }

  async function send() {
    const text = prompt.value.trim();
    if (!text || running || !endpoint()) return;
    prompt.value = "";
    grow();
    const conversation = messages; // a new one may be begun meanwhile
    const question = { role: "user", content: text };
    conversation.push(question);
    add(h("article", { class: "turn user", "aria-label": "You" }, h("p", { class: "text" }, text)));
    const answer = await ask();
    if (answer === null)
      conversation.splice(conversation.indexOf(question), 1); // it was not answered
    else conversation.push({ role: "assistant", content: answer });
  }

  function parameters() {
    const system = field("system").value.trim();
    const number = (name) => (field(name).value === "" ? undefined : field(name).valueAsNumber);
    return {
      model: field("model").value.trim(),
      messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
      temperature: number("temperature"),
      max_tokens: number("max_tokens"),
    };
  }

  /** Ask for the next answer and show it; returns its text, or null if there is none. */
  async function ask() {
    running = new AbortController();
    busy(true);
    const turn = new Answer(endpoint().id, transcript);
    add(turn.element);
    turn.follow();
    say(said, "Waiting for the answer.");
    try {
      const asked = { endpoint: endpoint().id, key: session.key, body: parameters(), signal: running.signal };
      for await (const part of complete(asked)) {
        if (part.kind === "text" && !turn.text) say(said, "The answer is being written.");
        turn.take(part);
      }
      turn.end();
      say(said, `The answer is complete: ${turn.text}`);
    } catch (error) {
      if (error.name === "AbortError") {
        turn.end("stopped");
        say(said, "Stopped.");
      } else {
        turn.fail(error);
        say(said, `Error: ${error.message}`);
        expired(error);
      }
    } finally {
      running = null;
      busy(false);
    }
    return turn.text || null;
  }

  function grow() {
    prompt.style.height = "auto";
    prompt.style.height = `${Math.min(prompt.scrollHeight + 2, 240)}px`;
  }

  find("form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  prompt.addEventListener("input", grow);
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  const stop = () => running?.abort();
  element.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
  });
  stopButton.addEventListener("click", () => {
    stop();
    prompt.focus();
  });
  find("[data-new]").addEventListener("click", () => {
    stop();
    messages = [];
    transcript.replaceChildren(greeting());
    prompt.focus();
  });
  field("endpoint").addEventListener("change", () => {
    field("model").value = modelOf(endpoint());
    models = null;
    note();
  });

  let models = null;

  /** Offer the endpoint's models, once it can be asked without starting a worker for that. */
  async function offerModels(id) {
    models = id;
    try {
      const { data } = await callJson(`v2/${encodeURIComponent(id)}/openai/v1/models`);
      find("#models").replaceChildren(...data.map((model) => h("option", { value: model.id })));
    } catch {
      // the name can be typed
    }
  }

  function note() {
    const status = endpoint() && endpointOf(endpoint().id);
    if (!status) return;
    if (status.capacity > 0 && !session.models && models !== endpoint().id) offerModels(endpoint().id);
    say(find("[data-note]"), describe(status));
  }

  return {
    stop,
    open: () => {
      const unwatch = session.admin ? watch(note) : () => {};
      requestAnimationFrame(() => transcript.scrollTo(0, transcript.scrollHeight));
      return { element, close: unwatch };
    },
  };
}

/** What an endpoint's workers mean for whoever asks next. */
function describe(status) {
  if (status.error) return status.error;
  const ready = status.workers.filter(({ state }) => state === "ready").length;
  if (ready)
    return `${plural(ready, "worker")} ready, ${count(status.in_flight)} of ${count(status.capacity)} places in use.`;
  const starting = status.workers.find(({ state }) => state === "starting");
  if (starting) return `A worker is starting${starting.phase ? `: ${starting.phase}` : ""}.`;
  return "No worker runs: the first answer waits for one to start.";
}

/** One answer of the transcript, as it comes. */
class Answer {
  text = "";
  #meter = new Meter(() => performance.now());
  #requestId = null;
  #finish = null;
  #timer = null;
  #fresh = "";
  #frame = null;
  #endpointId;
  #transcript;
  #words;
  #thoughts;
  #thinking;
  #body;
  #figures;
  #state;

  constructor(endpointId, transcript) {
    this.#endpointId = endpointId;
    this.#transcript = transcript;
    this.#words = document.createTextNode("");
    this.#thoughts = document.createTextNode("");
    this.#thinking = h(
      "details",
      { class: "reasoning", hidden: true },
      h("summary", {}, "Reasoning"),
      h("p", {}, this.#thoughts),
    );
    this.#body = h("p", { class: "text" }, this.#words);
    this.#figures = h("dl", { class: "meter" });
    this.#state = h("p", { class: "pending" }, "Waiting");
    this.element = h(
      "article",
      { class: "turn assistant", "aria-label": "Answer", "aria-busy": "true" },
      this.#state,
      this.#thinking,
      this.#body,
      this.#figures,
    );
  }

  /** Keep the reader up to date, and the end in sight. */
  follow() {
    this.element.scrollIntoView({ block: "nearest" });
    this.#timer = setInterval(() => this.#tell(), 250);
    this.#tell();
  }

  /** Take a part of the stream (`completion.complete`). */
  take(part) {
    if (part.kind === "open") this.#requestId = part.requestId;
    if (part.kind === "finish") this.#finish = part.reason;
    if (part.kind === "usage") this.#meter.counted(part.usage);
    if (part.kind !== "text" && part.kind !== "reasoning") return;
    this.#meter.piece();
    show(this.#state, false);
    if (part.kind === "text") {
      this.text += part.text;
      this.#fresh += part.text;
    } else {
      show(this.#thinking, true);
      this.#thoughts.appendData(part.text);
    }
    this.#frame ??= requestAnimationFrame(() => this.#paint()); // a picture for each frame, not for each token
  }

  #paint() {
    this.#frame = null;
    const { scrollTop, scrollHeight, clientHeight } = this.#transcript;
    const atEnd = scrollHeight - scrollTop - clientHeight < 60;
    this.#words.appendData(this.#fresh);
    this.#fresh = "";
    if (atEnd) this.#transcript.scrollTop = this.#transcript.scrollHeight;
  }

  /** It is over; `how` is why, if not by itself. */
  end(how = null) {
    clearInterval(this.#timer);
    cancelAnimationFrame(this.#frame);
    this.#paint();
    this.#finish = how ?? this.#finish;
    show(this.#state, !this.text && how !== null);
    say(this.#state, how === "stopped" ? "Stopped before the first token." : "");
    this.element.setAttribute("aria-busy", "false");
    this.#tell();
    this.element.scrollIntoView({ block: "nearest" });
  }

  /** It went wrong: say so as the API does. */
  fail(error) {
    this.end("error");
    show(this.#state, false);
    show(this.#figures, Boolean(this.text));
    const details = [
      error.status ? `status ${error.status}` : null,
      error.code ? `code ${error.code}` : null,
      error.retryAfter ? `retry after ${error.retryAfter} s` : null,
      error.requestId ? `request ${error.requestId}` : null,
    ].filter(Boolean);
    this.#figures.before(
      h(
        "div",
        { class: "problem" },
        h("strong", {}, error.message),
        h("p", { class: "mono" }, details.join(" · ")),
      ),
    );
    this.element.scrollIntoView({ block: "nearest" });
  }

  #tell() {
    const meter = this.#meter;
    const over = this.element.getAttribute("aria-busy") === "false";
    if (!over && meter.firstToken === null) say(this.#state, this.#waiting());
    const { count: tokens, exact } = meter.tokens;
    const figures = [
      ["First token", meter.firstToken === null ? null : seconds(meter.firstToken)],
      ["Speed", meter.perSecond === null ? null : `${perSecond(meter.perSecond)} tokens/s`],
      ["Answer", tokens ? `${exact ? "" : "about "}${plural(tokens, "token")}` : null],
      ["Prompt", meter.promptTokens === null ? null : plural(meter.promptTokens, "token")],
      ["Ended by", over && this.#finish ? this.#finish : null],
      ["Request", over ? this.#requestId : null],
    ].filter(([, value]) => value !== null);
    this.#figures.replaceChildren(
      ...figures.map(([name, value]) =>
        h(
          "div",
          { "data-figure": name.toLowerCase().replace(" ", "-") },
          h("dt", {}, name),
          h("dd", {}, value),
        ),
      ),
    );
  }

  /** What is known of why nothing has come yet. */
  #waiting() {
    const status = current()?.admin ? endpointOf(this.#endpointId) : null;
    const since = elapsed(this.#meter.elapsed);
    const starting = status?.workers.find(({ state }) => state === "starting");
    if (!status || status.capacity > 0 || !starting) return `Waiting for the first token, ${since}`;
    return `A worker is starting${starting.phase ? ` (${starting.phase})` : ""}, ${since}`;
  }
}
