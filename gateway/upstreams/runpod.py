"""A worker process of this machine that is asked as RunPod asks it: through jobs, and its own SDK."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self, Unpack

from gateway.upstreams.control_plane import ControlPlane
from gateway.upstreams.job import Job
from gateway.upstreams.keeper import Keep, Keeper
from gateway.upstreams.launch import Launcher
from gateway.upstreams.process import WorkerProcess
from handler import jobs
from handler.body import asks_for_stream
from handler.messages import Reply, Request

log = logging.getLogger("gateway")


class RunpodUpstream(Keeper):
    """At most one worker process at a time, which takes its requests as jobs from a control plane.

    A job holds a request's method, path and JSON body. It carries no header, as on RunPod:
    `x-request-id` and the like end here.
    """

    def __init__(
        self,
        launcher: Callable[[Path], Launcher],
        environ: Mapping[str, str],
        plane: ControlPlane,
        **keep: Unpack[Keep],
    ) -> None:
        super().__init__(launcher, environ, **keep)
        self._plane = plane
        self._line = plane.line

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
        if not self.ready:
            self._wanted.set()
        try:
            yield await job.reply()
        finally:
            self._line.leave(job)

    @property
    def in_line(self) -> int:
        """How many jobs no worker has taken yet."""
        return self._line.queued

    @property
    def health(self) -> Mapping[str, Any]:
        """What `/health` shows of it."""
        shown, line = super().health, self._line
        pinged_s = self._plane.lease.pinged_s if self._plane.lease else None
        ago_s = None if pinged_s is None else round(time.monotonic() - pinged_s, 1)
        return {
            "worker": {**shown["worker"], "pinged_s_ago": ago_s},
            "jobs": {"in_queue": line.queued, "in_progress": line.in_progress},
        }

    def _told(self, worker: WorkerProcess) -> Mapping[str, str]:
        worker_id = f"{worker.path.name}-{secrets.token_hex(4)}"

        def hung(why: str) -> None:
            log.error("worker hangs", extra={"worker": worker_id, "reason": why})
            worker.kill(why)

        lease = self._plane.admit(worker_id, hung)
        worker.left.add_done_callback(lambda _: lease.leave())
        environ = self._environ
        no_proxy = environ.get("no_proxy") or environ.get("NO_PROXY")
        direct = f"{no_proxy},127.0.0.1" if no_proxy else "127.0.0.1"  # the SDK's pings would take a proxy
        return {
            "PLATFORM": "runpod",
            "START_FAILURE": "exit",  # the reason is told from here
            **self._plane.environ(worker_id),
            "NO_PROXY": direct,
            "no_proxy": direct,
        }

    def _opened(self, _: WorkerProcess) -> None:
        if self._plane.lease is not None:
            self._plane.lease.begin()

    def _lost(self, _: WorkerProcess) -> None:
        self._plane.dismiss()
        if self._line.queued:
            self._wanted.set()

    def _announce(self) -> None:
        super()._announce()
        if refusal := self.refusal:
            self._line.refuse(refusal)

    async def _close(self) -> None:
        await self._plane.close()
