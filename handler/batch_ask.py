"""One line of a batch, asked until its answer is its own: not that of a worker without room or at its end."""

from __future__ import annotations

import asyncio
import json
import math

from handler.batch_lines import Item, Outcome, answered
from handler.errors import EngineDead, RequestError
from handler.messages import Call, Headers, Request, first, read

TRIES = 3
"""How often a line is asked whose answers blame the server."""
BUSY = frozenset({429, 503})
"""What says that there is no room now: such a line is asked again for as long as it takes."""
LATE = 504
"""With a `Retry-After`, that its turn did not come: as above. Without one its answer took too long."""
BUSY_MAX_S = 30.0


class Asker:
    """Asks `call`; after `pause_s`, and then twice as long each time, what has to be asked again."""

    def __init__(self, call: Call, pause_s: float) -> None:
        self._call = call
        self._pause_s = pause_s
        self.fault_s = -math.inf
        """When, by the loop's clock, an answer blamed the server."""

    async def ask(self, item: Item) -> Outcome:
        """What comes of a line. Raises `EngineDead`: that is no fault of the line."""
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
