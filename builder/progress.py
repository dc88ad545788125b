"""How far a long piece of work is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread

from builder.console import Console, size
from handler.prerequisites import installed

REPORT_S = 15.0
"""Between two lines: a log stays short, and whoever waits sees that it goes on."""

Advance = Callable[[int], None]
"""Told how many bytes are done since it was told last; less than none where work is done again."""


@contextmanager
def progress(
    console: Console, doing: str, total_bytes: int, *, report_s: float = REPORT_S
) -> Iterator[Advance]:
    """Show how much of `total_bytes` is done while the block runs; yields what is told of it, by any thread.

        with progress(console, "hashing", total_bytes) as advance:
            advance(len(piece))

    What takes less than `report_s` says nothing where no bar can be drawn.
    """
    if not total_bytes:
        yield lambda _: None
        return
    shown = _bar if console.terminal and installed("tqdm") else _lines
    with shown(console, doing, total_bytes, report_s) as advance:
        yield advance


@contextmanager
def _bar(console: Console, doing: str, total_bytes: int, _: float) -> Iterator[Advance]:
    from tqdm import tqdm  # noqa: PLC0415 - where nobody looks it is not needed

    lock = Lock()  # tqdm's own keeps lines apart, not sums
    with tqdm(
        desc=f"{console.name}: {doing}",
        total=total_bytes,
        unit="B",
        unit_scale=True,
        file=console.stream,
        leave=False,
        dynamic_ncols=True,
    ) as bar:

        def advance(count_bytes: int) -> None:
            with lock:
                bar.update(count_bytes)

        yield advance


@contextmanager
def _lines(console: Console, doing: str, total_bytes: int, report_s: float) -> Iterator[Advance]:
    lock, over = Lock(), Event()
    done_bytes = 0

    def advance(count_bytes: int) -> None:
        nonlocal done_bytes
        with lock:
            done_bytes += count_bytes

    def report() -> None:
        said_bytes, said_at = 0, time.monotonic()
        while not over.wait(report_s):
            now_bytes, now = done_bytes, time.monotonic()
            rate = max(0, round((now_bytes - said_bytes) / (now - said_at)))
            console.say(f"{doing}: {size(now_bytes)} of {size(total_bytes)}, {size(rate)}/s")
            said_bytes, said_at = now_bytes, now

    reporter = Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield advance
    finally:
        over.set()
        reporter.join()
