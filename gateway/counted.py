"""How many requests are inside a call, and when the last of them has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from handler.messages import Call, Reply, Request


class Counted:
    """`call`, with the `number` of requests that are inside, those included that read an answer."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._empty = asyncio.Event()
        self._empty.set()
        self.number = 0

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """Answer `request` (a `handler.messages.Call`)."""
        self.number += 1
        self._empty.clear()
        try:
            async with self._call(request) as reply:
                yield reply
        finally:
            self.number -= 1
            if not self.number:
                self._empty.set()

    async def empty(self, *, unless: asyncio.Event, timeout_s: float) -> None:
        """Return once none is inside, `unless` is set, or `timeout_s` are over."""
        ends = [asyncio.ensure_future(event.wait()) for event in (self._empty, unless)]
        try:
            await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
