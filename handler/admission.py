"""Holds requests while nothing can take them: bounded, in order, with a deadline.

The gateway holds them while no worker is there, a worker while it loads its model.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from typing import Protocol

from handler import sse
from handler.body import asks_for_stream
from handler.errors import DeadlineExceeded, NotAdmitted, UpstreamFailed
from handler.messages import Reply, Request, read


class WorkerLost(UpstreamFailed):
    """The worker went away before it said anything: another may be asked the same.

    Raised while a call is entered and never from the frames of a reply.
    """


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

    At most `queue_limit` requests wait, each for at most `queue_timeout_s` from its arrival;
    who leaves frees its place at once. A streamed request that still waits after
    `keep_alive_s` is answered 200 early and gets comment frames until its stream begins; an
    error is then its last frame (0: never early). What waited says in `x-cold-start` for how many
    seconds the worker started. A request whose worker went away before it
    answered is given to the next one, once. `check` sees each request that would have to wait
    and raises what the worker is sure to answer it with. `tell_waiting` hears how many wait,
    `tell_waited_s` how long each did.

    Raises `NotAdmitted` and `DeadlineExceeded`, both with `Retry-After`.
    """

    def __init__(
        self,
        upstream: Upstream,
        *,
        queue_limit: int,
        queue_timeout_s: float,
        keep_alive_s: float,
        check: Callable[[Request], None] = lambda _: None,
        tell_waiting: Callable[[int], None] = lambda _: None,
        tell_waited_s: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._upstream = upstream
        self._tell_waiting = tell_waiting
        self._tell_waited_s = tell_waited_s
        self._queue_limit = queue_limit
        self._queue_timeout_s = queue_timeout_s
        self._keep_alive_s = keep_alive_s
        self._check = check
        self.waiting = 0

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """Answer `request` as soon as a worker is there."""
        deadline_s = asyncio.get_running_loop().time() + self._queue_timeout_s
        waited = False
        async with AsyncExitStack() as stack:
            for last in (False, True):
                if not self._upstream.ready:
                    self._check(request)
                    turn = self._line_up(deadline_s, stack)
                    if not await self._soon(turn, request):
                        frames = self._held(request, turn, deadline_s, stack, last=last)
                        yield Reply(200, sse.HEADERS, await stack.enter_async_context(aclosing(frames)))
                        return
                    waited = True
                try:
                    reply = await stack.enter_async_context(self._upstream.call(request))
                    break
                except WorkerLost:
                    if last:
                        raise
            yield _with_cold_start(reply, self._upstream.cold_start_s) if waited else reply

    async def _soon(self, turn: asyncio.Task[None], request: Request) -> bool:
        """Whether its turn comes before an early answer is in order; raises why it never will."""
        early = self._keep_alive_s > 0 and asks_for_stream(request)
        await asyncio.wait({turn}, timeout=self._keep_alive_s if early else None)
        if turn.done():
            turn.result()
        return turn.done()

    async def _held(
        self,
        request: Request,
        turn: asyncio.Task[None],
        deadline_s: float,
        stack: AsyncExitStack,
        *,
        last: bool,
    ) -> AsyncGenerator[bytes, None]:
        """The frames of a stream that was answered early."""
        while True:
            while not turn.done():
                yield sse.KEEP_ALIVE
                await asyncio.wait({turn}, timeout=self._keep_alive_s)
            turn.result()
            try:
                async with self._upstream.call(request) as reply:
                    async for chunk in _as_frames(reply):
                        yield chunk
            except WorkerLost:
                if last:
                    raise
            else:
                return
            last = True
            turn = self._line_up(deadline_s, stack)

    def _line_up(self, deadline_s: float, stack: AsyncExitStack) -> asyncio.Task[None]:
        """A place in the queue, given up with `stack`: a task that ends when its turn has come."""
        turn = asyncio.create_task(self._wait(deadline_s))
        stack.callback(_give_up, turn)
        return turn

    async def _wait(self, deadline_s: float) -> None:
        upstream = self._upstream
        if self.waiting >= self._queue_limit:
            raise NotAdmitted(
                f"{self.waiting} requests already wait for the worker to start.",
                retry_after_s=upstream.retry_after_s,
            )
        began_s = asyncio.get_running_loop().time()
        self.waiting += 1
        self._tell_waiting(self.waiting)
        try:
            async with asyncio.timeout_at(deadline_s):
                await upstream.wait_ready()
        except TimeoutError:
            raise DeadlineExceeded(
                f"No worker was ready within {self._queue_timeout_s:g} s.",
                headers=NotAdmitted("", retry_after_s=upstream.retry_after_s).headers,
            ) from None
        finally:
            self.waiting -= 1
            self._tell_waiting(self.waiting)
            self._tell_waited_s(asyncio.get_running_loop().time() - began_s)


def _with_cold_start(reply: Reply, cold_start_s: float) -> Reply:
    return replace(reply, headers=(*reply.headers, ("x-cold-start", f"{cold_start_s:.3f}")))


def _give_up(turn: asyncio.Task[None]) -> None:
    if not turn.cancel() and not turn.cancelled():
        turn.exception()  # so that asyncio does not complain that nobody heard it


async def _as_frames(reply: Reply) -> AsyncIterator[bytes]:
    """The frames of `reply` inside a stream that has begun: another status is one error frame."""
    if reply.streams:
        async for chunk in reply.frames:
            yield chunk
        return
    try:
        body = json.loads(await read(reply))
    except ValueError as error:
        raise UpstreamFailed(f"The worker answered with status {reply.status} and no JSON.") from error
    yield sse.event(body)
