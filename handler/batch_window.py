"""The lines of a batch that are in work: many at a time, their outcomes in the order of the file.

Lines begin in order and end in any. What has ended without a gap makes a part, one after the other; what
ends behind a gap waits for it. All that is held is bounded in bytes, not in lines: a line that takes long
keeps no others from being worked on, until what waits for it is `held_bytes`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from handler.batch_lines import OVERHEAD_BYTES, Item, Outcome, Progress, refused
from handler.errors import DeadlineExceeded, RequestError

TIMED_OUT = "request_timeout"
"""OpenAI's code for a line whose answer took too long."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How much is in work at a time, and how often it is written down.

    A part is written as soon as it has `part_lines`, `part_bytes` or is `part_s` old: what a killed worker
    loses is at most that, and what runs.
    """

    most: int
    part_lines: int = 200
    part_bytes: int = 4 << 20
    part_s: float = 30.0
    held_bytes: int = 32 << 20
    ahead_bytes: int = 8 << 20
    """How much is read before there is room for it."""


@dataclass(slots=True)
class Part:
    """Outcomes without a gap, from byte `start` of the file on; `progress` is how far the batch is then."""

    start: int
    progress: Progress
    outputs: list[bytes] = field(default_factory=list)
    errors: list[bytes] = field(default_factory=list)
    size_bytes: int = 0
    since_s: float = 0.0

    @property
    def lines(self) -> int:
        """How many there are."""
        return len(self.outputs) + len(self.errors)

    def add(self, item: Item, outcome: Outcome) -> None:
        """Take what is next."""
        self.progress = self.progress.after(item.line, outcome)
        (self.outputs if outcome.good else self.errors).append(outcome.raw)
        self.size_bytes += len(outcome.raw)


@dataclass(slots=True)
class _Held:
    item: Item
    size_bytes: int
    task: asyncio.Future[Outcome] | None = None
    outcome: Outcome | None = None

    def end(self, outcome: Outcome) -> int:
        """Keep `outcome` in place of the request; returns by how many bytes that is more."""
        self.task, self.outcome = None, outcome
        self.item = replace(self.item, request=None)
        before, self.size_bytes = self.size_bytes, OVERHEAD_BYTES + len(outcome.raw)
        return self.size_bytes - before


class Window:
    """Works lines off, from `progress` on, once.

    `read` gives the next lines of the file, none at its end; `ask` what came of one; `write` writes a part
    down, and is called for the next once it has. What they raise ends the work.
    """

    def __init__(
        self,
        progress: Progress,
        read: Callable[[], Awaitable[Sequence[Item]]],
        ask: Callable[[Item], Awaitable[Outcome]],
        write: Callable[[Part], Awaitable[None]],
        pace: Pace,
    ) -> None:
        self._read, self._ask, self._write = read, ask, write
        self._pace = pace
        self._part = Part(progress.start, progress)
        self._coming: deque[Item] = deque()
        self._coming_bytes = 0
        self._held: deque[_Held] = deque()
        self._held_bytes = 0
        self._running: set[asyncio.Future[Any]] = set()
        self._reading: asyncio.Future[Sequence[Item]] | None = None
        self._writing: asyncio.Future[None] | None = None
        self._news = asyncio.Event()
        self._failure: BaseException | None = None
        self._at_end = False
        self._refusal: RequestError | None = None
        self._until_s: float | None = None
        self._flushes = False
        self._head_is_late = False
        self.written = 0
        """How many parts were written."""

    def allow(self, most: int) -> None:
        """Have so many lines in work at a time from now on."""
        if most != self._pace.most:
            self._pace = replace(self._pace, most=most)
            self._news.set()

    def refuse(self, why: RequestError) -> None:
        """Ask no more lines: cancel those that run, and give the rest of the file the error `why`."""
        self._refusal = why
        for held in self._held:
            if held.outcome is None:
                self._give_up(held, why)
        self._news.set()

    def stop(self, grace_s: float, *, head_is_late: bool = False) -> None:
        """Begin no more lines, and cancel what still runs after `grace_s`: the next shift asks it again.

        `head_is_late`: if this shift could write nothing, the first line, which all others wait for, gets an
        error for taking too long. Otherwise it would hold up every shift.
        """
        self._until_s = asyncio.get_running_loop().time() + grace_s
        self._flushes = True
        self._head_is_late = head_is_late
        self._news.set()

    async def run(self) -> bool:
        """Ask the lines. True at the end of the file; False after `stop`, once what was running has ended."""
        try:
            while True:
                if self._failure is not None:
                    raise self._failure
                self._take()
                self._begin()
                self._collect()
                self._read_on()
                if self._is_over and self._head_is_late:
                    self._end_head()
                self._write_out()
                if self._writing is None and not self._part.lines:
                    if self._has_all:
                        return True
                    if self._is_over:
                        return False
                await self._wait()
        finally:
            left: list[asyncio.Future[Any]] = [*self._running]
            left += [work for work in (self._reading, self._writing) if work is not None]
            for work in left:
                work.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    # --- steps ---------------------------------------------------------------------------------

    def _take(self) -> None:
        if self._reading is not None and self._reading.done():
            items, self._reading = self._reading.result(), None
            self._at_end = not items
            self._coming.extend(items)
            self._coming_bytes += sum(item.size_bytes for item in items)

    def _read_on(self) -> None:
        if self._reading is not None or self._at_end or self._until_s is not None:
            return
        few = len(self._coming) < self._pace.most and self._coming_bytes < self._pace.ahead_bytes
        if few or not self._coming:
            self._reading = asyncio.ensure_future(self._read())
            self._reading.add_done_callback(lambda _: self._news.set())

    def _begin(self) -> None:
        while self._coming and self._until_s is None:
            item = self._coming[0]
            fault = item.fault or self._refusal
            if self._held and self._held_bytes + item.size_bytes > self._pace.held_bytes:
                return
            if fault is None and len(self._running) >= self._pace.most:
                return
            self._coming.popleft()
            self._coming_bytes -= item.size_bytes
            self._held_bytes += item.size_bytes
            held = _Held(item, item.size_bytes)
            self._held.append(held)
            if fault is not None:
                self._give_up(held, fault)
                continue
            held.task = asyncio.ensure_future(self._ask(item))
            self._running.add(held.task)
            held.task.add_done_callback(partial(self._ended, held))

    def _ended(self, held: _Held, task: asyncio.Future[Outcome]) -> None:
        self._running.discard(task)
        self._news.set()
        if task.cancelled() or held.outcome is not None:
            return
        if error := task.exception():
            self._failure = self._failure or error
        else:
            self._held_bytes += held.end(task.result())

    def _give_up(self, held: _Held, why: RequestError) -> None:
        if held.task is not None:
            held.task.cancel()
            self._running.discard(held.task)
        self._held_bytes += held.end(refused(held.item, why))

    def _collect(self) -> None:
        """Move what has ended without a gap to the part."""
        while self._held and self._part.size_bytes < self._pace.part_bytes:
            held = self._held[0]
            if held.outcome is None:
                return
            if not self._part.lines:
                self._part.since_s = asyncio.get_running_loop().time()
            self._part.add(held.item, held.outcome)
            self._held.popleft()
            self._held_bytes -= held.size_bytes
            if self._coming:
                self._news.set()  # there may be room again

    def _end_head(self) -> None:
        nothing = not self.written and self._writing is None and not self._part.lines
        if nothing and self._held and self._held[0].outcome is None:
            why = "The answer was not complete within the time of a worker."
            self._give_up(self._held[0], DeadlineExceeded(why, code=TIMED_OUT))
            self._collect()

    def _write_out(self) -> None:
        if self._writing is not None and self._writing.done():
            self._writing.result()
            self._writing = None
            self.written += 1
        if self._writing is None and self._part.lines and self._is_due:
            part, self._part = self._part, Part(self._part.progress.start, self._part.progress)
            self._flushes = False
            self._writing = asyncio.ensure_future(self._write(part))
            self._writing.add_done_callback(lambda _: self._news.set())

    async def _wait(self) -> None:
        """Return once something has changed, or a time has come."""
        times = []
        if self._part.lines and self._writing is None:
            times.append(self._part.since_s + self._pace.part_s)
        if self._until_s is not None and self._running:
            times.append(self._until_s)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(min(times, default=None)):
                await self._news.wait()
        self._news.clear()

    # --- states --------------------------------------------------------------------------------

    @property
    def _has_all(self) -> bool:
        """Whether no line is left to begin or to wait for."""
        return self._at_end and not self._coming and not self._held

    @property
    def _is_over(self) -> bool:
        """Whether nothing is waited for any more, after a stop."""
        if self._until_s is None:
            return False
        return not self._running or asyncio.get_running_loop().time() >= self._until_s

    @property
    def _is_due(self) -> bool:
        """Whether the part, which has lines, is to be written."""
        pace, part = self._pace, self._part
        full = part.lines >= pace.part_lines or part.size_bytes >= pace.part_bytes
        old = asyncio.get_running_loop().time() >= part.since_s + pace.part_s
        return full or old or self._flushes or self._is_over or self._has_all
