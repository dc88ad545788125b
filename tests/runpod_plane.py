"""RunPod's side of the SDK's protocol, for tests: hands out jobs, keeps all that is said of them.

It answers every request at once but for long polls, and records in order. What a real control
plane does beyond that (leases, retries, deadlines) is the gateway's, `gateway/upstreams/runpod.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

KEY = "secret-of-the-plane"
HOLD_S = 20.0


@dataclass(slots=True)
class Job:
    """One job, and what was said of it."""

    id: str
    input: Any
    streamed: list[Any] = field(default_factory=list)
    done: list[dict[str, Any]] = field(default_factory=list)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def said(self, outputs: int) -> list[Any]:
        """What has come over job-stream, once that are so many or more."""
        async with self._news:
            await self._news.wait_for(lambda: len(self.streamed) >= outputs)
        return self.streamed

    async def result(self) -> dict[str, Any]:
        """The body of job-done."""
        async with self._news:
            await self._news.wait_for(lambda: bool(self.done))
        return self.done[0]

    async def tell(self, kept: list[Any], what: Any) -> None:
        """Keep `what`."""
        async with self._news:
            kept.append(what)
            self._news.notify_all()


class Plane:
    """The platform: `url` is where it listens once it is `open`."""

    def __init__(self) -> None:
        self.url = ""
        self.jobs: dict[str, Job] = {}
        self.takes: list[tuple[int, int]] = []
        """Each request for jobs: how many were asked for, how many were given."""
        self.polls = 0
        """How many requests for jobs have come, those that still wait included."""
        self.pings: list[Mapping[str, str]] = []
        self.posting: asyncio.Event = asyncio.Event()
        self.let_post: asyncio.Event = asyncio.Event()
        self.let_post.set()
        self._line: list[Job] = []
        self._stops: list[str] = []
        self._news = asyncio.Condition()
        self.closed_polls = False

    def environ(self) -> dict[str, str]:
        """The environment of a worker of this platform."""
        base = f"{self.url}/v2/test"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=none",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_AI_API_KEY": KEY,
            "RUNPOD_POD_ID": "pod-1",
            "RUNPOD_ENDPOINT_ID": "test",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Plane]:
        """Listen on a port of the loopback for as long as the block runs."""
        app = web.Application(client_max_size=1 << 28)
        app.add_routes(
            [
                web.get("/v2/test/job-take/{worker}", self._take),
                web.get("/v2/test/job-take-batch/{worker}", self._take),
                web.get("/v2/test/job-stop/{worker}", self._stop),
                web.post("/v2/test/job-stream/{worker}/{job}", self._stream),
                web.post("/v2/test/job-done/{worker}/{job}", self._done),
                web.get("/v2/test/ping/{worker}", self._ping),
            ]
        )
        runner = web.AppRunner(app, keepalive_timeout=600, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await self.release()
            await runner.cleanup()

    async def submit(self, *inputs: Any) -> list[Job]:
        """Put jobs in line, all at once."""
        jobs = [Job(f"job-{len(self.jobs) + n}", given) for n, given in enumerate(inputs)]
        async with self._news:
            self.jobs |= {job.id: job for job in jobs}
            self._line += jobs
            self._news.notify_all()
        return jobs

    async def cancel(self, job: Job) -> None:
        """Have the worker told to stop `job`."""
        async with self._news:
            self._stops.append(job.id)
            self._news.notify_all()

    async def polled(self, count: int) -> None:
        """Return once so many requests for jobs have come."""
        async with self._news:
            await self._news.wait_for(lambda: self.polls >= count)

    async def taken(self, job: Job) -> None:
        """Return once a worker has taken `job`."""
        async with self._news:
            await self._news.wait_for(lambda: job not in self._line)

    async def release(self) -> None:
        """Answer every long poll, now and from now on."""
        async with self._news:
            self.closed_polls = True
            self._news.notify_all()

    async def _held(self, kept: list[Any]) -> None:
        try:
            async with asyncio.timeout(HOLD_S), self._news:
                await self._news.wait_for(lambda: bool(kept) or self.closed_polls)
        except TimeoutError:
            pass

    async def _take(self, request: web.Request) -> web.Response:
        assert request.headers["authorization"] == KEY
        batch = "batch_size" in request.query
        most = int(request.query.get("batch_size", "1"))
        async with self._news:
            self.polls += 1
            self._news.notify_all()
        await self._held(self._line)
        async with self._news:
            given, self._line = self._line[:most], self._line[most:]
            self._news.notify_all()
        self.takes.append((most, len(given)))
        if not given:
            if self.closed_polls:
                await asyncio.sleep(0.05)
            return web.Response(status=204)
        told = [{"id": job.id, "input": job.input} for job in given]
        return web.json_response(told if batch else told[0])

    async def _stop(self, _: web.Request) -> web.Response:
        await self._held(self._stops)
        stops, self._stops = self._stops, []
        return web.json_response({"jobsToStop": stops}) if stops else web.Response(status=204)

    async def _stream(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        self.posting.set()
        await self.let_post.wait()
        job = self.jobs[request.match_info["job"]]
        await job.tell(job.streamed, body["output"])
        return web.Response()

    async def _done(self, request: web.Request) -> web.Response:
        job = self.jobs[request.match_info["job"]]
        await job.tell(job.done, json.loads(await request.read()))
        return web.Response()

    async def _ping(self, request: web.Request) -> web.Response:
        self.pings.append(dict(request.query))
        return web.Response()
