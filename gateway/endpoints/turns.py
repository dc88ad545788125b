"""Who goes next: a queue that is fair between keys. Pure: no loop, no clock, nobody is told anything.

First in, first out within a key, one request of each key in turn. What is done in the background has a queue
of its own, which has a turn when nobody else waits, and one of `BACKGROUND_EVERY` when somebody does.
Decision 13 says why, and why whoever has most gives way when the queue is full.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

BACKGROUND_EVERY = 16
"""One turn of so many is the background's, however many others wait: slow, but never for ever."""


@dataclass(eq=False, slots=True)
class Turn:
    """The place of one request of `key`, which arrived at `arrived_s`, on whatever clock."""

    key: str
    size_bytes: int = 0
    background: bool = False
    arrived_s: float = 0.0


T = TypeVar("T", bound=Turn)


class Turns(Generic[T]):
    """At most `limit` requests of `limit_bytes` in all, and as many again in the background.

    However large it is, one may always wait where nobody else does. All that is done takes constant time,
    but for `add` when the queue is full, which looks at every key, and `put_back`.
    """

    def __init__(self, *, limit: int, limit_bytes: float = math.inf) -> None:
        self._front: _Band[T] = _Band(limit, limit_bytes)
        self._background: _Band[T] = _Band(limit, limit_bytes)
        self._passed = 0
        """How many have gone before the background since it had its last turn."""
        self._again: OrderedDict[T, None] = OrderedDict()
        self._all: OrderedDict[T, None] = OrderedDict()

    def rebound(self, limit: int) -> None:
        """Have room for `limit` from now on; whoever waits already stays."""
        for band in (self._front, self._background):
            band.limit = limit

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[T]:
        """All, in the order in which they came to wait."""
        return iter(self._all)

    def __contains__(self, turn: T) -> bool:
        return turn in self._all

    def add(self, turn: T) -> list[T]:
        """Line `turn` up. Returns those who lose their place for it: mostly none; `turn` itself, or others.

        In a full queue the newest requests of the key that has most give way, unless that left it with less
        than the key of `turn` would have.
        """
        band = self._band(turn)
        losers = [] if band.fits(turn) else band.outbid(turn)
        if turn in losers:
            return losers
        for loser in losers:
            self.remove(loser)
        band.append(turn)
        self._all[turn] = None
        return losers

    def put_back(self, turn: T) -> None:
        """Line a turn that was taken up again, before all others and beyond every bound."""
        self._again[turn] = None
        self._again = OrderedDict.fromkeys(sorted(self._again, key=lambda each: each.arrived_s))
        self._all[turn] = None

    def take(self) -> T | None:
        """Remove and return the next turn; None if nobody waits."""
        if not self._all:
            return None
        if self._again:
            turn, _ = self._again.popitem(last=False)
        elif self._background and (not self._front or self._passed == BACKGROUND_EVERY - 1):
            turn, self._passed = self._background.take(), 0
        else:
            turn = self._front.take()
            self._passed += bool(self._background)
        del self._all[turn]
        return turn

    def remove(self, turn: T) -> None:
        """Remove `turn`, wherever it stands."""
        del self._all[turn]
        if turn in self._again:
            del self._again[turn]
        else:
            self._band(turn).remove(turn)

    def _band(self, turn: T) -> _Band[T]:
        return self._background if turn.background else self._front


@dataclass(slots=True)
class _Line(Generic[T]):
    """What one key has waiting, the oldest first."""

    turns: OrderedDict[T, None] = field(default_factory=OrderedDict)
    size_bytes: int = 0


class _Band(Generic[T]):
    """The lines of those who wait in one band, that of the next key first."""

    def __init__(self, limit: int, limit_bytes: float) -> None:
        self.limit = limit
        self._limit_bytes = limit_bytes
        self._lines: OrderedDict[str, _Line[T]] = OrderedDict()
        self._count = 0
        self._size_bytes = 0

    def __bool__(self) -> bool:
        return self._count > 0

    def fits(self, turn: T) -> bool:
        return self._holds(self._count + 1, self._size_bytes + turn.size_bytes, self.limit)

    def append(self, turn: T) -> None:
        line = self._lines.setdefault(turn.key, _Line())  # a key that comes is the last to have a turn
        line.turns[turn] = None
        self._count_in(line, 1, turn.size_bytes)

    def take(self) -> T:
        key, line = next(iter(self._lines.items()))
        self._lines.move_to_end(key)
        turn = next(iter(line.turns))
        self.remove(turn)
        return turn

    def remove(self, turn: T) -> None:
        line = self._lines[turn.key]
        del line.turns[turn]
        self._count_in(line, -1, -turn.size_bytes)
        if not line.turns:
            del self._lines[turn.key]

    def outbid(self, turn: T) -> list[T]:
        """Who has to go in a full queue so that `turn` fits: `turn` itself if that would not be fair."""
        others = [line for key, line in self._lines.items() if key != turn.key]
        if not others:
            return [turn]
        own = self._lines.get(turn.key) or _Line()
        share = self._share(len(own.turns) + 1, own.size_bytes + turn.size_bytes)
        line = max(others, key=self._share_without_newest)
        limit = max(self.limit, self._count)  # it may have been higher
        going: list[T] = []
        left_bytes = line.size_bytes
        for newest in reversed(line.turns):
            left_bytes -= newest.size_bytes
            if self._share(len(line.turns) - len(going) - 1, left_bytes) < share:
                break
            going.append(newest)
            all_bytes = self._size_bytes - line.size_bytes + left_bytes + turn.size_bytes
            if self._holds(self._count - len(going) + 1, all_bytes, limit):
                return going
        return [turn]

    def _holds(self, count: int, size_bytes: int, limit: int) -> bool:
        return count <= limit and (count == 1 or size_bytes <= self._limit_bytes)

    def _share(self, count: int, size_bytes: int) -> float:
        """How much of the queue that is, by number or by bytes: whichever is scarcer."""
        return max(count / max(1, self.limit), size_bytes / self._limit_bytes)

    def _share_without_newest(self, line: _Line[T]) -> float:
        newest = next(reversed(line.turns))
        return self._share(len(line.turns) - 1, line.size_bytes - newest.size_bytes)

    def _count_in(self, line: _Line[T], count: int, size_bytes: int) -> None:
        self._count += count
        self._size_bytes += size_bytes
        line.size_bytes += size_bytes
