"""Where the time of a cold start goes: named spans from `exec` to the first token.

All times are seconds on the monotonic clock; zero is the moment the process started.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """One phase: `begin_s` and `end_s` count from the start of the process."""

    name: str
    begin_s: float
    end_s: float


class Phases:
    """The spans of one cold start, in the order in which they ended.

    `listen` is called with the name of each phase as it begins. Spans may nest or run in
    several threads; `total_s` is the time from the start of the process to `done()`.
    """

    def __init__(
        self,
        started_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        listen: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._started_s = started_s
        self._clock = clock
        self.listen = listen
        self.spans: list[Span] = []
        self.total_s: float | None = None

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure the block as the phase `name`; a block that raises is measured too."""
        self.listen(name)
        begin_s = self._now_s()
        try:
            yield
        finally:
            self.spans.append(Span(name, begin_s, self._now_s()))

    def until_now(self, name: str) -> None:
        """Count the time since the start of the process as the phase `name`."""
        self.spans.append(Span(name, 0.0, self._now_s()))

    def done(self) -> None:
        """The first token was made: the cold start is over."""
        self.total_s = self._now_s()

    def report(self) -> dict[str, Any]:
        """`{"total_s", "phases": [{"name", "begin_s", "end_s"}]}`, in milliseconds' precision."""
        return {
            "total_s": None if self.total_s is None else round(self.total_s, 3),
            "phases": [
                {"name": span.name, "begin_s": round(span.begin_s, 3), "end_s": round(span.end_s, 3)}
                for span in self.spans
            ],
        }

    def _now_s(self) -> float:
        return self._clock() - self._started_s


def process_started_s() -> float:
    """When this process was started, on the monotonic clock; Linux knows it to 10 ms.

    Source: field 22 of /proc/self/stat (proc(5)), in clock ticks since boot.
    """
    stat = Path("/proc/self/stat").read_text()
    ticks = int(stat.rpartition(")")[2].split()[19])  # the fields after the command's name start at 3
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age_s
