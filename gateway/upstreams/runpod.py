"""Worker processes of this machine that are asked as RunPod asks them: through jobs, and its own SDK."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

from gateway.upstreams.control_plane import ControlPlane
from gateway.upstreams.job import Job
from gateway.upstreams.launch import Launcher
from gateway.upstreams.pool import Keep, WorkerPool
from gateway.upstreams.worker import Worker
from handler import jobs
from handler.body import asks_for_stream
from handler.messages import Reply, Request

log = logging.getLogger("gateway")


class RunpodPool(WorkerPool):
    """Worker processes that take their requests as jobs from one control plane.

    A job holds a request's method, path and JSON body. It carries no header, as on RunPod:
    `x-request-id` and the like end here.
    """

    def __init__(
        self,
        launcher: Callable[[Path], Launcher],
        environ: Mapping[str, str],
        plane: ControlPlane,
        keep: Keep,
    ) -> None:
        super().__init__(launcher, environ, keep)
        self._plane = plane
        self._line = plane.line
        self._line.tell_held = self._held
        plane.tell_asked = self._announce
        self._hidden = (*self._hidden, plane.key)

    async def __aenter__(self) -> Self:
        self._plane.open()
        return await super().__aenter__()

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """Line up, be taken, and be answered with what the worker posts.

        Raises `WorkerLost` while it has posted nothing, `BadRequest` for what no job can hold,
        and `NotAdmitted` and `DeadlineExceeded` of the line.
        """
        job = Job(jobs.dump(request), streamed=asks_for_stream(request), visit=request.visit)
        if refusal := self.refusal:
            raise refusal
        self._line.add(job)
        self._look_soon()
        try:
            yield await job.reply()
        finally:
            self._line.leave(job)

    @property
    def free(self) -> int:
        """How many jobs the ready workers ask for by now, less those in line: more would only wait there."""
        ready = (worker for worker in self._workers.values() if worker.takes)
        return max(0, sum(self._plane.leases[worker.id].asking for worker in ready) - self._line.queued)

    @property
    def in_line(self) -> int:
        """How many jobs no worker has taken yet."""
        return self._line.queued

    def _held(self, worker_id: str, more: int) -> None:
        """`worker_id` holds one job more, or (-1) one less."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return
        if more > 0:
            worker.begin()
            self._look_soon()
        else:
            worker.finish()
            worker.answered = True
            self._freed(worker)

    def _told(self, worker: Worker) -> Mapping[str, str]:
        def hung(why: str) -> None:
            log.error("worker hangs", extra={"worker": worker.id, "reason": why})
            worker.process.kill(why)

        lease = self._plane.admit(worker.id, hung)
        worker.process.left.add_done_callback(lambda _: lease.leave())
        environ = self._environ
        no_proxy = environ.get("no_proxy") or environ.get("NO_PROXY")
        direct = f"{no_proxy},127.0.0.1" if no_proxy else "127.0.0.1"  # the SDK's pings would take a proxy
        return {
            "PLATFORM": "runpod",
            "START_FAILURE": "exit",  # the reason is told from here
            **self._plane.environ(worker.id),
            "NO_PROXY": direct,
            "no_proxy": direct,
        }

    def _opened(self, worker: Worker) -> None:
        self._plane.leases[worker.id].begin()

    async def _watch(self, worker: Worker) -> None:
        """Return at once: the worker's lease watches it."""

    def _retire(self, worker: Worker, *, retired: bool) -> None:
        self._plane.pause(worker.id, paused=retired)

    def _lost(self, worker: Worker) -> None:
        self._plane.dismiss(worker.id)

    def _announce(self) -> None:
        super()._announce()
        if refusal := self.refusal:
            self._line.refuse(refusal)

    async def _close(self) -> None:
        await self._plane.close()
