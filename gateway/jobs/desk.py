"""The attempts at jobs that run in this process, and who waits for news of a job."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from gateway.jobs.attempt import Attempt
from gateway.jobs.table import Job


class Desk:
    """Knows which attempt runs for a job, and wakes who waits for the job to begin or to end."""

    def __init__(self) -> None:
        self._attempts: dict[str, Attempt] = {}
        self._told: dict[str, int] = {}
        self._waiters: dict[str, set[asyncio.Event]] = {}

    def attempt(self, job_id: str) -> Attempt | None:
        """The attempt that runs for the job; None if none runs here."""
        return self._attempts.get(job_id)

    @property
    def attempts(self) -> list[Attempt]:
        """All attempts that run here."""
        return list(self._attempts.values())

    def attempts_at(self, endpoint_id: str) -> list[Attempt]:
        """The attempts that run for jobs of the endpoint."""
        return [attempt for attempt in self._attempts.values() if attempt.job.endpoint_id == endpoint_id]

    def begun(self, attempt: Attempt) -> None:
        """Add `attempt`, which runs from now on."""
        self._attempts[attempt.job.id] = attempt
        self._told.pop(attempt.job.id, None)
        self.news(attempt.job.id)

    def over(self, attempt: Attempt) -> None:
        """Remove `attempt`, whose outcome is in the database."""
        job_id = attempt.job.id
        if self._attempts.get(job_id) is attempt:  # else the job was claimed again already
            del self._attempts[job_id]
            if attempt.outputs.told and not attempt.stopped:  # else there is no output, or no job any more
                self._told[job_id] = attempt.outputs.told
        attempt.outputs.over()
        self.news(job_id)

    def told(self, job_id: str) -> int:
        """How many outputs of a job that has ended `/stream` has given out."""
        return self._told.get(job_id, 0)

    def tell(self, job_id: str, outputs: int) -> None:
        """Count `outputs` more that `/stream` gives out."""
        self._told[job_id] = self.told(job_id) + outputs

    def forget(self, jobs: Iterable[Job]) -> None:
        """Drop what is known of `jobs`, which are no longer kept."""
        for job in jobs:
            self._told.pop(job.id, None)

    def news(self, job_id: str) -> None:
        """Wake who waits for the job: it has begun, or ended."""
        for waiter in self._waiters.get(job_id, ()):
            waiter.set()

    def news_of_all(self) -> None:
        """Wake who waits for any job."""
        for job_id in self._waiters:
            self.news(job_id)

    @contextmanager
    def listening(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set by news of the job, for as long as the block runs."""
        heard = asyncio.Event()
        waiters = self._waiters.setdefault(job_id, set())
        waiters.add(heard)
        try:
            yield heard
        finally:
            waiters.discard(heard)
            if not waiters:
                self._waiters.pop(job_id, None)
