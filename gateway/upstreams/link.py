"""Asks a worker of this machine, all requests on one connection (`handler.wire`)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from gateway.counted import Inside
from gateway.upstreams import WorkerLost
from gateway.upstreams.proxy import CONNECT_TIMEOUT_S, Refused, for_client, for_worker
from handler import wire
from handler.errors import BadRequest, UpstreamFailed
from handler.messages import Headers, Reply, Request

HIGH_WATER_BYTES = 64 * 1024
"""A worker is told to wait with an answer of which so much is unread; what is on its way still comes."""


class Link:
    """Asks the worker that listens at `path`; it is connected to with the first request.

    Leaving a reply tells the worker at once that its client has gone. Raises `WorkerLost` while nothing was
    answered, and `UpstreamFailed` from the frames when the answer is cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        self._inside = Inside()

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """Answer `request` (a `handler.messages.Call`)."""
        with self._inside:
            answer = _Answer(self._connected() or await self._connect())
            try:
                await answer.ask(request)
                status, headers = await answer.head()
                yield Reply(status, for_client(headers), answer.chunks())
            finally:
                answer.leave()

    def _connected(self) -> _Connection | None:
        connection = self._connection
        return None if connection is None or connection.transport.is_closing() else connection

    async def _connect(self) -> _Connection:
        async with self._connecting:
            if (connection := self._connected()) is not None:
                return connection
            loop = asyncio.get_running_loop()
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    _, connection = await loop.create_unix_connection(
                        lambda: _Connection(f"the worker at {self._path.name}"), str(self._path)
                    )
            except (OSError, TimeoutError) as error:
                raise Refused("The worker could not be reached.") from error
            if connection.transport.is_closing():  # it was, and is gone by now
                raise Refused("The worker could not be reached.")
            self._connection = connection
            return connection

    async def close(self) -> None:
        """Wait for what is in flight to end, then close the connection."""
        try:
            await self._inside.empty()
        finally:
            if self._connection is not None:
                self._connection.transport.close()


class _Connection(wire.Wire):
    """The gateway's end of one connection."""

    def __init__(self, peer: str) -> None:
        super().__init__(peer)
        self.answers: dict[int, _Answer] = {}
        self._asked = 0

    def number(self) -> int:
        """One that no request has had for a very long time."""
        self._asked = self._asked % wire.NUMBER_MAX + 1
        return self._asked

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        transport.write(wire.PREFACE)

    def connection_lost(self, exc: Exception | None) -> None:
        """End: no answer goes on."""
        for answer in self.answers.values():
            answer.cut()
        self.answers.clear()
        super().connection_lost(exc)

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

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._number = connection.number()
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Future[None] = self._loop.create_future()
        self._head: bytes | None = None
        self._ready: list[bytes] = []
        self._ready_bytes = 0
        self._paused = False
        self._ended = False
        self._cut = False
        connection.answers[self._number] = self

    async def ask(self, request: Request) -> None:
        """Send `request`: as fast as the worker reads, or until it has answered.

        Raises `BadRequest` if it says what can't be sent.
        """
        head, body = _head(request), request.body
        await self._connection.room.wait()
        if self._cut:
            return
        self._connection.put(wire.ASK, self._number, head)
        if body and len(body) <= wire.PIECE_BYTES:
            self._connection.put(wire.BODY, self._number, body)
            return
        for at in range(0, len(body), wire.PIECE_BYTES):
            self._connection.put(wire.BODY, self._number, body[at : at + wire.PIECE_BYTES])
            await asyncio.sleep(0)  # it goes out, and others have their say
            await self._connection.room.wait()
            if self._ended or self._cut:
                return

    def leave(self) -> None:
        """Nobody reads it any more."""
        if self._connection.answers.pop(self._number, None) is not None:
            self._connection.put(wire.LEAVE, self._number)

    def begin(self, head: bytes) -> None:
        """Its head has come: that is told with what follows, until which another worker may be asked."""
        self._head = head

    def add(self, chunk: bytes) -> None:
        """A chunk has come."""
        self._ready.append(chunk)
        self._ready_bytes += len(chunk)
        if self._ready_bytes > HIGH_WATER_BYTES and not self._paused:
            self._paused = True
            self._connection.put(wire.PAUSE, self._number)
        self._wake()

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
                    self._connection.put(wire.RESUME, self._number)
                yield ready
            elif self._ended:
                return
            elif self._cut:
                raise UpstreamFailed("The worker went away while it answered.")
            else:
                self._news = self._loop.create_future()
                await self._news


def _head(request: Request) -> bytes:
    headers = for_worker(request.headers)
    try:
        request.path.encode()
        "".join([request.query, *(text for pair in headers for text in pair)]).encode("latin-1")
    except UnicodeEncodeError:
        raise BadRequest("Something in the request is no text that could be sent.") from None
    head = {
        "method": request.method,
        "path": request.path,
        "query_string": request.query,
        "headers": headers,
        "body_bytes": len(request.body),
    }
    return json.dumps(head).encode()
