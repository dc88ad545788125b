"""Every endpoint's jobs: submitted, asked for, waited for, stopped and forgotten."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from sqlalchemy import ColumnElement, Connection
from sqlalchemy.exc import SQLAlchemyError

from gateway.database import reason
from gateway.jobs import claims, table
from gateway.jobs.attempt import first
from gateway.jobs.desk import Desk
from gateway.jobs.ledger import Costs, Ledger
from gateway.jobs.runner import Asked, Runner
from gateway.jobs.table import JOBS, Job, NewJob, State
from gateway.jobs.webhooks import Webhooks
from gateway.store import Store
from handler.messages import as_json

log = logging.getLogger(__name__)

AT_ONCE = 64
"""How many jobs one transaction forgets or cancels: nobody else's write waits long for it."""
LOOK_S = 1.0
"""How late a job is forgotten at most, and what other gateways have done is heard of. Nobody is shown one
whose time is over."""

KEY_CLOSED = "The key of the job is valid no more."

_GOES_ON = {State.IN_QUEUE.shown, State.IN_PROGRESS.shown}


@dataclass(frozen=True, slots=True)
class Told:
    """What `/stream` tells of a job: outputs as JSON, each once in an attempt."""

    status: str
    attempt: int
    outputs: list[bytes]


class Jobs:
    """Used as `async with`: entering takes over what an earlier gateway has left, leaving ends what runs.

    `endpoints` are looked up by each job's `endpoint_id`, `costs` hears what attempts have used. The jobs of
    keys that are `closed` are cancelled. `instance` is this gateway's id; what others do that share the store
    is looked for.
    """

    def __init__(  # noqa: PLR0913 - what jobs need, each by name
        self,
        store: Store,
        endpoints: Mapping[str, Asked],
        *,
        costs: Costs,
        limit: int,
        closed: Callable[[], Sequence[str]] = tuple,
        webhooks: Webhooks | None = None,
        instance: str | None = None,
        drain_s: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.ledger = Ledger(store, costs, limit=limit, instance=instance, clock=clock)
        self._desk = Desk()
        self._store = store
        self._endpoints = endpoints
        self._closed = closed
        self._keys_changed = asyncio.Event()
        self._webhooks = webhooks
        self._drain_s = drain_s
        self._runners: dict[str, Runner] = {}
        self._sweep: asyncio.Task[None] | None = None
        self._closing = False
        self.ledger.heard.append(self._ended)

    async def __aenter__(self) -> Self:
        await self._cancel_closed()
        await self.adopt()
        self._sweep = asyncio.create_task(self._forget())
        if self._webhooks is not None:
            self._webhooks.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop_taking()
        await asyncio.gather(*(runner.close(self._drain_s) for runner in self._runners.values()))
        if self._sweep is not None:
            self._sweep.cancel()
            await asyncio.wait({self._sweep})
        if self._webhooks is not None:
            await self._webhooks.close()

    def stop_taking(self) -> None:
        """Begin no job any more; those that run may finish."""
        self._closing = True
        for runner in self._runners.values():
            runner.stop_taking()
        self._desk.news_of_all()

    def wake(self, endpoint_id: str) -> None:
        """Jobs wait at the endpoint, or it is there again."""
        if self._closing:
            return
        if endpoint_id not in self._runners:
            self._runners[endpoint_id] = Runner(endpoint_id, self._endpoints, self.ledger, self._desk)
        self._runners[endpoint_id].wake()

    def keys_changed(self) -> None:
        """A key may have been revoked."""
        self._keys_changed.set()

    async def adopt(self) -> None:
        """Take over what gateways that are gone have left."""
        await self.ledger.adopt()
        await self._wake_all()

    async def submit(self, new: NewJob, admit: Callable[[], None] = lambda: None) -> Job:
        """Line `new` up. One that comes again with its idempotency key is the first, and needs no `admit`.

        Raises what `admit` does, `RateLimited` when too many wait, and `KeyReused` for an idempotency key
        that came with another request before.
        """
        if known := await self.ledger.repeated(new):
            return known
        admit()
        job, added = await self.ledger.add(new)
        if added:
            self.wake(job.endpoint_id)
        return job

    async def find(self, job_id: str) -> Job | None:
        """The job `job_id`, unless its time is over."""
        return await self.ledger.find(job_id)

    async def output(self, job: Job) -> bytes | None:
        """The output of `job` as JSON; None if there is none."""
        return await self._store.read(lambda connection: table.output_of(connection, job))

    async def wait(self, job: Job, timeout_s: float) -> Job:
        """`job` once it has ended, or as it is after `timeout_s`, or when this gateway begins no more."""
        with self._desk.listening(job.id) as heard, suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while True:
                    heard.clear()
                    if (current := await self.ledger.find(job.id)) is None:
                        return job
                    job = current
                    if job.ended or (self._closing and self._desk.attempt(job.id) is None):
                        return job
                    await self._news(heard)
        return await self.ledger.find(job.id) or job

    async def stream(self, job: Job, hold_s: float) -> Told | None:
        """What `job` has said since this was last asked; waits up to `hold_s` for something.

        None once the job is no longer kept.
        """
        loop = asyncio.get_running_loop()
        until_s = loop.time() + hold_s
        with self._desk.listening(job.id) as heard:
            while True:
                heard.clear()
                attempt = self._desk.attempt(job.id)
                if attempt is not None:
                    outputs = attempt.outputs.take()
                    state = State.IN_PROGRESS if attempt.begun else State.IN_QUEUE
                    told = Told(state.shown, attempt.job.attempt, outputs)
                else:
                    current = await self.ledger.find(job.id)
                    if current is None:
                        return None
                    told = await self._told(current)
                if told.outputs or told.status not in _GOES_ON:
                    return told
                try:
                    async with asyncio.timeout_at(until_s):
                        await (self._news(heard) if attempt is None else attempt.outputs.news())
                except TimeoutError:
                    return told

    async def _told(self, job: Job) -> Told:
        """What is left to tell of `job`, on which nothing runs here."""
        if not job.ended:
            return Told(job.state.shown, job.attempt, [])
        after = self._desk.told(job.id)

        def work(connection: Connection) -> list[bytes]:
            output = table.output_of(connection, job)
            return first([as_json(one) for one in json.loads(output)[after:]]) if output else []

        outputs = await self._store.read(work)
        if self._desk.told(job.id) != after:  # somebody else has got these
            return await self._told(job)
        if outputs:
            self._desk.tell(job.id, len(outputs))
        return Told(job.state.shown, job.attempt, outputs)

    async def cancel(
        self, where: ColumnElement[bool], states: Sequence[State] = table.OPEN, why: str | None = None
    ) -> list[Job]:
        """End the jobs for which `where`, of `table.JOBS`, holds; those that were."""
        cancelled: list[Job] = []
        while True:
            some = await self.ledger.cancel(where, states, AT_ONCE, why)
            for job in some:
                self._stop(job)
            cancelled += some
            if len(some) < AT_ONCE:
                return cancelled

    async def retry(self, job: Job) -> Job | None:
        """Line `job` up again; None if it neither FAILED nor TIMED_OUT."""
        again = await self.ledger.retry(job)
        if again is not None:
            self.wake(again.endpoint_id)
        return again

    async def counts(self, endpoint_id: str) -> Mapping[str, int]:
        """How many jobs of the endpoint are kept, by their state as RunPod calls it."""
        return await self._store.read(lambda connection: table.counts(connection, endpoint_id))

    async def retried(self, endpoint_id: str) -> int:
        """How often its jobs that are kept were given to another worker."""
        return await self._store.read(lambda connection: table.retried(connection, endpoint_id))

    def _stop(self, job: Job) -> None:
        if attempt := self._desk.attempt(job.id):
            attempt.stop()

    def _ended(self, job: Job) -> None:
        self._desk.news(job.id)
        if self._webhooks is not None and job.webhook is not None:
            self._webhooks.wake()

    async def _wake_all(self) -> None:
        for endpoint_id in await self._store.read(table.endpoints_in_demand):
            self.wake(endpoint_id)

    async def _news(self, heard: asyncio.Event) -> None:
        """Wait for news of a job. Those of other gateways have to be looked for."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S if self._store.shared else None):
                await heard.wait()

    async def _look_around(self) -> None:
        """Ask for jobs that others have submitted, and stop what others have cancelled or taken over."""
        try:
            await self._wake_all()
            running = [attempt.job for attempt in self._desk.attempts]
            for job in await self._store.read(lambda connection: claims.outdated(connection, running)):
                self._stop(job)
        except SQLAlchemyError as error:
            log.warning("jobs can't be looked for", extra={"reason": reason(error)})

    async def _cancel_closed(self) -> None:
        """Cancel the jobs of keys that open nothing any more: they are to cost nobody anything."""
        self._keys_changed.clear()
        if not (closed := self._closed()):
            return
        if await self._store.read(lambda connection: table.any_open(connection, closed)):
            cancelled = await self.cancel(JOBS.c.key_id.in_(closed), why=KEY_CLOSED)
            log.info("jobs of keys that are valid no more are cancelled", extra={"jobs": len(cancelled)})

    async def _forget(self) -> None:
        """Forget jobs whose time is over, or that of their key, and stop those of them that run."""
        while True:
            gone: list[Job] = []
            try:
                due = await self._store.read(table.next_expiry)
                if due is not None and due <= self.ledger.now:
                    gone = await self.ledger.expire(AT_ONCE)
                await self._cancel_closed()
            except SQLAlchemyError as error:
                log.warning("jobs can't be forgotten or cancelled", extra={"reason": reason(error)})
            for job in gone:
                self._stop(job)
            self._desk.forget(gone)
            if len(gone) < AT_ONCE:
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._keys_changed.wait()
            if self._store.shared:
                await self._look_around()
