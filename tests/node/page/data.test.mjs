import assert from "node:assert/strict";
import { test } from "node:test";

import { heldBy, layout } from "../../../gateway/page/phases.js";
import { byKey, days, stack } from "../../../gateway/page/series.js";

const phase = (begin_s, end_s, more = {}) => ({ name: "p", begin_s, end_s, ...more });

test("what held a phase up is the CPU, else the disk if there were faults", () => {
  assert.equal(heldBy(phase(1, 2, { cpu_s: 0.7, major_faults: 500 })), "cpu");
  assert.equal(heldBy(phase(1, 2, { cpu_s: 0.6, major_faults: 101 })), "disk");
  assert.equal(heldBy(phase(1, 2, { cpu_s: 0.6, major_faults: 100 })), "waiting");
  assert.equal(heldBy(phase(1, 2)), "waiting");
});

test("bars are shares of the whole start, and none leaves it", () => {
  const shares = (report) => layout(report).map(({ left, width }) => [left, width]);
  assert.deepEqual(shares({ total_s: 4, phases: [phase(0, 1), phase(1, 4)] }), [
    [0, 0.25],
    [0.25, 0.75],
  ]);
  assert.deepEqual(shares({ total_s: null, phases: [phase(0, 1), phase(1, 2)] }), [
    [0, 0.5],
    [0.5, 0.5],
  ]);
  assert.deepEqual(shares({ total_s: 1, phases: [phase(0, 2)] }), [[0, 1]]);
  assert.deepEqual(shares({ total_s: 0, phases: [phase(0, 0)] }), [[0, 0]]);
});

const row = (day, key_id, requests) => ({ day, key_id, key_name: key_id.toUpperCase(), requests });

test("a series for each key has a value for each day, and the small ones share the last", () => {
  const over = days("2026-02-27", "2026-03-01");
  assert.deepEqual(over, ["2026-02-27", "2026-02-28", "2026-03-01"]);
  const rows = [
    row(over[0], "a", 1),
    row(over[2], "b", 5),
    row(over[2], "b", 2),
    row(over[1], "c", 3),
    row("2026-03-02", "a", 90),
  ];
  const of = ({ requests }) => requests;
  assert.deepEqual(byKey(rows, over, of, 3), [
    { name: "B", values: [0, 0, 7] },
    { name: "C", values: [0, 3, 0] },
    { name: "A", values: [1, 0, 0] },
  ]);
  assert.deepEqual(byKey(rows, over, of, 2), [
    { name: "B", values: [0, 0, 7] },
    { name: "2 others", values: [1, 3, 0] },
  ]);
});

test("bars stand on those below", () => {
  assert.deepEqual(
    stack([
      [1, 2],
      [3, 0],
      [0, 5],
    ]),
    [
      [1, 2],
      [4, 2],
      [4, 7],
    ],
  );
  assert.deepEqual(stack([]), []);
});
