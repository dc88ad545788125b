"""Asks one line of a batch until the answer is about the line, and not about a worker that is full."""

from __future__ import annotations

import asyncio
import json
import math

from handler.batch_lines import Item, Outcome, answered
from handler.errors import EngineDead, RequestError
from handler.messages import Call, Headers, Request, first, read

TRIES = 3
"""How often a line is asked whose answers are the server's fault (5xx); the last answer counts."""
BUSY = frozenset({429, 503})
"""Statuses of a worker that is full: the line is asked again for as long as it takes."""
LATE = 504
"""With `Retry-After` the line's turn did not come in time: asked again, as above. Without it, its answer
took too long.
"""
BUSY_MAX_S = 30.0


class Asker:
    """Asks `call`. After a 5xx it asks again in `pause_s`, then in twice as long."""

    def __init__(self, call: Call, pause_s: float) -> None:
        self._call = call
        self._pause_s = pause_s
        self.fault_s = -math.inf
        """When, by the loop's clock, an answer blamed the server."""

    async def ask(self, item: Item) -> Outcome:
        """The outcome of a line. Raises `EngineDead`, which is no fault of the line's."""
        assert item.request is not None, "a line with a fault is not asked"
        tries, pause_s = 0, self._pause_s
        while True:
            status, body, retry_after_s = await self._answer(item.request)
            if status in BUSY or (status == LATE and retry_after_s):
                await asyncio.sleep(min(max(retry_after_s, self._pause_s), BUSY_MAX_S))
                continue
            tries += 1
            if status < 500:
                return answered(item, status, body)
            self.fault_s = asyncio.get_running_loop().time()
            if tries == TRIES:
                return answered(item, status, body)
            await asyncio.sleep(pause_s)
            pause_s *= 2

    async def _answer(self, request: Request) -> tuple[int, bytes, float]:
        try:
            async with self._call(request) as reply:
                return reply.status, await read(reply), _retry_after_s(reply.headers)
        except EngineDead:
            raise
        except RequestError as error:
            return error.status, json.dumps(error.body()).encode(), _retry_after_s(error.headers)


def _retry_after_s(headers: Headers) -> float:
    given = first(headers, "retry-after") or ""
    return float(given) if given.isdecimal() else 0.0
