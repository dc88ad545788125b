"""Asks one endpoint for its jobs: as many at once as it works on, keys in turn."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from gateway.database import reason
from gateway.jobs.attempt import Attempt, Lost, Outcome, Refused
from gateway.jobs.desk import Desk
from gateway.jobs.ledger import Ledger
from gateway.jobs.table import Ending, Job, State
from handler import jobs
from handler.errors import NotAdmitted, RequestError
from handler.messages import Call

log = logging.getLogger(__name__)

AHEAD = 1
"""How many more are asked for than are worked on: one that waits tells the pool that a worker would help."""
PAUSE_MAX_S = 5.0
"""After a refusal. A worker that can't start says itself when it is worth another try."""
START_FAILURES_MAX = 3
"""So many starts in a row have failed: jobs hear why, and do not wait for the next one."""
WRITE_AGAIN_S = 1.0


class Asked(Protocol):
    """What a runner needs of an endpoint."""

    @property
    def ask(self) -> Call:
        """Answers a request whose key has been checked; raises `NotAdmitted` and `WorkerLost`."""

    @property
    def capacity(self) -> int:
        """How many requests its ready workers work on at once; 0 while there is none."""


class Runner:
    """Runs the jobs of one endpoint, which it looks up in `endpoints` each time: a reload may replace it.

    `desk` has the attempts that run. An attempt's place is free again only once its outcome is written down,
    however long the disk is full.
    """

    def __init__(
        self,
        endpoint_id: str,
        endpoints: Mapping[str, Asked],
        ledger: Ledger,
        desk: Desk,
    ) -> None:
        self._endpoint_id = endpoint_id
        self._endpoints = endpoints
        self._ledger = ledger
        self._desk = desk
        self._running = {False: 0, True: 0}
        self._last_key = {False: "", True: ""}
        self._start_failures = 0
        self._pause_s = 0.0
        self._news = asyncio.Event()
        self._works: set[asyncio.Task[None]] = set()
        self._closing = False
        self._loop = asyncio.create_task(self._take_turns())

    def wake(self) -> None:
        """There may be jobs, or room for more of them."""
        self._news.set()

    def stop_taking(self) -> None:
        """Begin no more; again does nothing, for what was claimed is being given back."""
        if not self._closing:
            self._closing = True
            self._loop.cancel()

    async def close(self, timeout_s: float) -> None:
        """Let what runs finish within `timeout_s`; the rest is for the next gateway."""
        self.stop_taking()
        await asyncio.wait({self._loop})
        if self._works:
            _, late = await asyncio.wait(self._works, timeout=timeout_s)
            for attempt in self._desk.attempts_at(self._endpoint_id):
                attempt.stop()
            if late:
                await asyncio.wait(late)

    async def _take_turns(self) -> None:
        while True:
            self._news.clear()
            for background in (False, True):
                try:
                    await self._fill(background=background)
                except SQLAlchemyError as error:
                    why = {"endpoint": self._endpoint_id, "reason": reason(error)}
                    log.warning("jobs can't be taken", extra=why)
                    self._pause_s = WRITE_AGAIN_S
                except Exception:  # the boundary of an endpoint's jobs: they must not stand still
                    log.exception("jobs can't be taken", extra={"endpoint": self._endpoint_id})
                    self._pause_s = WRITE_AGAIN_S
            if self._pause_s:
                pause_s, self._pause_s = self._pause_s, 0.0
                await asyncio.sleep(pause_s)
            else:
                await self._news.wait()

    async def _fill(self, *, background: bool) -> None:
        """Claim as many jobs as there is room for, and begin them."""
        endpoint = self._endpoints.get(self._endpoint_id)
        if endpoint is None or self._pause_s:
            return
        most = max(1, endpoint.capacity + (0 if background else AHEAD))
        room = most - self._running[background]
        if room <= 0:
            return
        claiming = asyncio.ensure_future(
            self._ledger.claim(
                self._endpoint_id, room, background=background, after=self._last_key[background]
            )
        )
        try:
            claimed = await asyncio.shield(claiming)
        except asyncio.CancelledError:
            for job, _ in await claiming:  # closing: nobody works on these
                await self._insist(lambda job=job: self._ledger.give_back(job))  # type: ignore[misc]
            raise
        for job, body in claimed:
            self._last_key[background] = job.key_id
            self._running[background] += 1
            work = asyncio.create_task(self._work(job, body, endpoint.ask))
            self._works.add(work)
            work.add_done_callback(self._works.discard)

    async def _work(self, job: Job, body: bytes, ask: Call) -> None:
        beginning: asyncio.Task[None] | None = None

        def began() -> None:
            nonlocal beginning
            self._start_failures = 0
            beginning = asyncio.create_task(self._begin(attempt))
            self.wake()  # there is more capacity than before, if it was a cold start

        attempt = Attempt(job, body, ask, began)
        self._desk.begun(attempt)
        try:
            outcome = await attempt.run()
            if beginning is not None:
                await beginning
            await self._settle(attempt, outcome)
        except Exception:  # the boundary of a job: its place must not be lost
            log.exception("job failed", extra={"job": job.id})
            fault = RequestError("The gateway had an internal error.", code="internal_error")
            ending = Ending(State.FAILED, error=_told(fault))
            await self._insist(lambda: self._ledger.end(job, ending, None))
        finally:
            self._desk.over(attempt)
            self._running[job.background] -= 1
            self.wake()

    async def _begin(self, attempt: Attempt) -> None:
        if not await self._insist(lambda: self._ledger.begin(attempt.job)):
            attempt.stop()  # it was cancelled before anybody knew of the attempt

    async def _settle(self, attempt: Attempt, outcome: Outcome) -> None:
        job, ledger, usage = attempt.job, self._ledger, attempt.usage
        if isinstance(outcome, Ending) and outcome.state is State.FAILED and self._closing:
            outcome = Refused(None)  # its worker was told to stop, as the gateway was
        if isinstance(outcome, Refused) and outcome.error is not None:
            outcome = self._refused(outcome.error)
        if isinstance(outcome, Ending):
            ending = outcome
            await self._insist(lambda: ledger.end(job, ending, usage))
        elif isinstance(outcome, Lost):
            why = _told(outcome.error)
            await self._insist(lambda: ledger.lose(job, why))
        else:
            again = await self._insist(lambda: ledger.give_back(job))
            if usage is not None and not again:  # it was cancelled: what was made by then is paid for
                cost = usage
                await self._insist(lambda: ledger.spend(job, cost))

    def _refused(self, error: RequestError) -> Outcome:
        """What becomes of a job that no worker took: it waits, or hears that no worker can start."""
        if not isinstance(error, NotAdmitted):
            return Refused(error)
        if error.code != "worker_start_failed":
            self._pause_s = min(_retry_after_s(error), PAUSE_MAX_S)
            return Refused(error)
        self._start_failures += 1
        if self._start_failures >= START_FAILURES_MAX:
            return Ending(State.FAILED, error=_told(error))
        self._pause_s = _retry_after_s(error)
        return Refused(error)

    async def _insist(self, write: Callable[[], Awaitable[bool | None]]) -> bool:
        """Write until it is written: a full disk delays jobs and loses none.

        What is not by the end, the next gateway finds as it was.
        """
        while True:
            try:
                return bool(await write())
            except SQLAlchemyError as error:
                why = {"endpoint": self._endpoint_id, "reason": reason(error)}
                log.warning("a job can't be written", extra=why)
                if self._closing:
                    return False
                await asyncio.sleep(WRITE_AGAIN_S)


def _told(error: RequestError) -> str:
    """`error` as a job's error says it."""
    return json.dumps(jobs.error_of(error))


def _retry_after_s(error: RequestError) -> float:
    return float(dict(error.headers).get("retry-after", "1"))
