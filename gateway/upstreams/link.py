"""Asks a worker of this machine, all requests on one connection (`handler.wire`)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from gateway.upstreams import WorkerLost
from gateway.upstreams.proxy import CONNECT_TIMEOUT_S, Refused, for_client, for_worker
from handler import wire
from handler.errors import UpstreamFailed
from handler.messages import Headers, Reply, Request

HIGH_WATER_BYTES = 64 * 1024
"""A worker is told to wait with an answer of which so much is unread."""


class Link:
    """Asks the worker that listens at `path`; it is connected to with the first request.

    Leaving a reply tells the worker at once that its client has gone. Raises `WorkerLost` while nothing was
    answered, and `UpstreamFailed` from the frames when the answer is cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end: _End | None = None
        self._opening = asyncio.Lock()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """Answer `request` (a `handler.messages.Call`)."""
        self._in_flight += 1
        self._idle.clear()
        try:
            answer = _Answer(self._ready_end() or await self._open())
            try:
                await answer.ask(request)
                status, headers = await answer.head()
                yield Reply(status, for_client(headers), answer.chunks())
            finally:
                answer.leave()
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    def _ready_end(self) -> _End | None:
        return None if self._end is None or self._end.transport.is_closing() else self._end

    async def _open(self) -> _End:
        async with self._opening:
            if (end := self._ready_end()) is not None:
                return end
            loop = asyncio.get_running_loop()
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    _, self._end = await loop.create_unix_connection(_End, str(self._path))
            except (OSError, TimeoutError) as error:
                raise Refused("The worker could not be reached.") from error
            return self._end

    async def close(self) -> None:
        """Wait for what is in flight to end, then close the connection."""
        try:
            await self._idle.wait()
        finally:
            if self._end is not None:
                self._end.transport.close()


class _End(wire.Wire):
    """The gateway's end of one connection."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[int, _Answer] = {}
        self._asked = 0

    def number(self) -> int:
        """A number that no request has had."""
        self._asked += 1
        return self._asked

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        transport.write(wire.PREFACE)

    def connection_lost(self, exc: Exception | None) -> None:
        """End: no answer goes on."""
        super().connection_lost(exc)
        for answer in self.answers.values():
            answer.cut()
        self.answers.clear()

    def took(self, kind: int, number: int, payload: bytes) -> None:
        """The worker has said this."""
        if (answer := self.answers.get(number)) is None:
            pass
        elif kind == wire.DATA:
            answer.add(payload)
        elif kind == wire.HEAD:
            answer.begin(payload)
        elif kind == wire.END:
            del self.answers[number]
            answer.end()
        elif kind == wire.CUT:
            del self.answers[number]
            answer.cut()


class _Answer:
    """What has come of one answer."""

    def __init__(self, end: _End) -> None:
        self._end = end
        self._number = end.number()
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Future[None] = self._loop.create_future()
        self._head: bytes | None = None
        self._ready: list[bytes] = []
        self._ready_bytes = 0
        self._paused = False
        self._ended = False
        self._cut = False
        end.answers[self._number] = self

    async def ask(self, request: Request) -> None:
        """Send `request`: as fast as the worker reads, or until it has answered."""
        body, size_bytes = request.body, len(request.body)
        head = {
            "method": request.method,
            "path": request.path,
            "query": request.query,
            "headers": for_worker(request.headers),
            "body_bytes": size_bytes,
        }
        self._end.put(wire.ASK, self._number, json.dumps(head).encode())
        if size_bytes <= wire.PIECE_BYTES:
            if body:
                self._end.put(wire.BODY, self._number, body)
            return
        for at in range(0, size_bytes, wire.PIECE_BYTES):
            self._end.put(wire.BODY, self._number, body[at : at + wire.PIECE_BYTES])
            await asyncio.sleep(0)  # it goes out, and others have their say
            await self._end.room.wait()
            if self._ended or self._cut:
                return

    def leave(self) -> None:
        """Nobody reads it any more."""
        if self._end.answers.pop(self._number, None) is not None:
            self._end.put(wire.LEAVE, self._number)

    def begin(self, head: bytes) -> None:
        """Its head has come: that is told with what follows, until which another worker may be asked."""
        self._head = head

    def add(self, chunk: bytes) -> None:
        """A chunk has come."""
        self._ready.append(chunk)
        self._ready_bytes += len(chunk)
        if self._ready_bytes > HIGH_WATER_BYTES and not self._paused:
            self._paused = True
            self._end.put(wire.PAUSE, self._number)
        if not self._news.done():
            self._news.set_result(None)

    def end(self) -> None:
        """That was all."""
        self._ended = True
        self._wake()

    def cut(self) -> None:
        """It breaks off here."""
        self._cut = True
        self._wake()

    def _wake(self) -> None:
        if not self._news.done():
            self._news.set_result(None)

    async def head(self) -> tuple[int, Headers]:
        """Its status and headers, once something has followed them."""
        await self._news
        if self._head is None or not (self._ready or self._ended):
            raise WorkerLost("The worker went away before it answered.")
        head = json.loads(self._head)
        return head["status"], tuple((name.lower(), value) for name, value in head["headers"])

    async def chunks(self) -> AsyncIterator[bytes]:
        """What it says, as it comes."""
        while True:
            if self._ready:
                ready = self._ready[0] if len(self._ready) == 1 else b"".join(self._ready)
                self._ready.clear()
                self._ready_bytes = 0
                if self._paused:
                    self._paused = False
                    self._end.put(wire.RESUME, self._number)
                yield ready
            elif self._ended:
                return
            elif self._cut:
                raise UpstreamFailed("The worker went away while it answered.")
            else:
                self._news = self._loop.create_future()
                await self._news
