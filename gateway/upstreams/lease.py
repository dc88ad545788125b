"""What ties one worker to the control plane: its polls, and the stops that it has yet to hear."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from gateway.upstreams.waits import first

LEASE_S = 30.0
"""A worker that opens no poll for so long hangs: the SDK opens the next one within about a second."""
HOLD_S = 20.0
"""How long a poll waits for something to tell; the SDK gives up after 90 s."""
REPEATS_S = (0.15, 0.35, 0.5, 1.0)
"""When a stop is told again: the SDK ignores it for a job that it has taken and not begun."""


class Lease:
    """Held by the worker `worker_id` as long as it polls.

    `hung` is called when it has not polled for `lease_s`. Pings prove nothing: the SDK sends them from a
    process of their own, which outlives its worker.
    """

    def __init__(
        self,
        worker_id: str,
        hung: Callable[[], None],
        *,
        lease_s: float,
        hold_s: float,
        repeats_s: Sequence[float] = REPEATS_S,
    ) -> None:
        self.worker_id = worker_id
        self.paused = False
        """It gets no jobs, and polls on."""
        self.asking = 0
        """How many jobs it asks for by now."""
        self._hold_s = hold_s
        self._hung = hung
        self._lease_s = lease_s
        self._repeats_s = repeats_s
        self._loop = asyncio.get_running_loop()
        self.leaving: asyncio.Future[None] = self._loop.create_future()
        """Done when the worker takes no more."""
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._polls = 0
        self._expiry: asyncio.TimerHandle | None = None
        self._due: dict[str, int] = {}
        self._repeats: set[asyncio.TimerHandle] = set()
        self._news: asyncio.Future[None] = self._loop.create_future()

    def begin(self) -> None:
        """From now on it has to poll."""
        if self._expiry is None and not self._polls and not self.leaving.done():
            self._expiry = self._loop.call_later(self._lease_s, self._hung)

    def leave(self) -> None:
        """It takes no more, and need not poll: open polls are answered."""
        if not self.leaving.done():
            self.leaving.set_result(None)
        self._forget_expiry()

    def end(self) -> None:
        """It is gone."""
        self._ended.set_result(None)
        self.leave()
        self._due.clear()
        for timer in self._repeats:
            timer.cancel()

    def stop(self, job_id: str) -> None:
        """Have it told, at once and then a few times again, to stop `job_id`."""
        self._tell(job_id, 0)

    def _tell(self, job_id: str, times: int) -> None:
        if not self._ended.done():
            self._due[job_id] = times
            self._news.set_result(None)
            self._news = self._loop.create_future()

    async def stops(self) -> list[str]:
        """The jobs to stop, as soon as there are any; none after `hold_s`, or when it begins to leave."""
        self._polls += 1
        self._forget_expiry()
        try:
            deadline_s = self._loop.time() + self._hold_s
            ends = [self._ended]
            if not self.leaving.done():  # else it drains, maybe for long, and polls on
                ends.append(self.leaving)
            while not self._due and (left_s := deadline_s - self._loop.time()) > 0:
                if any(end.done() for end in ends):
                    break
                await first(self._news, *ends, timeout_s=left_s)
            due, self._due = self._due, {}
            for job_id, times in due.items():
                if times < len(self._repeats_s):
                    self._repeat(job_id, times)
            return list(due)
        finally:
            self._polls -= 1
            self.begin()

    def _repeat(self, job_id: str, times: int) -> None:
        def again() -> None:
            self._repeats.discard(timer)
            self._tell(job_id, times + 1)

        timer = self._loop.call_later(self._repeats_s[times], again)
        self._repeats.add(timer)

    def _forget_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
