"""RunPod's limits: how often each operation may be asked for in ten seconds, and how many at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from handler.errors import RateLimited

WINDOW_S = 10.0


@dataclass(frozen=True, slots=True)
class Limit:
    """So many in `WINDOW_S`, and `at_once`."""

    in_window: int
    at_once: int


LIMITS: Mapping[str, Limit] = {
    "run": Limit(1000, 200),
    "runsync": Limit(2000, 400),
    "status": Limit(2000, 400),
    "stream": Limit(2000, 400),
    "cancel": Limit(100, 20),
    "retry": Limit(100, 20),
    "purge-queue": Limit(2, 2),
    "health": Limit(2000, 400),
}
"""https://docs.runpod.io/serverless/endpoints/send-requests; it says nothing of `retry` and `health`."""


@dataclass(slots=True)
class _Use:
    begun_s: deque[float] = field(default_factory=deque)
    running: int = 0


class Rates:
    """What each key asks for at each endpoint: nobody uses up another's share."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: dict[tuple[str, str, str], _Use] = {}

    @contextmanager
    def counted(self, operation: str, endpoint_id: str, caller: str) -> Iterator[None]:
        """One request, for as long as it is answered. Raises `RateLimited`."""
        limit = LIMITS[operation]
        use = self._uses.setdefault((operation, endpoint_id, caller), _Use())
        now_s = self._clock()
        while use.begun_s and use.begun_s[0] <= now_s - WINDOW_S:
            use.begun_s.popleft()
        if len(use.begun_s) >= limit.in_window:
            raise RateLimited(
                f"/{operation} was asked for {limit.in_window} times in {WINDOW_S:g} s, which is its limit.",
                retry_after_s=use.begun_s[0] + WINDOW_S - now_s,
            )
        if use.running >= limit.at_once:
            raise RateLimited(f"{use.running} requests for /{operation} are already held.", retry_after_s=1)
        use.begun_s.append(now_s)
        use.running += 1
        try:
            yield
        finally:
            use.running -= 1
