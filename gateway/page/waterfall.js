/** A cold start as bars in a table. */

import { h } from "./dom.js";
import { bytes, count, seconds } from "./format.js";
import { layout } from "./phases.js";
import { attach } from "./tip.js";

const HELD = { cpu: "CPU", disk: "disk", waiting: "waiting" };

/**
 * The waterfall of `report` as a table, each row with its bar.
 * @param {import("./phases.js").Report} report
 */
export function waterfall(report) {
  const rows = layout(report);
  return h(
    "div",
    { class: "waterfall" },
    h(
      "table",
      {},
      h("caption", { class: "sr-only" }, `Cold start, first token after ${seconds(report.total_s)}`),
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("th", { scope: "col" }, "Phase"),
          h(
            "th",
            { scope: "col", class: "axis" },
            h("span", {}, "0"),
            h("span", {}, seconds(report.total_s)),
          ),
          h("th", { scope: "col", class: "num" }, "Time"),
          h("th", { scope: "col", class: "num wide" }, "CPU"),
          h("th", { scope: "col", class: "num wide" }, "Faults"),
          h("th", { scope: "col", class: "wide" }, "Held by"),
        ),
      ),
      h("tbody", {}, ...rows.map(bar)),
    ),
    h(
      "ul",
      { class: "legend", "aria-hidden": "true" },
      ...Object.entries(HELD).map(([held, name]) => h("li", {}, h("i", { class: `swatch ${held}` }), name)),
    ),
    facts(report.facts ?? {}),
  );
}

function bar(row) {
  const mark = h("i", { class: `mark ${row.held}` });
  mark.style.left = `${row.left * 100}%`;
  mark.style.width = `${row.width * 100}%`;
  const line = h(
    "tr",
    {},
    h("th", { scope: "row" }, row.name),
    h("td", { class: "track" }, mark),
    h("td", { class: "num" }, seconds(row.wall)),
    h("td", { class: "num wide" }, seconds(row.cpu)),
    h("td", { class: "num wide" }, count(row.faults)),
    h("td", { class: "wide" }, HELD[row.held]),
  );
  attach(line, () => [
    row.name,
    `${seconds(row.begin)} to ${seconds(row.begin + row.wall)}, ${seconds(row.wall)}`,
    `${seconds(row.cpu)} of CPU, ${count(row.faults)} major faults`,
    `held by: ${HELD[row.held]}`,
  ]);
  return line;
}

function facts(entries) {
  const shown = Object.entries(entries);
  if (!shown.length) return null;
  return h(
    "dl",
    { class: "facts" },
    ...shown.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, fact(name, value)))),
  );
}

/** The value of a fact as text; what unit it has, its name says. */
function fact(name, value) {
  if (Array.isArray(value)) return value.map((item) => fact("", item)).join(", ") || "none";
  if (typeof value === "object") return JSON.stringify(value);
  if (typeof value !== "number") return String(value);
  if (name.endsWith("_bytes")) return bytes(value);
  return name.endsWith("_s") && !name.endsWith("_per_s") ? seconds(value) : count(value);
}
