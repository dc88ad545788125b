"""How many requests are worked on at once; the others wait their turn, first come first served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from handler.messages import Call, Reply, Request


def limit(call: Call, most: int) -> Call:
    """`call`, at most `most` POSTs at a time on one event loop. What only asks, never waits."""
    slots = asyncio.Semaphore(most)

    @asynccontextmanager
    async def limited(request: Request) -> AsyncIterator[Reply]:
        if request.method != "POST":
            async with call(request) as reply:
                yield reply
            return
        async with slots, call(request) as reply:
            yield reply

    return limited
