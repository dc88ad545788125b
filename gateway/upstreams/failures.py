"""What goes wrong with a pool's workers, and how long it starts none for that.

Times (`now_s`) are monotonic seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from gateway.upstreams.events import StartFailed
from gateway.upstreams.process import PERMANENT, Exit

BACK_OFF_MAX_S = 60.0
TRIES = 5
"""After so many failures in a row, only a request has another worker started."""


def back_off_s(failures: int) -> float:
    """How long to wait after the `failures`th failure in a row: 1, 2, 4, ... 60."""
    return min(BACK_OFF_MAX_S, 2.0 ** (failures - 1))


class Failures:
    """The failures in a row of one pool, with waits between them as `back_off` says."""

    def __init__(self, back_off: Callable[[int], float] = back_off_s) -> None:
        self._back_off = back_off
        self._again_at_s = 0.0
        self._permanent = False
        """The last start has failed as the next one will, until a person changes something."""
        self._starts = 0
        """Starts that have failed, in a row."""
        self._fruitless = 0
        """Workers in a row that were ready and ended before they had answered anything."""
        self.last: StartFailed | None = None
        """The failure that whoever waits for a worker is refused with, while the pool rests."""

    @property
    def given_up(self) -> bool:
        """Whether only a request has another worker started."""
        return self._permanent or max(self._starts, self._fruitless) >= TRIES

    def rest_s(self, now_s: float) -> float:
        """How long none is started; 0 or less if one may be."""
        return self._again_at_s - now_s

    def look_in_s(self, now_s: float) -> float:
        """How long until `forget` has something to do; infinite if nothing has failed."""
        return math.inf if self.last is None else self.rest_s(now_s)

    def forget(self, now_s: float) -> bool:
        """Forget a failure whose rest is over. True if there was one: nobody is refused with it any more."""
        if self.last is None or self.rest_s(now_s) > 0:
            return False
        self.last = None
        return True

    def opened(self) -> None:
        """A worker is ready."""
        self._starts = 0
        self._permanent = False
        self.last = None

    def postpone(self, now_s: float, for_s: float) -> None:
        """Start none for so long, though nothing has failed."""
        self._again_at_s = now_s + for_s

    def start_failed(
        self, worker_id: str, end: Exit, now_s: float, *, permanent: bool = False
    ) -> StartFailed:
        """A start has come to `end`; `permanent` if the next one would too, whatever its exit code."""
        self._permanent = permanent or end.code in PERMANENT
        self._starts += 1
        wait_s = self._back_off(self._starts)
        return self._rest(StartFailed(worker_id, end.reason, end.code, self._permanent, wait_s), now_s)

    def died(self, worker_id: str, reason: str, now_s: float, *, answered: bool) -> StartFailed | None:
        """A worker that was ready has ended untold; a failure if too many have that had `answered` nothing.

        The first is replaced at once, and the request that it had asked again.
        """
        self._fruitless = 0 if answered else self._fruitless + 1
        if self._fruitless < 2:
            return None
        wait_s = self._back_off(self._fruitless - 1)
        if self._fruitless < TRIES:
            self.postpone(now_s, wait_s)
            return None
        why = f"{self._fruitless} in a row ended before they had answered anything: {reason}"
        return self._rest(StartFailed(worker_id, why, 70, permanent=False, again_in_s=wait_s), now_s)

    def _rest(self, failure: StartFailed, now_s: float) -> StartFailed:
        self.postpone(now_s, failure.again_in_s)
        self.last = failure
        return failure
