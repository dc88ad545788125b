"""How a worker is told to stop: by a signal, or from another thread."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import suppress


def from_elsewhere(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> Callable[[], None]:
    """A function that has `loop` do `what`, for other threads and signal handlers; also once it is closed."""

    def do() -> None:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(what)

    return do


def on_signal(what: Callable[[], object]) -> None:
    """Do `what` on SIGTERM and on SIGINT."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: what())
