/** Live workers and queue of each endpoint, with the cold start of each worker. */

import { spark } from "./chart.js";
import { h, reconcile, say, show, template } from "./dom.js";
import { count, elapsed, plural, relative, seconds } from "./format.js";
import { live, watch } from "./status.js";
import { waterfall } from "./waterfall.js";

/** The view. */
export function workers() {
  const element = template("workers-view");
  const list = element.querySelector(".endpoints");
  const cards = new Set();

  function update({ status }) {
    if (!status) return;
    const up = elapsed(Date.now() / 1000 - status.started_at);
    say(element.querySelector("[data-summary]"), `firsttoken ${status.version}, up for ${up}`);
    reconcile(
      list,
      status.endpoints,
      ({ id }) => id,
      () => {
        const card = new EndpointCard();
        cards.add(card);
        return card;
      },
    );
  }

  const unwatch = watch(update);
  const redress = () => cards.forEach((card) => card.redress());
  addEventListener("themechange", redress);
  return {
    element,
    close: () => {
      unwatch();
      removeEventListener("themechange", redress);
      cards.forEach((card) => card.remove());
    },
  };
}

class EndpointCard {
  #title = h("h2", {});
  #about = h("p", { class: "muted" });
  #error = h("p", { class: "problem", role: "alert", hidden: true });
  #figures = h("dl", { class: "figures" });
  #chart = h("div", { class: "spark", "aria-hidden": "true" });
  #workers = h("div", { class: "workers" });
  #none = h("p", { class: "empty" }, "No worker runs. The next request starts one.");
  #id = null;
  #spark = null;

  constructor() {
    this.element = h(
      "section",
      { class: "panel endpoint" },
      h(
        "header",
        {},
        h("div", {}, this.#title, this.#about),
        h(
          "div",
          { class: "pulse" },
          this.#chart,
          h(
            "ul",
            { class: "legend", "aria-hidden": "true" },
            h("li", {}, h("i", { class: "swatch s1" }), "in flight"),
            h("li", {}, h("i", { class: "swatch s2" }), "waiting"),
            h("li", { class: "muted" }, "last 2 min"),
          ),
        ),
      ),
      this.#error,
      this.#figures,
      this.#workers,
      this.#none,
    );
  }

  /** @param {Record<string, any>} status the endpoint's entry in /admin/status */
  update(status) {
    this.#id = status.id;
    say(this.#title, status.id);
    const range =
      status.min_workers === status.max_workers
        ? plural(status.max_workers, "worker")
        : `${count(status.min_workers)} to ${plural(status.max_workers, "worker")}`;
    const idle = status.idle_timeout_s ? `, ended after ${seconds(status.idle_timeout_s)} without work` : "";
    say(this.#about, `${status.model} · ${status.upstream} · ${range}${idle}`);
    show(this.#error, Boolean(status.error));
    say(this.#error, status.error ?? "");
    const ready = status.workers.filter(({ state }) => state === "ready").length;
    const jobs = Object.entries(status.jobs ?? {}).filter(([state, number]) => number && LIVE_JOBS[state]);
    figures(this.#figures, [
      ["Waiting", count(status.waiting)],
      [
        "In flight",
        status.capacity ? `${count(status.in_flight)} of ${count(status.capacity)}` : count(status.in_flight),
      ],
      ["Workers ready", count(ready)],
      ...jobs.map(([state, number]) => [LIVE_JOBS[state], count(number)]),
    ]);
    reconcile(
      this.#workers,
      status.workers,
      ({ id }) => id,
      () => new WorkerCard(),
    );
    show(this.#none, status.workers.length === 0);
    const history = live.history.get(status.id);
    if (history && this.element.isConnected) {
      this.#spark ??= spark(this.#chart);
      this.#spark.update(history);
    }
  }

  /** Draw the chart anew, in the colours of another theme. */
  redress() {
    this.remove();
    if (!this.element.isConnected) return; // its endpoint is gone
    this.#spark = spark(this.#chart);
    this.#spark.update(live.history.get(this.#id));
  }

  remove() {
    this.#spark?.remove();
    this.#spark = null;
  }
}

const LIVE_JOBS = { IN_QUEUE: "Jobs in queue", IN_PROGRESS: "Jobs running" };

function figures(list, entries) {
  reconcile(
    list,
    entries,
    ([name]) => name,
    ([name]) => {
      const value = h("dd", {});
      return {
        element: h("div", {}, h("dt", {}, name), value),
        update: ([, text]) => say(value, text),
      };
    },
  );
}

class WorkerCard {
  #badge = h("span", { class: "badge" });
  #name = h("h3", {});
  #facts = h("dl", { class: "facts" });
  #load = h("meter", { min: "0", "aria-label": "Places in use" });
  #reason = h("p", { hidden: true });
  #start = h("details", { class: "cold", hidden: true });
  #startTitle = h("summary", {});
  #log = h("details", { class: "log", hidden: true });
  #logText = h("pre", { tabindex: "0", "aria-label": "Last lines of the log" });
  #report = null;

  constructor() {
    this.#start.append(this.#startTitle);
    this.#log.append(h("summary", {}, "Last lines of its log"), this.#logText);
    this.element = h(
      "article",
      { class: "worker" },
      h("header", {}, this.#badge, this.#name, this.#load, this.#facts),
      this.#reason,
      this.#start,
      this.#log,
    );
  }

  /** @param {Record<string, any>} worker its entry in /admin/status */
  update(worker) {
    this.element.dataset.state = worker.state;
    say(
      this.#badge,
      worker.state === "starting" && worker.phase ? `starting: ${worker.phase}` : worker.state,
    );
    say(this.#name, worker.id);
    const ready = worker.state === "ready";
    show(this.#load, ready && worker.slots > 0);
    if (worker.slots) Object.assign(this.#load, { max: worker.slots, value: worker.in_flight });
    const now = Date.now() / 1000;
    const over = worker.state === "failed" || worker.state === "ended";
    figures(
      this.#facts,
      [
        ["in flight", worker.slots ? `${worker.in_flight} of ${worker.slots}` : count(worker.in_flight ?? 0)],
        ["idle", worker.idle_s > 0 ? elapsed(worker.idle_s) : null],
        over
          ? ["started", relative(worker.started_at, now)]
          : [worker.state === "starting" ? "for" : "age", elapsed(now - worker.started_at)],
        ["ready after", worker.ready_after_s ? seconds(worker.ready_after_s) : null],
        ["devices", worker.devices?.length ? worker.devices.join(", ") : null],
        ["pid", worker.pid ?? null],
      ].filter(([name, value]) => value !== null && (ready || name !== "in flight")),
    );
    show(this.#reason, Boolean(worker.reason));
    this.#reason.className = worker.state === "failed" ? "problem" : "muted reason";
    say(this.#reason, worker.reason ?? "");
    this.#tellStart(worker.cold_start);
    show(this.#log, Boolean(worker.log_tail?.length));
    say(this.#logText, (worker.log_tail ?? []).join("\n"));
  }

  #tellStart(report) {
    show(this.#start, Boolean(report?.phases?.length));
    if (this.#start.hidden || JSON.stringify(report) === this.#report) return;
    this.#report = JSON.stringify(report);
    say(this.#startTitle, `Cold start, first token after ${seconds(report.total_s)}`);
    this.#start.replaceChildren(this.#startTitle, waterfall(report));
    this.#start.open = true;
  }
}
