"""How many workers there should be, as others decide it, beside `gateway.scaling.Scaler`.

What others are like is cited in docs/scaling.md; each is reduced to the rule that decides.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from gateway.scaling import Decision, Scaler, Scaling, Seen


class Policy(Protocol):
    """What a simulation asks, at every event and when it was told to."""

    def decide(self, now_s: float, seen: Seen) -> Decision:
        """How many workers there should be at `now_s`."""
        ...


@dataclass(slots=True)
class Fixed:
    """So many, always."""

    workers: int

    def decide(self, now_s: float, seen: Seen) -> Decision:  # noqa: ARG002 - whatever is there
        """As it was said."""
        return Decision(self.workers)


@dataclass(slots=True)
class QueueDelay:
    """One more each time the oldest request has waited `delay_s` longer, from none at once; as RunPod's.

    Down to what the highest load of the last `idle_s` needed.
    """

    most: int
    delay_s: float = 4.0
    idle_s: float = 5.0
    _added_s: float = -math.inf
    _loads: deque[tuple[float, int]] = field(default_factory=deque)
    """Loads within `idle_s`, each greater than those after it."""

    def decide(self, now_s: float, seen: Seen) -> Decision:
        """More for who waits, less for who does not."""
        load = seen.in_flight + seen.waiting
        while self._loads and self._loads[-1][1] < load:
            self._loads.pop()
        if not self._loads or self._loads[-1][1] != load:
            self._loads.append((now_s, load))
        while len(self._loads) > 1 and self._loads[1][0] + self.idle_s <= now_s:
            self._loads.popleft()
        alive = seen.ready + seen.starting
        if not alive:
            return Decision(min(1, seen.waiting))
        if seen.waiting:
            due_s = max(now_s - min(seen.oldest_wait_s, self.delay_s), self._added_s) + self.delay_s
            if now_s >= due_s:
                self._added_s = now_s
                return Decision(min(alive + 1, self.most), self.delay_s)
            return Decision(alive, due_s - now_s)
        needed = math.ceil(self._loads[0][1] / seen.slots)
        return Decision(min(alive, max(needed, seen.starting)), self.idle_s)


@dataclass(slots=True)
class Concurrency:
    """As many as the mean of the last `window_s`, looked at every `tick_s`, needs at `target` each.

    As Knative and Ray Serve have it. Fewer only after `down_s` in which fewer would have done.
    """

    target: float
    most: int
    least: int = 0
    window_s: float = 60.0
    tick_s: float = 2.0
    down_s: float = 30.0
    _loads: deque[tuple[float, int]] = field(default_factory=deque)
    _next_s: float = 0.0
    _fewer_since_s: float = math.inf

    def decide(self, now_s: float, seen: Seen) -> Decision:
        """By the mean; from none at once."""
        alive = seen.ready + seen.starting
        if not alive and seen.waiting:
            return Decision(max(1, self.least), self.tick_s)
        if now_s < self._next_s:
            return Decision(max(alive, self.least), self._next_s - now_s)
        self._next_s = now_s + self.tick_s
        self._loads.append((now_s, seen.in_flight + seen.waiting))
        while self._loads[0][0] <= now_s - self.window_s:
            self._loads.popleft()
        mean = sum(load for _, load in self._loads) / len(self._loads)
        wanted = min(self.most, max(self.least, math.ceil(mean / self.target - 1e-9)))
        if wanted >= alive:
            self._fewer_since_s = math.inf
        else:
            self._fewer_since_s = min(self._fewer_since_s, now_s)
            if now_s - self._fewer_since_s < self.down_s:
                wanted = alive
        return Decision(wanted, self.tick_s)


def ranked(most: int, slots: int, mean_workers: int) -> Mapping[str, Callable[[], Policy]]:
    """The policies that are compared, each made anew for a run; `mean_workers` would do on average."""

    def ours(least: int, idle_s: float | None) -> Callable[[], Policy]:
        return lambda: Scaler(Scaling(least, most, idle_s))

    return {
        "ours, idle auto": ours(0, None),
        "ours, idle 5 s": ours(0, 5.0),
        "ours, idle 60 s": ours(0, 60.0),
        "ours, idle 600 s": ours(0, 600.0),
        "ours, idle auto, min 1": ours(1, None),
        f"fixed {mean_workers}": lambda: Fixed(mean_workers),
        f"fixed {most}": lambda: Fixed(most),
        "queue delay 4 s, idle 5 s (RunPod-like)": lambda: QueueDelay(most),
        "concurrency 70 %, 60 s (Knative-like)": lambda: Concurrency(0.7 * slots, most),
        "concurrency 70 %, down 600 s (Ray-like)": lambda: Concurrency(
            0.7 * slots, most, window_s=30.0, tick_s=10.0, down_s=600.0
        ),
    }
