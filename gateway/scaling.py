"""How many workers an endpoint should have: a policy without a clock, a socket or a process of its own.

It is told what is there, and the time, and says how many workers there should be and when the answer may
change though nothing happens. A simulation can ask it as the gateway does.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

PATIENCE = 0.5
"""The share of a cold start that work may wait before another worker is started for it."""
PATIENCE_MIN_S = 0.5
IDLE_COLD_STARTS = 5.0
IDLE_MIN_S = 60.0
"""See docs/gateway.md, Scaling, for why."""
TICK_S = 0.001
"""Nothing is looked at again sooner, whatever rounding says."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """An endpoint's bounds. `idle_timeout_s` None: as long as the last cold start says (`idle_after_s`)."""

    min_workers: int = 0
    max_workers: int = 1
    idle_timeout_s: float | None = None

    def idle_after_s(self, cold_start_s: float) -> float:
        """How long what is there must have been more than enough before any of it goes."""
        if self.idle_timeout_s is not None:
            return self.idle_timeout_s
        return max(IDLE_MIN_S, IDLE_COLD_STARTS * cold_start_s)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the policy is told of an endpoint. Workers that retire do not count, nor do their requests."""

    waiting: int
    """Requests that no worker has."""
    oldest_wait_s: float
    in_flight: int
    """Requests that workers have."""
    ready: int
    starting: int
    capacity: int
    """How many requests the ready workers work on at once, in all."""
    slots: int
    """The same of one worker: told by the last, a guess before."""
    cold_start_s: float
    newest_s: float = math.inf
    """How long the newest of the ready workers has been ready."""
    asked_for: int = 0
    """Workers that are wanted whatever waits: the first of START=now."""
    given_up: bool = False
    """Starts have failed again and again: only a request has another one made."""
    pressed: bool = False
    """Another endpoint waits for the devices."""


@dataclass(frozen=True, slots=True)
class Decision:
    """`workers`, ready and starting together; asked `again_in_s` the answer may be another one."""

    workers: int
    again_in_s: float | None = None


class Scaler:
    """Decides for one endpoint. Ask it whenever something has changed, and when it said to.

    Up: from none with the first request; beyond that when something has waited for `PATIENCE` of a cold
    start, by as many as what waits fills, less those that are on their way. Down: to what the highest load
    of the last idle timeout would have needed, never while a worker starts or a request waits. A
    load that comes and goes within the timeout so starts and stops nothing.
    """

    def __init__(self, scaling: Scaling) -> None:
        self.scaling = scaling
        self._peak = _Peak()

    def decide(self, now_s: float, seen: Seen) -> Decision:
        """How many workers there should be at `now_s`, which never goes back."""
        scaling = self.scaling
        load = seen.in_flight + seen.waiting
        window_s = scaling.idle_after_s(seen.cold_start_s)
        if seen.pressed:
            window_s = min(window_s, seen.cold_start_s)
        peak, lower_at_s = self._peak.of(now_s, load, window_s)
        alive = seen.ready + seen.starting
        floor = 0 if seen.given_up else max(scaling.min_workers, seen.asked_for)
        low, high = min(floor, scaling.max_workers), scaling.max_workers

        wanted, again_at_s = alive, math.inf
        if seen.waiting:
            beyond = load - seen.capacity - seen.starting * seen.slots
            patience_s = max(PATIENCE_MIN_S, PATIENCE * seen.cold_start_s)
            if not alive:
                wanted = 1
            elif beyond > 0 and seen.oldest_wait_s >= patience_s:
                wanted = alive + math.ceil(beyond / seen.slots)
            elif beyond > 0:
                again_at_s = now_s + patience_s - seen.oldest_wait_s
        elif not seen.starting:
            needed = math.ceil(peak / seen.slots)
            steady_at_s = now_s - seen.newest_s + window_s  # what has just come is given its time
            if needed >= alive:
                again_at_s = max(lower_at_s, steady_at_s)
            elif now_s >= steady_at_s:
                wanted, again_at_s = needed, lower_at_s
            else:
                again_at_s = steady_at_s
        workers = min(max(wanted, low), high)
        return Decision(workers, None if again_at_s == math.inf else max(TICK_S, again_at_s - now_s))


@dataclass(slots=True)
class _Peak:
    """The highest level within a window that ends now."""

    _level: int = 0
    _since_before: deque[tuple[float, int]] = field(default_factory=deque)
    """Levels that were given up for another at that time, the highest first."""

    def of(self, now_s: float, level: int, window_s: float) -> tuple[int, float]:
        """The peak, with `level` from `now_s` on, and when it may become lower (never: infinity)."""
        past = self._since_before
        if level != self._level:
            while past and past[-1][1] <= self._level:
                past.pop()
            past.append((now_s, self._level))
            self._level = level
        while past and (past[0][0] + window_s <= now_s or past[0][1] <= level):
            past.popleft()
        return (past[0][1], past[0][0] + window_s) if past else (level, math.inf)
