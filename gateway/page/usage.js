/** Tokens, cost and requests by day and key. */

import { COLOURS, colourOf, stackedBars } from "./chart.js";
import { h, say, template } from "./dom.js";
import { compact, cost, count, day, isoDay } from "./format.js";
import { poll } from "./poll.js";
import { byKey, days } from "./series.js";
import { call, callJson } from "./session.js";

const DAY_MS = 86_400_000;
const EVERY_MS = 2000;

const MEASURES = {
  tokens: { name: "Tokens", of: (row) => row.prompt_tokens + row.completion_tokens, format: count },
  cost: { name: "Cost", of: (row) => row.cost, format: cost },
  requests: { name: "Requests", of: (row) => row.requests, format: count },
};

/** The view. */
export function usage() {
  const element = template("usage-view");
  const find = (selector) => element.querySelector(selector);
  const filters = find(".filters");
  const field = (name) => filters.elements.namedItem(name);
  let rows = null;
  let drawn = null;
  let removeChart = () => {};

  field("to").value = isoDay(Date.now());
  field("from").value = isoDay(Date.now() - 29 * DAY_MS);

  /** Where the answer to the filters is. */
  function address(format) {
    const given = ["from", "to", "key", "endpoint", "model"].map((name) => [name, field(name).value]);
    return `admin/usage?${new URLSearchParams([["format", format], ...given.filter(([, value]) => value)])}`;
  }

  async function load(signal) {
    if (!filters.checkValidity()) return;
    try {
      const answer = await callJson(address("json"), { signal });
      say(find("[data-fault]"), "");
      const text = JSON.stringify(answer.data);
      if (text === drawn) return;
      drawn = text;
      rows = answer.data;
      offer();
      draw(answer.totals);
    } catch (error) {
      if (error.name === "AbortError") return;
      const told = error.code === "connection_failed"; // the bar says that on every view
      say(find("[data-fault]"), told ? "" : error.message);
    }
  }

  /** Offer what the rows have in them as filters; what was offered stays, so that a filter can be changed. */
  function offer() {
    const names = {
      key: (row) => [row.key_id, row.key_name],
      endpoint: (row) => [row.endpoint, row.endpoint],
      model: (row) => [row.model, row.model],
    };
    for (const [name, of] of Object.entries(names)) {
      const select = field(name);
      const known = new Set([...select.options].map((option) => option.value));
      for (const [value, label] of new Map(rows.map(of))) {
        if (!known.has(value)) select.append(h("option", { value }, label));
      }
    }
  }

  let totals = {};

  function draw(sums = totals) {
    totals = sums;
    if (rows === null) return;
    const measure = MEASURES[field("measure").value];
    const over = days(field("from").value, field("to").value);
    const series = byKey(rows, over, measure.of, COLOURS);
    removeChart();
    const chart = find("[data-chart]");
    chart.replaceChildren();
    removeChart = () => {};
    say(
      find("[data-caption]"),
      `${measure.name} by day and key${series.length ? "" : ": none in these days"}`,
    );
    if (series.length)
      removeChart = stackedBars(chart, { labels: over.map(day), series, format: measure.format });
    find("[data-legend]").replaceChildren(
      ...series.map(({ name, values }, index) => {
        const swatch = h("i", { class: "swatch" });
        swatch.style.background = `var(${colourOf(index)})`;
        return h(
          "li",
          {},
          swatch,
          name,
          h("span", { class: "muted" }, measure.format(values.reduce((a, b) => a + b, 0))),
        );
      }),
    );
    find("[data-totals]").replaceChildren(
      ...[
        ["Requests", count(sums.requests ?? 0)],
        ["Tokens in", compact(sums.prompt_tokens ?? 0)],
        ["Tokens out", compact(sums.completion_tokens ?? 0)],
        ["Cost", cost(sums.cost ?? 0)],
      ].map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", { "data-total": name }, value))),
    );
    table();
  }

  function table() {
    const sorted = rows.toSorted(
      (a, b) => b.day.localeCompare(a.day) || a.key_name.localeCompare(b.key_name),
    );
    const cell = (text, kind) => h("td", kind ? { class: kind } : {}, text);
    find("tbody").replaceChildren(
      ...sorted.map((row) =>
        h(
          "tr",
          {},
          h("th", { scope: "row" }, row.day),
          cell(row.key_name, "name"),
          cell(row.endpoint),
          cell(row.model, "name"),
          cell(count(row.requests), "num"),
          cell(count(row.prompt_tokens), "num"),
          cell(count(row.completion_tokens), "num"),
          cell(cost(row.cost), "num"),
        ),
      ),
    );
    if (!sorted.length) {
      find("tbody").append(
        h("tr", {}, h("td", { colspan: "8", class: "empty" }, "Nothing was asked in these days.")),
      );
    }
  }

  async function download() {
    const button = find("[data-csv]");
    button.disabled = true;
    try {
      const answer = await call(address("csv"));
      const url = URL.createObjectURL(await answer.blob());
      h("a", { href: url, download: `usage-${field("from").value}-${field("to").value}.csv` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
    } catch (error) {
      say(find("[data-fault]"), error.message);
    } finally {
      button.disabled = false;
    }
  }

  let stop = poll(load, EVERY_MS);
  const restart = () => {
    stop();
    drawn = null;
    stop = poll(load, EVERY_MS);
  };
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("change", (event) => (event.target.name === "measure" ? draw() : restart()));
  find("[data-csv]").addEventListener("click", download);
  const redress = () => draw();
  addEventListener("themechange", redress);
  return {
    element,
    close: () => {
      stop();
      removeChart();
      removeEventListener("themechange", redress);
    },
  };
}
