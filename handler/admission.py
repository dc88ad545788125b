"""Holds the requests of a worker while it loads its model: bounded, in order, with a deadline."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Protocol

from handler.messages import Call, Reply, Request
from handler.waiting import Room, kept_alive


class Upstream(Protocol):
    """Answers requests while it is `ready`; can be waited for while it is not."""

    @property
    def ready(self) -> bool:
        """Whether a request can be sent at once."""
        ...

    @property
    def retry_after_s(self) -> float:
        """About how long until it is ready."""
        ...

    @property
    def cold_start_s(self) -> float:
        """How long the start took, from process to first token."""
        ...

    async def wait_ready(self) -> None:
        """Return once it is ready, in order of arrival.

        Raises `NotAdmitted` at once when it can't become ready; has no deadline of its own.
        """

    def call(self, request: Request) -> AbstractAsyncContextManager[Reply]:
        """Answer `request` (a `handler.messages.Call`)."""
        ...


class Admission:
    """Stands in front of an upstream that starts.

    Requests wait in `room`, each for at most `queue_timeout_s` from its arrival. A stream is kept alive
    meanwhile (`handler.waiting.kept_alive`). What waited says in `x-cold-start` for how many seconds the
    worker started. `check` sees each request that would have to wait and raises what the worker is sure to
    answer it with.

    Raises `NotAdmitted` and `DeadlineExceeded`, both with `Retry-After`.
    """

    def __init__(
        self,
        upstream: Upstream,
        *,
        room: Room,
        queue_timeout_s: float,
        keep_alive_s: float,
        check: Callable[[Request], None] = lambda _: None,
    ) -> None:
        self._upstream = upstream
        self._queue_timeout_s = queue_timeout_s
        self._check = check
        self._room = room
        self.call: Call = kept_alive(self._answer, keep_alive_s)
        """Answers a request as soon as the worker is there."""

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self._room.waiting

    @asynccontextmanager
    async def _answer(self, request: Request) -> AsyncIterator[Reply]:
        upstream, trace = self._upstream, request.visit.trace
        waits = not upstream.ready
        if waits:
            await self._wait(request)
            request = replace(request, visit=replace(request.visit, admitted=True))
        ask = trace.attempted(upstream.call) if trace else upstream.call
        async with ask(request) as reply:
            yield with_cold_start(reply, upstream.cold_start_s) if waits else reply

    async def _wait(self, request: Request) -> None:
        upstream = self._upstream
        self._check(request)
        since_s = time.monotonic()
        try:
            await self._room.wait(
                upstream.wait_ready,
                request,
                timeout_s=self._queue_timeout_s,
                retry_after_s=lambda: upstream.retry_after_s,
            )
        finally:
            if trace := request.visit.trace:
                trace.waited(since_s)


def with_cold_start(reply: Reply, cold_start_s: float) -> Reply:
    """`reply`, which says for how many seconds a worker started."""
    return replace(reply, headers=(*reply.headers, ("x-cold-start", f"{cold_start_s:.3f}")))
