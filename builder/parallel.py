"""The same work for many things, some at a time, ended by the first that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Event
from typing import TypeVar

WORKERS = 8
"""One connection to an object store carries about a tenth of what a fast network does."""

Thing = TypeVar("Thing")
Result = TypeVar("Result")


class Stopped(Exception):
    """Other work has failed, so that this is for nothing."""


class Stop:
    """Tells work that goes on for long that it is for nothing."""

    def __init__(self) -> None:
        self._event = Event()

    def check(self, wait_s: float = 0.0) -> None:
        """Wait, and raise `Stopped` as soon as other work has failed."""
        if self._event.wait(wait_s) if wait_s else self._event.is_set():
            raise Stopped

    def all(self, work: Callable[[Thing], Result], things: Iterable[Thing]) -> list[Result]:
        """Do `work` with each of `things`; returns what came of it, in no order, or raises what failed."""
        with ThreadPoolExecutor(WORKERS) as pool:
            futures = [pool.submit(work, thing) for thing in things]
            try:
                return [future.result() for future in as_completed(futures)]
            except BaseException:
                self._event.set()
                pool.shutdown(cancel_futures=True)
                raise
