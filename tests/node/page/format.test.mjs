import assert from "node:assert/strict";
import { test } from "node:test";

import {
  brief,
  bytes,
  compact,
  cost,
  count,
  day,
  elapsed,
  isoDay,
  onAxis,
  perSecond,
  plural,
  relative,
  seconds,
} from "../../../gateway/page/format.js";

const each = (format, ...pairs) => pairs.forEach(([value, text]) => assert.equal(format(value), text));

test("a duration has the unit that fits it, and changes it without a jump", () => {
  each(
    seconds,
    [null, "–"],
    [0, "0 ms"],
    [0.3404, "340 ms"],
    [0.9994, "999 ms"],
    [0.9996, "1.00 s"],
    [2.944, "2.94 s"],
    [9.996, "10.0 s"],
    [36.71, "36.7 s"],
    [59.94, "59.9 s"],
    [59.96, "1 min"],
    [185, "3 min 5 s"],
    [3599.4, "59 min 59 s"],
    [3600, "1 h"],
    [7440, "2 h 4 min"],
    [90_000, "1 d 1 h"],
  );
  each(elapsed, [0.9, "0 s"], [12.9, "12 s"], [60.9, "1 min"], [61, "1 min 1 s"]);
});

test("a moment is as far away as the largest unit says", () => {
  const now = 1_000_000;
  const away = (at) => relative(at, now);
  each(
    away,
    [null, "never"],
    [undefined, "never"],
    [now - 2, "just now"],
    [now - 42, "42 s ago"],
    [now - 301, "5 min ago"],
    [now - 7300, "2 h ago"],
    [now - 90_000, "1 d ago"],
    [now + 86_400 * 3 - 9, "in 3 d"],
  );
});

test("numbers are grouped, shortened and rounded", () => {
  each(count, [1234567, "1,234,567"]);
  each(onAxis, [0, "0"], [950, "950"], [1250, "1.25K"], [12.5, "12.5"], [0.00025, "0.00025"]);
  each(compact, [950, "950"], [12_345, "12.3K"], [1_700_000, "1.7M"]);
  each(perSecond, [31.26, "31.3"], [1234.5, "1,235"]);
  each(cost, [0, "0.00"], [12.3, "12.30"], [0.034512, "0.0345"], [0.0000351, "0.0000351"]);
  each(bytes, [0, "0 B"], [999, "999 B"], [1500, "1.5 KB"], [269_060_552, "269 MB"], [16.1e9, "16 GB"]);
  assert.equal(plural(1, "token"), "1 token");
  assert.equal(plural(2000, "token"), "2,000 tokens");
});

test("a long name keeps both its ends", () => {
  each(
    brief,
    ["", ""],
    ["x".repeat(32), "x".repeat(32)],
    ["organisation/model-of-many-words-8B", "organisation/mod…f-many-words-8B"],
    ["😀".repeat(40), `${"😀".repeat(16)}…${"😀".repeat(15)}`],
  );
});

test("days are those of UTC", () => {
  assert.equal(isoDay(Date.UTC(2026, 10, 26, 23, 59)), "2026-11-26");
  assert.equal(day("2026-11-01"), "1 Nov");
});
