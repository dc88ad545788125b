"""How many requests are inside a call, and when the last of them has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from handler.messages import Call, Reply, Request


class Inside:
    """How many are in a `with` of this now: `number`."""

    def __init__(self) -> None:
        self.number = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def __enter__(self) -> None:
        self.number += 1
        self._empty.clear()

    def __exit__(self, *_: object) -> None:
        self.number -= 1
        if not self.number:
            self._empty.set()

    async def empty(self) -> None:
        """Return once none is."""
        await self._empty.wait()


class Counted:
    """`call`, with the `number` of requests that are inside, those included that read an answer."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._inside = Inside()

    @property
    def number(self) -> int:
        """How many are inside now."""
        return self._inside.number

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """Answer `request` (a `handler.messages.Call`)."""
        with self._inside:
            async with self._call(request) as reply:
                yield reply

    async def empty(self, *, unless: asyncio.Event, timeout_s: float) -> None:
        """Return once none is inside, `unless` is set, or `timeout_s` are over."""
        ends = [asyncio.ensure_future(end) for end in (self._inside.empty(), unless.wait())]
        try:
            await asyncio.wait(ends, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
