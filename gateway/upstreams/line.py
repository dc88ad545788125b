"""Jobs in order of arrival: each waits for a worker that takes it, then for what that says of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gateway.metrics import EndpointMetrics
from gateway.upstreams import WorkerLost
from gateway.upstreams.job import Job
from handler.errors import DeadlineExceeded, NotAdmitted, RequestError, UpstreamFailed, retry_after
from handler.messages import PATIENCE_S

RETRY_AFTER_S = 5
"""When a full line may have room again: a guess, for nobody knows how long answers get."""


class Line:
    """Holds `limit` new jobs at most, in the order in which their requests came.

    A request waits `queue_timeout_s` from its arrival, wherever it does. Once taken it has
    `execution_timeout_s`; but a client that hears nothing gives up when it has waited for about as long.
    """

    def __init__(
        self,
        metrics: EndpointMetrics,
        *,
        limit: int,
        queue_timeout_s: float,
        execution_timeout_s: float,
    ) -> None:
        self._metrics = metrics
        self._limit = limit
        self._queue_timeout_s = queue_timeout_s
        self._execution_timeout_s = execution_timeout_s
        self._queued: dict[str, Job] = {}
        self._handed: dict[str, Job] = {}
        self._loop = asyncio.get_running_loop()
        self.stop: Callable[[Job], object] = lambda _: None
        """Told each job that a worker works on for nobody."""
        self.tell_held: Callable[[str, int], object] = lambda _, __: None
        """Told of a worker, by its id, that it holds one job more (1) or less (-1)."""
        self.held: Counter[str] = Counter()
        """How many jobs each worker holds, by its id."""
        self.wanted = 0
        """How many jobs are asked for by now: those need not wait."""
        self.arrival: asyncio.Future[None] = self._loop.create_future()
        """Done once a job can be handed out, or to another worker; then there is another."""
        metrics.runpod_jobs_queued.set_function(lambda: self.queued)
        metrics.runpod_jobs_in_progress.set_function(lambda: self.in_progress)

    @property
    def queued(self) -> int:
        """How many jobs no worker has taken yet."""
        return len(self._queued)

    @property
    def in_progress(self) -> int:
        """How many jobs workers hold."""
        return len(self._handed)

    def add(self, job: Job) -> None:
        """Line `job` up. Raises `NotAdmitted` when the line is full and its request was never admitted."""
        if not job.visit.admitted and self.queued >= self._limit + self.wanted:
            raise NotAdmitted(f"{self.queued} requests already wait.", retry_after_s=RETRY_AFTER_S)
        job.since_s = self._loop.time()
        self._queue([job])

    def hand_out(self, worker_id: str, most: int) -> list[Job]:
        """The first jobs of the line, which are `worker_id`'s from now on."""
        taken = list(self._queued.values())[:most]
        for job in taken:
            del self._queued[job.id]
            job.worker_id = worker_id
            self._handed[job.id] = job
            self._count_held(worker_id, 1)
            now_s = self._loop.time()
            self._metrics.runpod_job_queued_s.observe(now_s - job.since_s)
            job.since_s = now_s
            self._set_timer(job, self._answer_by_s(job), self._expire)
        self._count("handed_out", len(taken))
        return taken

    def give_back(self, jobs: Iterable[Job]) -> None:
        """`jobs` were handed out and have not reached the worker: they have their old places again."""
        back = [job for job in jobs if self._forget(job)]
        for job in back:
            job.worker_id = None
        self._count("given_back", len(back))
        self._queue(back)

    def find(self, worker_id: str, job_id: str) -> Job | None:
        """The job `job_id` if `worker_id` holds it: whatever else a worker says is too late."""
        job = self._handed.get(job_id)
        return job if job is not None and job.worker_id == worker_id else None

    def put(self, job: Job, output: Any, size_bytes: int) -> None:
        """The worker that holds `job` has posted `output`."""
        if not job.begun:
            self._metrics.runpod_job_first_output_s.observe(self._loop.time() - job.since_s)
            self._set_timer(job, job.since_s + self._execution_timeout_s, self._expire)
        job.put(output, size_bytes)

    def close(self, job: Job) -> None:
        """The worker that held `job` is done with it."""
        self._forget(job)
        job.end()

    def leave(self, job: Job) -> None:
        """The client of `job` has gone. The worker stops, unless all that is missing is its last word."""
        if self._queued.pop(job.id, None):
            job.end()
        elif job.id in self._handed:
            if job.complete:
                job.release()
            else:
                self._drop(job)

    def lose(self, worker_id: str, how: str) -> None:
        """The worker `worker_id` holds nothing: what it held is asked of the next one, or has failed."""
        for job in [job for job in self._handed.values() if job.worker_id == worker_id]:
            self._forget(job)
            if job.begun:
                job.fail(UpstreamFailed(f"The worker {how} while it answered."))
            else:
                self._count("retried")
                worked_s = self._loop.time() - job.since_s
                job.fail(WorkerLost(f"The worker {how} before it answered.", worked_s=worked_s))

    def refuse(self, refusal: RequestError) -> None:
        """No worker comes for those in line."""
        refused, self._queued = self._queued, {}
        for job in refused.values():
            job.fail(refusal)

    def _queue(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        last = next(reversed(self._queued.values()), jobs[0])
        for job in jobs:
            self._queued[job.id] = job
            self._set_timer(job, job.visit.deadline_s(self._queue_timeout_s), self._give_up)
        if jobs[0].visit.arrived_s < last.visit.arrived_s:  # their worker was lost, or did not get them
            in_order = sorted(self._queued.values(), key=lambda job: job.visit.arrived_s)
            self._queued = {job.id: job for job in in_order}
        self.wake()

    def wake(self) -> None:
        """Whoever waits for a job looks again."""
        if self._queued:
            self.arrival.set_result(None)
            self.arrival = self._loop.create_future()

    def _forget(self, job: Job) -> bool:
        """Whether a worker held `job`, which none does any more."""
        if self._handed.pop(job.id, None) is None:
            return False
        self._count_held(job.worker_id or "", -1)
        return True

    def _count_held(self, worker_id: str, more: int) -> None:
        self.held[worker_id] += more
        if not self.held[worker_id]:
            del self.held[worker_id]
        self.tell_held(worker_id, more)

    def _answer_by_s(self, job: Job) -> float:
        """When its client or `execution_timeout_s` gives up on `job`, which is handed out."""
        by_s = job.since_s + self._execution_timeout_s
        if job.streamed and job.visit.kept_alive:
            return by_s
        return min(by_s, job.visit.arrived_s + max(self._execution_timeout_s, PATIENCE_S))

    def _set_timer(self, job: Job, at_s: float, then: Callable[[Job], None]) -> None:
        if job.timer is not None:
            job.timer.cancel()
        job.timer = self._loop.call_at(at_s, then, job)

    def _give_up(self, job: Job) -> None:
        del self._queued[job.id]
        job.fail(
            DeadlineExceeded(
                f"No worker took the request within {self._queue_timeout_s:g} s.",
                headers=retry_after(RETRY_AFTER_S),
            )
        )

    def _expire(self, job: Job) -> None:
        self._count("expired")
        late_s = self._loop.time() - job.since_s
        job.fail(DeadlineExceeded(f"The answer took longer than {late_s:.0f} s."))
        self._drop(job)

    def _drop(self, job: Job) -> None:
        self._forget(job)
        self._count("stopped")
        self.stop(job)
        job.end()

    def _count(self, what: str, number: int = 1) -> None:
        self._metrics.count_runpod_jobs(what, number)
