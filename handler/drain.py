"""Stop taking, finish what runs, end what is left with a proper error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from handler.errors import NotAdmitted
from handler.messages import Call, Reply, Request

RETRY_AFTER_S = 1
STOPPING = "worker_stopping"
"""The error code of a worker that drains: another one may be asked."""


class Drain:
    """Knows what is in flight on one event loop and ends it in order.

    `wrap` a call, then `await finish(timeout_s)` once: from then on new requests get 503.
    """

    def __init__(self) -> None:
        self._held: set[asyncio.Task[Any]] = set()
        self._stopping = False
        self._expired = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def in_flight(self) -> int:
        """How many requests are held."""
        return len(self._held)

    def wrap(self, call: Call) -> Call:
        """`call`, counted and refused once the drain has begun."""

        @asynccontextmanager
        async def held(request: Request) -> AsyncIterator[Reply]:
            if self._stopping:
                raise _stopped("is stopping")
            task = asyncio.current_task()
            assert task is not None, "a call runs in a task"
            self._held.add(task)
            self._empty.clear()
            try:
                async with call(request) as reply:
                    yield replace(reply, frames=self._until_expired(reply.frames))
            except asyncio.CancelledError:
                self._answer_expiry(task)
                raise
            finally:
                self._held.discard(task)
                if not self._held:
                    self._empty.set()

        return held

    async def finish(self, timeout_s: float) -> int:
        """Refuse what comes, wait for what runs, and end the rest after `timeout_s`.

        Returns how many had to be ended. Each of those gets a 503, or an error frame if its
        stream had begun, and the engine stops generating for it.
        """
        self._stopping = True
        try:
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        except TimeoutError:
            self._expired = True
            left = len(self._held)
            for task in self._held:
                task.cancel()
            await self._empty.wait()
            return left
        return 0

    async def _until_expired(self, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for chunk in frames:
                yield chunk
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None:
                self._answer_expiry(task)
            raise

    def _answer_expiry(self, task: asyncio.Task[Any]) -> None:
        """Turn the cancellation that `finish` sent into an answer; others pass."""
        if self._expired and task in self._held:
            task.uncancel()
            raise _stopped("stopped before this answer was complete") from None


def _stopped(what: str) -> NotAdmitted:
    return NotAdmitted(f"The worker {what}.", retry_after_s=RETRY_AFTER_S, code=STOPPING)
