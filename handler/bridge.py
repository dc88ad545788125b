"""A `Call` from one event loop to another.

The engine has a loop of its own, and so have the SDK of a platform and a server that answers while
the engine loads. A caller that is slower than the engine gets all that has come meanwhile at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from threading import Lock

from handler.errors import RequestError
from handler.messages import Call, Headers, Reply, Request

log = logging.getLogger(__name__)

HIGH_WATER_BYTES = 256 * 1024
"""The engine's side waits once this much is unread: a slow caller slows its own request only."""


def across(call: Call, loop: asyncio.AbstractEventLoop) -> Call:
    """A call for any event loop, answered by `call`, which has to run on `loop`.

    What is ready comes in one piece: of an event stream whole frames, the first of them at once.
    Leaving the reply cancels the work on `loop`, and waits for its end.
    """

    @asynccontextmanager
    async def crossed(request: Request) -> AsyncIterator[Reply]:
        crossing = _Crossing(call, request, loop)
        crossing.start()
        try:
            status, headers = await crossing.head()
            yield Reply(status, headers, crossing.chunks())
        finally:
            await crossing.leave()

    return crossed


class _Crossing:
    """One request on its way between two loops; what both sides change is changed under `_lock`."""

    def __init__(self, call: Call, request: Request, there: asyncio.AbstractEventLoop) -> None:
        self._call = call
        self._request = request
        self._here = asyncio.get_running_loop()
        self._there = there
        self._task: asyncio.Task[None]
        self._room: asyncio.Event
        self._over = asyncio.Event()
        self._lock = Lock()
        self._head: tuple[int, Headers] | None = None
        self._ready: list[bytes] = []
        self._ready_bytes = 0
        self._ended: RequestError | None = None
        self._complete = False
        self._news: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Begin to answer there."""
        self._there.call_soon_threadsafe(self._begin)

    async def leave(self) -> None:
        """End what still runs there, and wait for its end."""
        if not self._over.is_set():
            self._there.call_soon_threadsafe(self._cancel)
            await self._over.wait()

    async def head(self) -> tuple[int, Headers]:
        """Status and headers. Raises what there is in their place."""
        while True:
            news = self._wait()
            with self._lock:
                head, complete = self._head, self._complete
            if head is not None:
                return head
            if complete:
                raise self._ended or _broken()
            await news

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        while True:
            news = self._wait()
            with self._lock:
                ready, self._ready = self._ready, []
                full, self._ready_bytes = self._ready_bytes > HIGH_WATER_BYTES, 0
                complete = self._complete
            if full:
                self._there.call_soon_threadsafe(self._room.set)
            if ready:
                yield b"".join(ready)
            elif complete and self._ended is not None:
                raise self._ended
            elif complete:
                return
            else:
                await news

    def _wait(self) -> asyncio.Future[None]:
        with self._lock:
            self._news = self._here.create_future()
        return self._news

    # --- from here on: on the other loop ------------------------------------------------------

    def _begin(self) -> None:
        self._room = asyncio.Event()
        self._task = asyncio.create_task(self._work())
        self._task.add_done_callback(self._gone)

    def _cancel(self) -> None:
        self._task.cancel()

    def _gone(self, _: asyncio.Task[None]) -> None:
        if not self._complete:  # it was cancelled before its first step
            self._end(_broken())
        self._tell_here(self._over.set)

    async def _work(self) -> None:
        ended: RequestError | None = _broken()
        try:
            async with self._call(self._request) as reply:
                self._change(lambda: setattr(self, "_head", (reply.status, reply.headers)))
                async for chunk in reply.frames:
                    await self._put(chunk)
            ended = None
        except RequestError as error:
            ended = error
        except Exception:  # the boundary of one request: whatever it was, the caller hears of it
            log.exception("request failed")
        finally:
            self._end(ended)

    async def _put(self, chunk: bytes) -> None:
        def put() -> None:
            self._ready.append(chunk)
            self._ready_bytes += len(chunk)

        self._change(put)
        while self._ready_bytes > HIGH_WATER_BYTES:
            self._room.clear()
            if self._ready_bytes > HIGH_WATER_BYTES:  # else it was read between the two looks
                await self._room.wait()

    def _end(self, ended: RequestError | None) -> None:
        def end() -> None:
            self._ended = ended
            self._complete = True

        self._change(end)

    def _change(self, change: Callable[[], None]) -> None:
        with self._lock:
            change()
            news, self._news = self._news, None
        if news is not None:  # else the caller does not wait; it looks before it does
            self._tell_here(lambda: None if news.done() else news.set_result(None))

    def _tell_here(self, what: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the caller's loop is closed: nobody waits
            self._here.call_soon_threadsafe(what)


def _broken() -> RequestError:
    return RequestError("The engine failed while it answered this request.", code="internal_error")
