/** What /admin/status says, each second while somebody looks, and what it said over the last minutes. */

import { poll } from "./poll.js";
import { callJson, current } from "./session.js";

const EVERY_MS = 1000;
const KEPT = 180;

const listeners = new Set();
let stop = null;

/** `status` is null until there is one; `fault` is the error of the last try, or null. */
export const live = { status: null, fault: null, history: new Map() };

/** Call `listener` now and on each news; returns what ends that. Asks only while there are listeners. */
export function watch(listener) {
  const own = (news) => listener(news); // who watches twice ends each by itself
  listeners.add(own);
  stop ??= current()?.admin ? poll(ask, EVERY_MS) : null;
  listener(live);
  return () => {
    listeners.delete(own);
    if (listeners.size === 0) {
      stop?.();
      stop = null;
    }
  };
}

/** Forget everything, with the session. */
export function forget() {
  stop?.();
  stop = null;
  live.status = live.fault = null;
  live.history.clear();
}

/** The status of the endpoint `id`, or null. */
export const endpointOf = (id) => live.status?.endpoints.find((endpoint) => endpoint.id === id) ?? null;

async function ask(signal) {
  try {
    live.status = await callJson("admin/status", { signal });
    live.fault = null;
    live.status.endpoints.forEach(remember);
  } catch (error) {
    if (error.name === "AbortError") return;
    live.fault = error;
  }
  for (const listener of listeners) listener(live);
}

function remember({ id, waiting, in_flight: inFlight }) {
  const history = live.history.get(id) ?? { at: [], waiting: [], inFlight: [] };
  history.at.push(Date.now() / 1000);
  history.waiting.push(waiting);
  history.inFlight.push(inFlight);
  for (const column of Object.values(history)) if (column.length > KEPT) column.shift();
  live.history.set(id, history);
}
