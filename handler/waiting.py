"""Waiting for a turn: how many may, how long, and what a stream hears meanwhile."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import replace

from handler import sse
from handler.body import asks_for_stream
from handler.errors import DeadlineExceeded, NotAdmitted, UpstreamFailed, retry_after
from handler.messages import PATIENCE_S, Call, Reply, Request, read

WAITING_MAX = 1000
"""How many requests wait in a worker at most; a load balancer that has more needs to hear it."""

WAITING_MAX_BYTES = 256 << 20
"""What their bodies take at most, beside a model that needs the memory."""


class Room:
    """Where at most `limit` requests wait, their bodies at most `limit_bytes` together, but one always may.

    Who leaves frees its place at once.
    """

    def __init__(self, *, limit: int, limit_bytes: float = math.inf) -> None:
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self.waiting = 0

    async def wait(
        self,
        turn: Callable[[], Awaitable[object]],
        request: Request,
        *,
        timeout_s: float,
        retry_after_s: Callable[[], float],
    ) -> None:
        """Return once `turn()` has come; all waits of `request` are at most `timeout_s` together.

        Raises `NotAdmitted` when there is no place, unless it was admitted before, and
        `DeadlineExceeded` when that was too long.
        """
        size_bytes = len(request.body)
        if not request.visit.admitted:
            self._find_place(size_bytes, retry_after_s)
        self._count(1, size_bytes)
        try:
            async with asyncio.timeout_at(request.visit.deadline_s(timeout_s)):
                await turn()
        except TimeoutError:
            raise DeadlineExceeded(
                f"The request's turn did not come within {timeout_s:g} s.",
                headers=retry_after(retry_after_s()),
            ) from None
        finally:
            self._count(-1, -size_bytes)

    def _find_place(self, size_bytes: int, retry_after_s: Callable[[], float]) -> None:
        too_large = self._held_bytes > 0 and self._held_bytes + size_bytes > self._limit_bytes
        if self.waiting >= self._limit or too_large:
            raise NotAdmitted(f"{self.waiting} requests already wait.", retry_after_s=retry_after_s())

    def _count(self, number: int, size_bytes: int) -> None:
        self.waiting += number
        self._held_bytes += size_bytes


def kept_alive(call: Call, keep_alive_s: float) -> Call:
    """`call`, whose streams hear something while they wait for its answer.

    A request that asks for a stream and has no answer after `keep_alive_s` is answered 200 early and
    gets a comment frame as often, until its stream begins; an error is then its last frame. 0: never.
    Whoever lets it wait is told so (`Visit.kept_alive`). One that says itself how long it may wait gets none.
    """
    if not keep_alive_s:
        return call
    in_time = keep_alive_s < PATIENCE_S

    @asynccontextmanager
    async def kept(request: Request) -> AsyncIterator[Reply]:
        if request.visit.wait_s is not None:
            async with call(request) as reply:
                yield reply
            return
        request = replace(request, visit=replace(request.visit, kept_alive=in_time))
        async with _entered(call(request)) as head:
            await asyncio.wait({head}, timeout=keep_alive_s)
            if head.done() or not asks_for_stream(request):
                yield await head
            else:
                async with aclosing(_comments(head, keep_alive_s)) as frames:
                    yield Reply(200, sse.HEADERS, frames)

    return kept


@asynccontextmanager
async def _entered(call: AbstractAsyncContextManager[Reply]) -> AsyncIterator[asyncio.Future[Reply]]:
    """What `call` answers, once it does: it is entered, and left, in a task of its own."""
    head: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
    left = asyncio.Event()

    async def hold() -> None:
        async with call as reply:
            head.set_result(reply)
            await left.wait()

    def ended(task: asyncio.Task[None]) -> None:
        if head.done():
            return
        if task.cancelled():
            head.cancel()
        elif error := task.exception():
            head.set_exception(error)

    task = asyncio.create_task(hold())
    task.add_done_callback(ended)
    try:
        yield head
    except BaseException:
        task.cancel()
        await _ended(task, head)
        raise
    if not head.done():
        task.cancel()
    left.set()
    failed = await _ended(task, head)
    if failed and not head.cancelled() and failed is not head.exception():  # else it was told by `head`
        raise failed


async def _ended(task: asyncio.Task[None], head: asyncio.Future[Reply]) -> BaseException | None:
    """What `task` failed with. Heard here, so that asyncio does not complain that nobody did."""
    await asyncio.wait({task})
    if head.done() and not head.cancelled():
        head.exception()
    return None if task.cancelled() else task.exception()


async def _comments(head: asyncio.Future[Reply], keep_alive_s: float) -> AsyncGenerator[bytes, None]:
    """The frames of a stream that was answered early."""
    while not head.done():
        yield sse.KEEP_ALIVE
        await asyncio.wait({head}, timeout=keep_alive_s)
    async for chunk in _as_frames(head.result()):
        yield chunk


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
