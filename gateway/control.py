"""What only an admin may see and do: `/admin/status`, `/admin/logs`, `/admin/reload`."""

from __future__ import annotations

import asyncio
import importlib.metadata
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict
from typing import Any

from gateway import worker_logs
from gateway.endpoints.endpoints import Endpoints
from gateway.methods import by_method
from gateway.worker_logs import Source
from handler import sse
from handler.errors import (
    BadFile,
    BadRequest,
    BadSettings,
    NoSuchEndpoint,
    NotFound,
    json_reply,
)
from handler.messages import Call, Reply, Request, once

LINES = 100
LINES_MAX = 10_000
QUIET_LOOKS = 60
"""A log that is followed and has nothing new sends a comment after so many looks: about every 15 s."""


async def _no_jobs(_: str) -> Mapping[str, int]:
    return {}


class Control:
    """How the endpoints and their workers are, and the reload of their description.

    `jobs` counts the jobs of an endpoint by state.
    """

    def __init__(
        self, endpoints: Endpoints, jobs: Callable[[str], Awaitable[Mapping[str, int]]] = _no_jobs
    ) -> None:
        self._endpoints = endpoints
        self._jobs = jobs
        self._started_at = time.time()
        self._stopping = False

    def stop(self) -> None:
        """End what is followed: it would go on for ever."""
        self._stopping = True

    def find(self, request: Request) -> Call | None:
        """The call for one of the three. Raises `MethodNotAllowed`, and what a log is refused with."""
        routes: Mapping[str, Mapping[str, Call]] = {
            "/admin/status": {"GET": self._status},
            "/admin/logs": {"GET": self._logs},
            "/admin/reload": {"POST": self._reload},
        }
        methods = routes.get(request.path)
        return None if methods is None else by_method(request, methods)

    async def statuses(self) -> list[Mapping[str, Any]]:
        """How each endpoint is."""
        return [
            {**endpoint.status(), "jobs": await self._jobs(endpoint_id)}
            for endpoint_id, endpoint in [*self._endpoints.items()]
        ]

    @asynccontextmanager
    async def _status(self, _: Request) -> AsyncIterator[Reply]:
        shown = {"version": version(), "started_at": self._started_at, "endpoints": await self.statuses()}
        yield json_reply(200, shown)

    @asynccontextmanager
    async def _reload(self, _: Request) -> AsyncIterator[Reply]:
        try:
            changes = await self._endpoints.reload()
        except BadSettings as error:
            raise BadFile(error.faults) from None
        yield json_reply(200, asdict(changes))

    @asynccontextmanager
    async def _logs(self, request: Request) -> AsyncIterator[Reply]:
        asked = request.parameters
        endpoint_id, worker = asked.get("endpoint") or None, asked.get("worker") or None
        lines = asked.get("lines") or str(LINES)
        if not (re.fullmatch("[0-9]{1,5}", lines) and int(lines) <= LINES_MAX):
            raise BadRequest(f"`lines` must be a whole number up to {LINES_MAX}.", param="lines")
        if endpoint_id is not None and endpoint_id not in self._endpoints:
            raise NoSuchEndpoint(endpoint_id)

        def find() -> list[Source]:
            of = {name: one for name, one in self._endpoints.items() if endpoint_id in {None, name}}
            return worker_logs.sources(((name, one.workers.views) for name, one in of.items()), worker)

        if worker is not None and not find():
            raise NotFound(f"There is no worker `{worker}`.", param="worker")
        if asked.get("follow", "false").lower() == "true":
            async with aclosing(self._events(find, int(lines))) as frames:
                yield Reply(200, sse.HEADERS, frames)
        else:
            found = await asyncio.to_thread(worker_logs.last, find(), int(lines))
            text = "".join(f"{line}\n" for line in found).encode()
            yield Reply(200, (("content-type", "text/plain; charset=utf-8"),), once(text))

    async def _events(self, find: Callable[[], Iterable[Source]], lines: int) -> AsyncGenerator[bytes, None]:
        quiet = 0
        async with aclosing(worker_logs.follow(find, lines)) as looks:
            async for new in looks:
                if new:
                    yield b"".join(f"data: {line}\n\n".encode() for line in new)
                elif quiet % QUIET_LOOKS == 0:
                    yield sse.KEEP_ALIVE
                quiet = 0 if new else quiet + 1
                if self._stopping:
                    return


def version() -> str:
    """What is installed, or `unknown` in a folder that was only copied."""
    try:
        return importlib.metadata.version("firsttoken")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
