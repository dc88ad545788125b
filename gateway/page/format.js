/** Figures as people read them. */

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const mark = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const rate = new Intl.NumberFormat("en", { maximumFractionDigits: 1, minimumFractionDigits: 1 });
const large = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const small = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const dayName = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", timeZone: "UTC" });
const moment = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "short" });

/** 1234567 -> "1,234,567" */
export const count = (value) => whole.format(value);

/** 1234567 -> "1.2M" */
export const compact = (value) => short.format(value);

/** A figure of an axis, where neighbours differ: 1250 -> "1.25K", 0.00025 -> "0.00025" */
export const onAxis = (value) => mark.format(value);

/** Tokens per second: one decimal below 100, none above. */
export const perSecond = (value) => (value < 100 ? rate.format(value) : whole.format(Math.round(value)));

/** An amount in the currency of the prices that were set, which has no name here: "12.30", "0.0345". */
export const cost = (value) => (value >= 1 || value === 0 ? large : small).format(value);

/** 269060552 -> "269 MB" */
export function bytes(value) {
  const power = Math.min(4, Math.floor(Math.log10(Math.max(value, 1)) / 3));
  const scaled = value / 1000 ** power;
  return `${scaled < 10 && power ? scaled.toFixed(1) : Math.round(scaled)} ${["B", "KB", "MB", "GB", "TB"][power]}`;
}

/**
 * A duration in the unit that fits: "0 ms", "340 ms", "2.94 s", "36.7 s", "3 min 5 s", "2 h 4 min", "3 d 1 h".
 * @param {number|null|undefined} value in seconds
 */
export function seconds(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Math.round(value * 1000) < 1000) return `${Math.round(value * 1000)} ms`;
  if (value < 9.995) return `${value.toFixed(2)} s`;
  if (value < 59.95) return `${value.toFixed(1)} s`;
  const total = Math.round(value);
  if (total < 3600) return two(total, 60, "min", 1, "s");
  if (total < 86400) return two(total, 3600, "h", 60, "min");
  return two(total, 86400, "d", 3600, "h");
}

function two(total, large, largeName, small, smallName) {
  const rest = Math.floor((total % large) / small);
  return `${Math.floor(total / large)} ${largeName}` + (rest ? ` ${rest} ${smallName}` : "");
}

/** A duration that is still growing: whole seconds, so that it does not flicker. */
export const elapsed = (value) =>
  value < 1 ? "0 s" : value < 60 ? `${Math.floor(value)} s` : seconds(Math.floor(value));

/**
 * How far away a moment is: "just now", "5 min ago", "in 3 d".
 * @param {number|null|undefined} at Unix seconds
 * @param {number} now Unix seconds
 */
export function relative(at, now) {
  if (at === null || at === undefined) return "never";
  const distance = Math.abs(at - now);
  if (distance < 5) return "just now";
  const whole = at < now ? Math.floor : Math.round; // half a day ago is not a day, and 30 days to go are not 29
  const unit = distance < 60 ? 1 : distance < 3600 ? 60 : distance < 86_400 ? 3600 : 86_400;
  const steps = whole(distance / unit);
  const rough = unit === 1 ? `${steps} s` : seconds(steps * unit);
  return at < now ? `${rough} ago` : `in ${rough}`;
}

/** Unix seconds -> "26 Nov 2026, 14:03" in the reader's own time. */
export const date = (at) => moment.format(new Date(at * 1000));

/** "2026-11-26" -> "26 Nov" */
export const day = (text) => dayName.format(new Date(`${text}T00:00:00Z`));

/** The day of a moment in UTC, as the gateway counts days: "2026-11-26". */
export const isoDay = (moment) => new Date(moment).toISOString().slice(0, 10);

const BRIEF = 32;

/** A name of at most 32 characters: of a longer one both ends, which tell it from others. */
export function brief(name) {
  const signs = [...name]; // half of one is none
  return signs.length > BRIEF ? [...signs.slice(0, BRIEF / 2), "…", ...signs.slice(1 - BRIEF / 2)].join("") : name;
}

/** "1 worker", "2 workers" */
export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
