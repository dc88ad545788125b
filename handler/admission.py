"""Holds requests while nothing can take them: bounded, in order, with a deadline.

The gateway holds them while no worker is there, a worker while it loads its model.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Protocol

from handler.errors import UpstreamFailed
from handler.messages import Call, Reply, Request
from handler.waiting import Room, kept_alive


class WorkerLost(UpstreamFailed):
    """The worker went away before it said anything: another may be asked the same.

    Raised while a call is entered and never from the frames of a reply. `worked_s` is how long it
    had the request.
    """

    def __init__(self, message: str, *, worked_s: float = 0.0) -> None:
        super().__init__(message)
        self.worked_s = worked_s


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
        """How long the last start took, from process to first token."""
        ...

    async def wait_ready(self) -> None:
        """Return once it is ready, in order of arrival, and have it started if need be.

        Raises `NotAdmitted` at once when it can't become ready; has no deadline of its own.
        """

    def call(self, request: Request) -> AbstractAsyncContextManager[Reply]:
        """Answer `request` (a `handler.messages.Call`).

        Raises `WorkerLost` when nothing was answered and another try is in order.
        """
        ...


class Admission:
    """Stands in front of an upstream that may have to be started first.

    Requests wait in `room`, each for at most `queue_timeout_s` from its arrival, what it then waits in
    a line of the upstream included. A stream is kept alive while it waits, here or there
    (`handler.waiting.kept_alive`). What waited here says in `x-cold-start` for how many seconds the
    worker started. A request whose worker went away before it answered is given to the next one,
    once. `check` sees each request that would have to wait and raises what the worker is sure to answer
    it with.

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
        """Answers a request as soon as a worker is there."""

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self._room.waiting

    @asynccontextmanager
    async def _answer(self, request: Request) -> AsyncIterator[Reply]:
        waited = False
        async with AsyncExitStack() as stack:
            for last in (False, True):
                trace = request.visit.trace
                if not self._upstream.ready:
                    await self._wait(request)
                    waited = True
                    request = _admitted(request)
                request.visit.taken()
                try:
                    ask = trace.attempted(self._upstream.call) if trace else self._upstream.call
                    reply = await stack.enter_async_context(ask(request))
                    break
                except WorkerLost as lost:
                    if last:
                        raise
                    request = _admitted(request, lost.worked_s)
            yield _with_cold_start(reply, self._upstream.cold_start_s) if waited else reply

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


def _admitted(request: Request, worked_s: float = 0.0) -> Request:
    visit = request.visit
    return replace(request, visit=replace(visit, admitted=True, worked_s=visit.worked_s + worked_s))


def _with_cold_start(reply: Reply, cold_start_s: float) -> Reply:
    return replace(reply, headers=(*reply.headers, ("x-cold-start", f"{cold_start_s:.3f}")))
