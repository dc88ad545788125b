"""How many requests are worked on at once; the others wait their turn, first come first served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from handler.messages import PATIENCE_S, Call, Reply, Request
from handler.waiting import WAITING_MAX, WAITING_MAX_BYTES, Room

RETRY_AFTER_S = 5.0
"""When there may be room again: a guess, for nobody knows how long answers get."""


def limit(call: Call, most: int, *, waiting_max: int = WAITING_MAX, wait_s: float = PATIENCE_S) -> Call:
    """`call`, at most `most` POSTs at a time on one event loop. What only asks, never waits.

    At most `waiting_max` wait, each for `wait_s` from its arrival. Raises `NotAdmitted` and
    `DeadlineExceeded`.
    """
    slots = asyncio.Semaphore(most)
    room = Room(limit=waiting_max, limit_bytes=WAITING_MAX_BYTES)

    @asynccontextmanager
    async def limited(request: Request) -> AsyncIterator[Reply]:
        if request.method != "POST":
            async with call(request) as reply:
                yield reply
            return
        if slots.locked():
            await room.wait(slots.acquire, request, timeout_s=wait_s, retry_after_s=lambda: RETRY_AFTER_S)
        else:
            await slots.acquire()
        try:
            async with call(request) as reply:
                yield reply
        finally:
            slots.release()

    return limited
