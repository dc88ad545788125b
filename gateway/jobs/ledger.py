"""Each step of a job's life as one transaction, with all that belongs to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from sqlalchemy import ColumnElement, Connection

from gateway.jobs import claims, status, table, webhooks
from gateway.jobs.table import Ending, Job, NewJob, State
from gateway.store import Store
from handler.errors import KeyReused, RateLimited
from handler.usage import Usage

QUEUED_MAX_BYTES = 4 << 30
"""What the inputs of an endpoint's jobs that wait may take on disk together."""
FULL_RETRY_AFTER_S = 10.0


class Costs(Protocol):
    """Hears what each attempt at a job has used, once."""

    def count(self, connection: Connection, job: Job, used: Usage) -> None:
        """Write it down, in the transaction that ends the job."""

    def spend(self, job: Job, used: Usage) -> None:
        """Take it from the key's limits. Called on the loop, once that transaction is committed."""


class Free:
    """Costs that are counted nowhere."""

    def count(self, connection: Connection, job: Job, used: Usage) -> None:
        """Nothing."""

    def spend(self, job: Job, used: Usage) -> None:
        """Nothing."""


class Ledger:
    """The store's jobs, for the gateway `instance`. What a runner says is written, however long that takes.

    `heard` are told, on the loop, of each job that has ended, once that is committed.
    """

    def __init__(
        self,
        store: Store,
        costs: Costs,
        *,
        limit: int,
        instance: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._costs = costs
        self._limit = limit
        self._instance = instance
        self._clock = clock
        self.heard: list[Callable[[Job], None]] = []

    @property
    def now(self) -> float:
        """Unix seconds."""
        return self._clock()

    async def repeated(self, new: NewJob) -> Job | None:
        """The job that was submitted with the idempotency key of `new`. Raises `KeyReused`."""
        if new.idempotency_key is None:
            return None
        return await self._store.write(lambda connection: self._repeated(connection, new))

    def _repeated(self, connection: Connection, new: NewJob) -> Job | None:
        if new.idempotency_key is None:
            return None
        known = table.find_repeated(connection, new, self._clock())
        if known is not None and known.digest != new.digest:
            raise KeyReused
        return known

    async def add(self, new: NewJob) -> tuple[Job, bool]:
        """Line `new` up; the job, and whether it is a new one.

        A second one with its idempotency key is the first again. Raises `KeyReused` if that one was another
        request, and `RateLimited` when too many wait.
        """

        def work(connection: Connection) -> tuple[Job, bool]:
            if known := self._repeated(connection, new):
                return known, False
            self._find_room(connection, new.endpoint_id, len(new.body))
            return table.add(connection, new, self._clock()), True

        return await self._store.write(work)

    def _find_room(self, connection: Connection, endpoint_id: str, size_bytes: int) -> None:
        jobs, taken_bytes = table.queued(connection, endpoint_id)
        if jobs >= self._limit or taken_bytes + size_bytes > QUEUED_MAX_BYTES:
            raise RateLimited(
                f"{jobs} jobs already wait at the endpoint.",
                retry_after_s=FULL_RETRY_AFTER_S,
                code="jobs_limit_reached",
            )

    async def find(self, job_id: str) -> Job | None:
        """The job `job_id`, unless its time is over."""
        return await self._store.read(lambda connection: table.find(connection, job_id, self._clock()))

    async def claim(
        self, endpoint_id: str, most: int, *, background: bool, after: str
    ) -> list[tuple[Job, bytes]]:
        """The endpoint's next jobs with their inputs, keys in turn behind the key `after`."""
        return await self._store.write(
            lambda connection: claims.claim(
                connection,
                endpoint_id,
                most,
                background=background,
                after=after,
                now=self._clock(),
                instance=self._instance,
            ),
            insist=True,
        )

    async def begin(self, job: Job) -> bool:
        """Mark the job IN_PROGRESS: a worker has it. False if the attempt is outdated."""
        return await self._store.write(
            lambda connection: claims.begin(connection, job, self._clock()), insist=True
        )

    async def end(self, job: Job, ending: Ending, usage: Usage | None) -> bool:
        """Write down how the attempt has ended, and what it used. False if the attempt is outdated."""

        def work(connection: Connection) -> list[Job]:
            ended = claims.end(connection, job, ending, self._clock())
            if ended is None:
                return []
            if usage is not None:
                self._costs.count(connection, job, usage)
            return self._tell_webhook(connection, ended, ending.output)

        done = self._tell(await self._store.write(work, insist=True))
        if done and usage is not None:
            self._costs.spend(job, usage)
        return bool(done)

    async def spend(self, job: Job, usage: Usage) -> None:
        """Write down what an attempt has used that was stopped."""
        await self._store.write(lambda connection: self._costs.count(connection, job, usage), insist=True)
        self._costs.spend(job, usage)

    async def give_back(self, job: Job) -> bool:
        """Put the job back at its old place: no worker worked on it. False if the attempt is outdated."""
        return await self._store.write(lambda connection: claims.give_back(connection, job), insist=True)

    async def lose(self, job: Job, why: str) -> bool:
        """The attempt's worker is lost: try again, or FAILED with `why`. False if the attempt is outdated."""

        def work(connection: Connection) -> tuple[bool, list[Job]]:
            lost = claims.lose(connection, job, why, self._clock())
            ended = lost is not None and lost.ended
            return lost is not None, self._tell_webhook(connection, lost) if lost and ended else []

        counted, ended = await self._store.write(work, insist=True)
        self._tell(ended)
        return counted

    async def cancel(
        self, where: ColumnElement[bool], states: Sequence[State], most: int, why: str | None
    ) -> list[Job]:
        """End up to `most` jobs for which `where` holds and that are in one of `states`; those that were."""

        def work(connection: Connection) -> list[Job]:
            ended = table.cancel(connection, where, states, most, self._clock(), why)
            for job in ended:
                self._tell_webhook(connection, job)
            return ended

        return self._tell(await self._store.write(work))

    async def retry(self, job: Job) -> Job | None:
        """Line `job` up again, if it FAILED or TIMED_OUT. Raises `RateLimited` when too many wait."""

        def work(connection: Connection) -> Job | None:
            self._find_room(connection, job.endpoint_id, 0)
            return table.retry(connection, job, self._clock())

        return await self._store.write(work)

    async def expire(self, most: int) -> list[Job]:
        """Forget up to `most` jobs whose time is over; those that were. Who waits for one hears TIMED_OUT."""

        def work(connection: Connection) -> tuple[list[Job], list[Job]]:
            now = self._clock()
            gone = table.expire(connection, now, most)
            late = [replace(job, state=State.TIMED_OUT, ended_at=now) for job in gone if not job.ended]
            for job in late:
                self._tell_webhook(connection, job)
            return gone, late

        gone, late = await self._store.write(work)
        self._tell(late)
        return gone

    async def adopt(self) -> None:
        """Take over what gateways that are gone have left."""

        def work(connection: Connection) -> list[Job]:
            failed = claims.adopt(connection, self._clock())
            for job in failed:
                self._tell_webhook(connection, job)
            return failed

        self._tell(await self._store.write(work))

    async def keep_until(self, job: Job, expires_at: float) -> None:
        """Forget `job` then, if that is sooner."""
        await self._store.write(partial(table.keep_until, job=job, expires_at=expires_at))

    def _tell_webhook(self, connection: Connection, job: Job, output: bytes | None = None) -> list[Job]:
        if job.webhook is not None:
            webhooks.add(connection, job.webhook, status.render(job, output), self._clock())
        return [job]

    def _tell(self, ended: Iterable[Job]) -> list[Job]:
        jobs = list(ended)
        for job in jobs:
            for heard in self.heard:
                heard(job)
        return jobs
