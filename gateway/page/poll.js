/**
 * Run `work` now and `everyMs` after each end, while the page is visible. Returns what stops it, and what is under way.
 * @param {(signal: AbortSignal) => Promise<void>} work throws nothing
 * @param {number} everyMs
 */
export function poll(work, everyMs) {
  const stopping = new AbortController();
  let timer;
  let busy = false;

  async function turn() {
    clearTimeout(timer);
    if (busy || document.hidden || stopping.signal.aborted) return;
    busy = true;
    try {
      await work(stopping.signal);
    } finally {
      busy = false;
      timer = setTimeout(turn, everyMs);
    }
  }

  document.addEventListener("visibilitychange", turn, { signal: stopping.signal });
  stopping.signal.addEventListener("abort", () => clearTimeout(timer));
  turn();
  return () => stopping.abort();
}
