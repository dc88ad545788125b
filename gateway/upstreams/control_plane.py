"""RunPod's control plane for the workers of one endpoint, as the unmodified SDK (runpod 1.12) asks it.

Under `/v2/{endpoint_id}`, with the key as it is in `Authorization`:

    GET  /job-take/{worker}?job_in_progress=    a job, or 204 after a while; 0: the worker holds none
    GET  /job-take-batch/{worker}?batch_size=N  a list of up to N
    GET  /job-stop/{worker}                     {"jobsToStop": [...]}, or 204 after a while
    POST /job-stream/{worker}/{job}             {"output": one output}; answered when there is room
    POST /job-done/{worker}/{job}?isStream=     {"output": all of them} or {"error": ...}
    GET  /ping/{worker}

The SDK asks again at once after any empty answer: it is held. It repeats no post that met a 4xx,
a 429 or a closing connection: posts are always answered 200, and idle connections are kept.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from gateway.metrics import EndpointMetrics
from gateway.upstreams.job import Job
from gateway.upstreams.lease import HOLD_S, LEASE_S, Lease
from gateway.upstreams.line import Line
from gateway.upstreams.waits import first
from handler import asgi
from handler.errors import NoSuchRoute, Unauthorized, json_reply
from handler.messages import Reply, Request, once
from handler.server import Server, config

log = logging.getLogger("gateway")

IDLE_S = 3600
"""Far above the 15 s after which aiohttp drops an idle connection: it is never us who close one."""
LEAVING_HOLD_S = 0.5
"""What a leaving worker's next request for jobs is held: it is about to hear that it has to end."""
MAX_BODY_BYTES = 1 << 40
"""No bound of its own: a refused result is a lost one, and who posts it has the key."""
PING_INTERVAL_MS = 10_000


class ControlPlane:
    """Hands the jobs of `line` to the workers that have `leases`, and hears what they say of them.

    It listens on loopback, on a port of its own, with a key made for this start.
    """

    def __init__(
        self,
        endpoint_id: str,
        line: Line,
        metrics: EndpointMetrics,
        *,
        lease_s: float = LEASE_S,
        hold_s: float = HOLD_S,
    ) -> None:
        self._endpoint_id = endpoint_id
        self._lease_s = lease_s
        self._hold_s = hold_s
        self.line = line
        self._metrics = metrics
        self.key = secrets.token_urlsafe(32)
        self._refused = False
        self._closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._port = 0
        app = asgi.serve(self.call, max_body_bytes=MAX_BODY_BYTES, check=self._check)
        self._server = Server(config(app, idle_s=IDLE_S, shutdown_s=1))
        self._serving: asyncio.Task[None] | None = None
        self.leases: dict[str, Lease] = {}
        """By the id of the worker."""
        self.tell_asked: Callable[[], None] = lambda: None
        """Told when a worker asks for jobs."""
        line.stop = self._tell_stop

    def open(self) -> None:
        """Begin to serve, on a port that is free. Raises `OSError`."""
        listener = socket.create_server(("127.0.0.1", 0))
        self._port = listener.getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))

    async def close(self) -> None:
        """Answer what waits, and serve no more."""
        if not self._closing.done():
            self._closing.set_result(None)
        if self._serving is None:
            return
        self._server.should_exit = True
        await self._serving

    def admit(self, worker_id: str, hung: Callable[[str], None]) -> Lease:
        """Hand jobs to the worker `worker_id` too; `hung` is told why it can't be alive."""
        why = f"it has not polled for {self._lease_s:g} s"
        lease = Lease(worker_id, lambda: hung(why), lease_s=self._lease_s, hold_s=self._hold_s)
        self.leases[worker_id] = lease
        return lease

    def pause(self, worker_id: str, *, paused: bool) -> None:
        """Hand no more jobs to the worker `worker_id`; with `paused` false hand it some again."""
        self.leases[worker_id].paused = paused
        self.line.wake()

    def dismiss(self, worker_id: str) -> None:
        """The worker that was admitted has ended."""
        if lease := self.leases.pop(worker_id, None):
            lease.end()
            self.line.lose(worker_id, "went away")

    def _tell_stop(self, job: Job) -> None:
        if lease := self.leases.get(job.worker_id or ""):
            lease.stop(job.id)

    def environ(self, worker_id: str) -> dict[str, str]:
        """What the SDK of the worker `worker_id` is told."""
        base = f"http://127.0.0.1:{self._port}/v2/{self._endpoint_id}"
        # The SDK appends to each with `&`; it replaces the names with a dollar.
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=local",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=local",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=local",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=local",
            "RUNPOD_PING_INTERVAL": str(PING_INTERVAL_MS),
            "RUNPOD_AI_API_KEY": self.key,
            "RUNPOD_POD_ID": worker_id,
            "RUNPOD_ENDPOINT_ID": self._endpoint_id,
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    def _check(self, request: Request) -> None:
        given = (request.header("authorization") or "").encode()
        if not hmac.compare_digest(given, self.key.encode()):
            if not self._refused:  # once: the SDK would try again at once, and for ever
                self._refused = True
                log.warning("control plane was asked with a wrong key")
            raise Unauthorized

    def call(self, request: Request) -> AbstractAsyncContextManager[Reply]:
        """Answer one request of a worker (a `handler.messages.Call`)."""
        _, _, endpoint_id, route, worker_id, job_id, *more = [*request.path.split("/"), *[""] * 6]
        if endpoint_id == self._endpoint_id and not any(more):
            match request.method, route:
                case "GET", "job-take" | "job-take-batch":
                    return self._take(worker_id, request, batch=route == "job-take-batch")
                case "GET", "job-stop":
                    return self._stop(worker_id)
                case "GET", "ping":
                    return self._ping(worker_id, request)
                case "POST", "job-stream":
                    return self._stream(worker_id, job_id, request)
                case "POST", "job-done":
                    return self._done(worker_id, job_id, request)
        raise NoSuchRoute(request.method, request.path)

    def _share(self, lease: Lease, most: int) -> int:
        """How many of the jobs in line `lease` gets now: none while one that holds less asks as well."""
        held = self.line.held
        asking = [other for other in self.leases.values() if other.asking and not other.paused]
        if lease.paused or any(held[other.worker_id] < held[lease.worker_id] for other in asking):
            return 0
        return min(most, math.ceil(self.line.queued / len(asking)))

    @asynccontextmanager
    async def _take(self, worker_id: str, request: Request, *, batch: bool) -> AsyncIterator[Reply]:
        lease = self.leases.get(worker_id)
        if lease is None:
            await self._hold(self._hold_s)
            yield _nothing()
            return
        if lease.leaving.done():
            await self._hold(LEAVING_HOLD_S)
            yield _nothing()
            return
        if "job_in_progress=0" in request.query:  # it has not received them, or its last word was lost
            self.line.lose(worker_id, "lost the job")
        most = _number(request, "batch_size") if batch else 1
        self.line.wanted += most
        lease.asking += most
        self.tell_asked()
        try:
            deadline_s = time.monotonic() + self._hold_s
            while not (share := self._share(lease, most)) and (left_s := deadline_s - time.monotonic()) > 0:
                await first(self.line.arrival, lease.leaving, self._closing, timeout_s=left_s)
                if lease.leaving.done() or self._closing.done():
                    break
            taken = [] if lease.leaving.done() else self.line.hand_out(worker_id, share)
        finally:
            lease.asking -= most
            self.line.wanted -= most
            self.line.wake()  # what is left is another's
        if not taken:
            yield _nothing()
            return
        told = [{"id": job.id, "input": job.input} for job in taken]
        try:
            yield json_reply(200, told if batch else told[0])
        except BaseException:  # it has gone, or the answer could not be sent
            self.line.give_back(taken)
            raise

    @asynccontextmanager
    async def _stop(self, worker_id: str) -> AsyncIterator[Reply]:
        if lease := self.leases.get(worker_id):
            ids = await lease.stops()
        else:
            await self._hold(self._hold_s)
            ids = []
        yield json_reply(200, {"jobsToStop": ids}) if ids else _nothing()

    @asynccontextmanager
    async def _ping(self, worker_id: str, request: Request) -> AsyncIterator[Reply]:
        asked = request.parameters
        if asked.get("status") == "unhealthy":
            why = {name: asked.get(name, "") for name in ("check", "reason")}
            log.error("worker is unhealthy", extra={"worker": worker_id, **why})
        yield json_reply(200, {})

    @asynccontextmanager
    async def _stream(self, worker_id: str, job_id: str, request: Request) -> AsyncIterator[Reply]:
        job, posted = self.line.find(worker_id, job_id), _posted(request)
        if job is None:
            self._drop(worker_id, job_id)
        elif "output" in posted:
            self.line.put(job, posted["output"], len(request.body))
            await job.room()
        yield json_reply(200, {})

    @asynccontextmanager
    async def _done(self, worker_id: str, job_id: str, request: Request) -> AsyncIterator[Reply]:
        job, posted = self.line.find(worker_id, job_id), _posted(request)
        if job is None:
            self._drop(worker_id, job_id)
        elif posted.get("status") != "IN_PROGRESS":  # the SDK tells progress here too
            output = posted.get("output")
            if not posted:
                job.report_failure("its result could not be read")
            elif error := posted.get("error"):
                job.report_failure(error)
            elif "isStream=true" in request.query and isinstance(output, list):
                job.finish(output)
            else:
                job.finish([output] if "output" in posted else [])
            self.line.close(job)
        yield json_reply(200, {})

    def _drop(self, worker_id: str, job_id: str) -> None:
        self._metrics.count_runpod_jobs("dropped")
        log.debug("post came too late", extra={"worker": worker_id, "job": job_id})

    async def _hold(self, for_s: float) -> None:
        await first(self._closing, timeout_s=for_s)


def _nothing() -> Reply:
    return Reply(204, (), once(b""))


def _posted(request: Request) -> Mapping[str, Any]:
    """The JSON object that was posted, whatever its content type says; empty if there is none."""
    try:
        value = json.loads(request.body)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    log.warning("post could not be read", extra={"path": request.path})
    return {}


def _number(request: Request, name: str) -> int:
    given = request.parameters.get(name, "1")
    return max(1, int(given)) if given.isdecimal() and len(given) < 10 else 1
