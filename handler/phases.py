"""Where the time of a cold start goes: named spans from `exec` to the first token.

All times are seconds on the monotonic clock; zero is the moment the process started. Beside
its wall time each span has the CPU seconds and the major page faults of the process: a phase
whose CPU seconds are far below its wall time waited, for the disk if there were faults.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """One phase: `begin_s` and `end_s` count from the start of the process."""

    name: str
    begin_s: float
    end_s: float
    cpu_s: float = field(default=0.0, compare=False)
    major_faults: int = field(default=0, compare=False)

    def report(self) -> dict[str, Any]:
        """This span as JSON; times to the millisecond."""
        return {
            "name": self.name,
            "begin_s": round(self.begin_s, 3),
            "end_s": round(self.end_s, 3),
            "cpu_s": round(self.cpu_s, 3),
            "major_faults": self.major_faults,
        }


def usage() -> tuple[float, int]:
    """CPU seconds and major page faults of this process so far, all threads together."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, used.ru_majflt


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
        meter: Callable[[], tuple[float, int]] = usage,
        listen: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._started_s = started_s
        self._clock = clock
        self._meter = meter
        self.listen = listen
        self.spans: list[Span] = []
        self.total_s: float | None = None
        self.facts: dict[str, Any] = {}
        """What else a reader wants to know of the start: bytes read, modes chosen and why."""

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure the block as the phase `name`; a block that raises is measured too."""
        end = self.begin(name)
        try:
            yield
        finally:
            end()

    def begin(self, name: str) -> Callable[[], Span]:
        """Begin the phase `name`. Returns a function that ends it and gives its span."""
        self.listen(name)
        began_s, (cpu_s, faults) = self._now_s(), self._meter()

        def end() -> Span:
            cpu_after_s, faults_after = self._meter()
            span = Span(name, began_s, self._now_s(), cpu_after_s - cpu_s, faults_after - faults)
            self.spans.append(span)
            return span

        return end

    def until_now(self, name: str) -> None:
        """Count the time since the start of the process as the phase `name`."""
        self.spans.append(Span(name, 0.0, self._now_s(), *self._meter()))

    def inherit(self, parent: Phases) -> None:
        """Take over the phases of the process that this one was forked from, as far as it waited for them."""
        shift_s = parent._started_s - self._started_s
        for span in parent.spans:
            begin_s, end_s = max(0.0, span.begin_s + shift_s), span.end_s + shift_s
            if end_s > 0:
                self.spans.append(replace(span, begin_s=begin_s, end_s=end_s))

    def wall_s(self, name: str) -> float | None:
        """How long the phase `name` took; None if it was not there or took no time."""
        return next((s.end_s - s.begin_s for s in self.spans if s.name == name), None) or None

    def done(self) -> None:
        """The first token was made: the cold start is over."""
        self.total_s = self._now_s()

    def report(self) -> dict[str, Any]:
        """`{"total_s", "facts": {...}, "phases": [{"name", "begin_s", "end_s", "cpu_s", "major_faults"}]}`.

        Phases stand in the order in which they began, an outer one before those inside it.
        """
        spans = sorted(self.spans, key=lambda span: (span.begin_s, -span.end_s))
        return {
            "total_s": None if self.total_s is None else round(self.total_s, 3),
            "facts": self.facts,
            "phases": [span.report() for span in spans],
        }

    def _now_s(self) -> float:
        return self._clock() - self._started_s


def own_s(report: Mapping[str, Any]) -> dict[str, float]:
    """What each phase of a report took less those inside it, in seconds; `other` is what no phase covers.

    At each moment it is the phase that began last that takes the time, so all together are `total_s`.
    """
    phases = report.get("phases") or ()
    total_s = report.get("total_s") or max((phase["end_s"] for phase in phases), default=0.0)
    bounds = {0.0, total_s, *(phase[end] for phase in phases for end in ("begin_s", "end_s"))}
    ordered = sorted(at_s for at_s in bounds if 0 <= at_s <= total_s)
    spent: dict[str, float] = {}
    for begin_s, end_s in pairwise(ordered):
        running = [phase for phase in phases if phase["begin_s"] <= begin_s and phase["end_s"] >= end_s]
        inner = max(running, key=lambda phase: (phase["begin_s"], -phase["end_s"]), default={"name": "other"})
        spent[inner["name"]] = spent.get(inner["name"], 0.0) + end_s - begin_s
    return spent


def process_started_s() -> float:
    """When this process was started, on the monotonic clock; Linux knows it to 10 ms.

    Source: field 22 of /proc/self/stat (proc(5)), in clock ticks since boot.
    """
    stat = Path("/proc/self/stat").read_text()
    ticks = int(stat.rpartition(")")[2].split()[19])  # the fields after the command's name start at 3
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age_s
