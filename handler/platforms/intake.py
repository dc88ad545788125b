"""When RunPod's SDK takes jobs, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

log = logging.getLogger(__name__)

LOOK_S = 0.02
FULL_LOOK_S = 1.0
"""How often a full worker looks for room without being told, as the SDK does by itself."""
PACE_S, FAILED_PACE_S = 0.1, 1.0
"""How often jobs are asked for at most, where that is answered at once with none, and where it fails."""
SCALER = ("current_occupancy", "handle_job", "job_progress", "jobs_fetcher", "jobs_queue", "jobs_tasks")
"""What is used of the SDK's scaler."""
LINGER_S = 5.0
"""What the SDK gets, after the drain's deadline, to post the errors that ended what was left."""


class Intake:
    """When the SDK takes jobs, and how it ends.

    By itself the SDK loses a job that its outstanding request brings after SIGTERM. So SIGTERM is
    heard here: no new request is made, what the outstanding one brings is served like any other
    job, and the SDK's loop is ended once all are answered. After `drain_timeout_s` `expire` ends
    what is left with an error.

    Its scaler waits where there is nothing to wait for: a job that it has taken is begun at the next
    tenth of a second, is counted twice until then, so that after half its concurrency it takes none
    for a second, and can't be stopped; and once it is full it looks again only each second. `_mend`
    has this one scaler begin its jobs as they come.
    """

    def __init__(
        self,
        most: int,
        drain_timeout_s: float,
        *,
        stopping: Callable[[], None] = lambda: None,
        expire: Callable[[], Any] | None = None,
    ) -> None:
        self._most = most
        self._drain_timeout_s = drain_timeout_s
        self._tell_stopping = stopping
        self._expire = expire
        self._loop: asyncio.AbstractEventLoop | None = None
        self._taking: asyncio.Task[Any] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._stopped = False
        self._at_once = False
        self._room = asyncio.Event()
        self._answered = False
        """Whether the request for jobs that was outstanding when the stop came has been answered."""

    def scale(self, _: int) -> int:
        """The SDK's `concurrency_modifier`, which it calls each time before it asks for jobs.

        A constant: at any other value the SDK takes nothing until it holds nothing. Once stopped
        it is what is held, so that nothing is asked for and all that was taken is begun.
        """
        if self._loop is None:
            self._begin()
        if not self._stopped:
            return self._most
        self._answered = True
        return held()

    def _begin(self) -> None:
        """The SDK's first call: it has installed its signal handlers and runs its loop."""
        self._loop = asyncio.get_running_loop()
        self._taking = asyncio.current_task()
        self._mend(signal.getsignal(signal.SIGTERM))
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda *_: self.stop())
        if self._stopped:
            self._end()

    def _mend(self, shutdown: Any) -> None:
        """Change how the scaler takes jobs; `shutdown` is its own handler of SIGTERM."""
        scaler: Any = getattr(shutdown, "__self__", None)
        if not all(hasattr(scaler, name) for name in SCALER):
            log.warning("RunPod's SDK has no scaler where 1.12 has it: jobs may wait for a second")
            return
        fetch = scaler.jobs_fetcher

        async def take(session: Any, _: int) -> None:
            """Begin what there is room for; if there is none, return once there is."""
            if (room := self._most - held()) <= 0:
                self._room.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._room.wait(), FULL_LOOK_S)
                return
            asked_s, pace_s = time.monotonic(), FAILED_PACE_S
            try:
                taken = await fetch(session, room) or ()
                pace_s = 0.0 if taken else PACE_S
                for job in taken:
                    self._start(scaler, session, job)
            finally:  # the SDK knows no pause, whatever it is answered
                await asyncio.sleep(max(0.0, asked_s + pace_s - time.monotonic()))

        # Never full, or the scaler would wait by itself.
        scaler.current_occupancy = lambda: held() if self._stopped else min(held(), self._most - 1)
        scaler.jobs_fetcher = take

    def _start(self, scaler: Any, session: Any, job: Any) -> None:
        """What the scaler's `run_jobs` does with a job of its queue, at once."""
        if not isinstance(job, dict) or not isinstance(job.get("id"), str) or "input" not in job:
            log.error("the platform has sent something that is no job")  # which would end the SDK
            return
        if job["id"] in scaler.jobs_tasks:
            log.error("the platform has sent a job twice", extra={"job": job["id"]})
            return
        scaler.job_progress.add(job)
        scaler.jobs_queue.put_nowait(job)
        scaler.jobs_queue.get_nowait()  # `handle_job` reports to the queue
        task = asyncio.ensure_future(scaler.handle_job(session, job))
        scaler.jobs_tasks[job["id"]] = task
        task.add_done_callback(partial(self._job_ended, scaler, job))

    def _job_ended(self, scaler: Any, job: Any, task: asyncio.Task[Any]) -> None:
        # Once more: a job that was stopped before its first step has not done it itself.
        scaler.job_progress.remove(job)
        scaler.jobs_tasks.pop(job["id"], None)
        self._room.set()
        if not task.cancelled() and (error := task.exception()):
            log.error("the SDK could not report a job", exc_info=error)

    def stop(self, *, at_once: bool = False) -> None:
        """Take no more; any thread may say so, and a signal handler.

        `at_once`: what the outstanding request would bring is not waited for, because nothing
        could be done with it.
        """
        self._at_once |= at_once
        if not self._stopped:
            self._stopped = True
            if self._loop is not None:
                with suppress(RuntimeError):  # it has ended
                    self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self._ending is not None:
            return
        self._room.set()
        self._tell_stopping()
        self._ending = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        assert self._taking is not None, "the SDK has begun"
        loop = asyncio.get_running_loop()
        log.info("draining", extra={"jobs": held()})
        try:
            if not await self._idle(loop.time() + self._drain_timeout_s):
                log.warning("the drain's deadline has passed", extra={"jobs": held()})
                self._at_once = True
                if self._expire is not None:
                    await asyncio.wait_for(self._expire(), LINGER_S)
                await self._idle(loop.time() + LINGER_S)
        except (TimeoutError, RuntimeError):  # the engine's loop hangs, or has ended
            log.exception("what was left could not be ended", extra={"jobs": held()})
        finally:
            self._taking.cancel()

    async def _idle(self, deadline_s: float) -> bool:
        """Whether by the deadline nothing is held and nothing can come."""
        loop = asyncio.get_running_loop()
        while held() or not (self._answered or self._at_once):
            if loop.time() >= deadline_s:
                return False
            await asyncio.sleep(LOOK_S)
        return True


def held() -> int:
    """How many jobs the SDK holds: taken, and not yet reported as done."""
    state: Any = sys.modules["runpod.serverless.modules.worker_state"]
    return int(state.JobsProgress().get_job_count())
