/** What a cold start's phases are, as `python -m handler explain` says it. */

/**
 * @typedef {{name: string, begin_s: number, end_s: number, cpu_s?: number, major_faults?: number}} Phase
 * @typedef {{total_s: number|null, facts?: Record<string, unknown>, phases: Phase[]}} Report
 */

/** What held a phase up: "cpu", "disk", or "waiting" for a GPU, a network, another process. */
export function heldBy({ begin_s: begin, end_s: end, cpu_s: cpu = 0, major_faults: faults = 0 }) {
  if (cpu >= 0.7 * (end - begin)) return "cpu";
  return faults > 100 ? "disk" : "waiting";
}

/**
 * The bars of `report`: `left` and `width` are shares of the whole, 0 to 1.
 * @param {Report} report
 */
export function layout({ total_s: total, phases }) {
  const whole = Math.max(total ?? 0, ...phases.map((phase) => phase.end_s)) || 1;
  return phases.map((phase) => ({
    name: phase.name,
    begin: phase.begin_s,
    wall: phase.end_s - phase.begin_s,
    cpu: phase.cpu_s ?? 0,
    faults: phase.major_faults ?? 0,
    held: heldBy(phase),
    left: phase.begin_s / whole,
    width: (phase.end_s - phase.begin_s) / whole,
  }));
}
