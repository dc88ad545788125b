/** The two charts of the page, over uPlot. Colours come from the style sheet, so that a theme is one place. */

import { brief, onAxis } from "./format.js";
import { stack } from "./series.js";
import { hide, showAt } from "./tip.js";
import uPlot from "./vendor/uPlot.esm.js";

/** How many keys have a colour of their own; the rest share the last one. */
export const COLOURS = 8;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const resolved = (name) => {
  // light-dark() is resolved by a property that is a colour, not by the custom one.
  const probe = document.getElementById("main");
  probe.style.setProperty("outline-color", `var(${name})`);
  const colour = getComputedStyle(probe).outlineColor;
  probe.style.removeProperty("outline-color");
  return colour;
};

/** The name of the custom property of the series `index`. */
export const colourOf = (index) => `--series-${Math.min(index, COLOURS - 1) + 1}`;

function axis(options) {
  const grid = { stroke: resolved("--line"), width: 1 };
  return {
    stroke: resolved("--muted"),
    font: `12px ${css("--font")}`,
    grid,
    ticks: { show: false },
    ...options,
  };
}

/** Keep `plot` as wide as the element that it is in; returns what ends that. */
function fit(plot, parent, height) {
  const observer = new ResizeObserver(() => plot.setSize({ width: parent.clientWidth, height }));
  observer.observe(parent);
  return () => {
    observer.disconnect();
    plot.destroy();
  };
}

const HEIGHT = 260;

/**
 * Stacked bars, one for each of `labels`.
 * @param {HTMLElement} parent
 * @param {{labels: string[], series: {name: string, values: number[]}[], format: (value: number) => string}} data
 * @returns {() => void} what removes it
 */
export function stackedBars(parent, { labels, series, format }) {
  const sums = stack(series.map(({ values }) => values));
  // The highest sum is drawn first, and each lower one over it.
  const drawn = series.map((_, index) => series.length - 1 - index);
  const plot = new uPlot(
    {
      width: parent.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      cursor: { y: false, points: { show: false }, drag: { x: false, y: false } },
      scales: {
        x: { time: false, range: [-0.6, labels.length - 0.4] },
        y: { range: (_, __, max) => [0, max > 0 ? max * 1.08 : 1] },
      },
      axes: [
        axis({
          grid: { show: false },
          size: 28,
          space: 56,
          incrs: [1, 2, 3, 5, 7, 14, 28, 61, 91, 182],
          values: (_, ticks) => ticks.map((tick) => labels[tick] ?? ""),
        }),
        axis({ size: 60, values: (_, ticks) => ticks.map(onAxis) }),
      ],
      series: [
        {},
        ...drawn.map((index) => ({
          label: series[index].name,
          fill: resolved(colourOf(index)),
          stroke: resolved("--surface"),
          width: 1,
          points: { show: false },
          paths: uPlot.paths.bars({ size: [0.72, 44], radius: index === series.length - 1 ? 0.08 : 0 }),
        })),
      ],
      hooks: {
        setCursor: [
          (self) => {
            const at = self.cursor.idx;
            if (at === null || at === undefined || self.cursor.left < 0) return hide();
            const box = self.over.getBoundingClientRect();
            const parts = series
              .filter(({ values }) => values[at])
              .map(({ name, values }) => `${brief(name)}: ${format(values[at])}`)
              .reverse();
            const total = format(sums.at(-1)?.[at] ?? 0);
            showAt(box.left + self.cursor.left, box.top + self.cursor.top, [
              `${labels[at]}: ${total}`,
              ...parts,
            ]);
          },
        ],
      },
    },
    [
      labels.map((_, index) => index),
      ...drawn.map((index) => sums[index].map((sum, at) => (series[index].values[at] ? sum : null))),
    ],
    parent,
  );
  plot.over.addEventListener("pointerleave", hide);
  return fit(plot, parent, HEIGHT);
}

const SPARK_HEIGHT = 56;

/**
 * Two lines over the last minutes, without axes.
 * @returns {{update: (history: {at: number[], waiting: number[], inFlight: number[]}) => void, remove: () => void}}
 */
export function spark(parent) {
  const line = (name) => ({ stroke: resolved(name), width: 1.5, points: { show: false } });
  const plot = new uPlot(
    {
      width: parent.clientWidth || 240,
      height: SPARK_HEIGHT,
      legend: { show: false },
      cursor: { show: false },
      padding: [4, 0, 2, 0],
      scales: {
        x: { time: false, range: (_, __, max) => [max - 120, max] },
        y: { range: (_, __, max) => [0, Math.max(4, max)] },
      },
      axes: [{ show: false }, { show: false }],
      series: [{}, line("--series-2"), line("--series-1")],
    },
    [[], [], []],
    parent,
  );
  return {
    update: ({ at, waiting, inFlight }) => plot.setData([at, waiting, inFlight]),
    remove: fit(plot, parent, SPARK_HEIGHT),
  };
}
