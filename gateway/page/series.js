/** Usage by day and key: what the chart shows. */

import { isoDay } from "./format.js";

const DAY_MS = 86_400_000;

/**
 * @typedef {object} Row one line of /admin/usage
 * @property {string} day
 * @property {string} key_id
 * @property {string} key_name
 * @property {string} endpoint
 * @property {string} model
 * @property {number} requests
 * @property {number} prompt_tokens
 * @property {number} completion_tokens
 * @property {number} cost
 */

/** Every day from `from` to `to`, both as "2026-11-26" and both included. */
export function days(from, to) {
  const found = [];
  for (let at = Date.parse(from); at <= Date.parse(to); at += DAY_MS) found.push(isoDay(at));
  return found;
}

/**
 * One series for each key, its values by day; the largest first, and what is past `limit` together as one.
 * @param {Row[]} rows
 * @param {string[]} over the days
 * @param {(row: Row) => number} of
 */
export function byKey(rows, over, of, limit) {
  const at = new Map(over.map((name, index) => [name, index]));
  const found = new Map();
  for (const row of rows) {
    if (!at.has(row.day)) continue;
    if (!found.has(row.key_id)) {
      found.set(row.key_id, { name: row.key_name, values: over.map(() => 0) });
    }
    found.get(row.key_id).values[at.get(row.day)] += of(row);
  }
  const sum = ({ values }) => values.reduce((a, b) => a + b, 0);
  const sorted = [...found.values()].sort((a, b) => sum(b) - sum(a));
  if (sorted.length <= limit) return sorted;
  const rest = sorted.splice(limit - 1);
  const values = over.map((_, index) => rest.reduce((total, one) => total + one.values[index], 0));
  return [...sorted, { name: `${rest.length} others`, values }];
}

/**
 * Each row added to the rows before it.
 * @param {number[][]} rows
 */
export function stack(rows) {
  let below = rows[0]?.map(() => 0) ?? [];
  return rows.map((row) => (below = row.map((value, index) => value + below[index])));
}
