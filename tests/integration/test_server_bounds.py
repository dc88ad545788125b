"""`handler.server` against strangers: what a connection may have it hold before a request has been let in."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from handler.asgi import Message, Receive, Send
from handler.listener import listen_unix
from handler.server import HEAD_MAX_BYTES, PIPELINED_MAX, Server, config

HEAD = b"POST /held HTTP/1.1\r\nhost: worker\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
READ_MAX_BYTES = 1 << 20
"""More than any loop reads at once."""
LONG_S = 3600


@dataclass
class Served:
    """A server whose application answers `/` once it has the body, `/held` never, `/endless` for ever."""

    path: Path
    count: int = 0
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, scope: Message, receive: Receive, send: Send) -> None:
        """The application."""
        self.count += 1
        self.begun.set()
        if scope["path"] == "/held":
            await _gone(receive)
            self.left.set()
            return
        if scope["path"] == "/endless":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            gone = asyncio.create_task(_gone(receive))
            while not gone.done():
                await send({"type": "http.response.body", "body": b"a" * 4096, "more_body": True})
                await asyncio.sleep(0)
            self.left.set()
            return
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to it."""
        return await asyncio.open_unix_connection(self.path)

    async def told(self, pieces: Iterable[bytes]) -> tuple[bytes, int]:
        """What comes back for `pieces` until the server ends the connection, and how many were sent."""
        reader, writer = await self.connect()
        sent = 0
        with suppress(ConnectionError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                sent += len(piece)
                if reader.at_eof():
                    break
        try:
            answer = await reader.read()
        except ConnectionError:
            answer = b""
        writer.close()
        return answer, sent


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def served(folder: Path, idle_s: int = LONG_S) -> AsyncIterator[Served]:
    """Such a server, which keeps idle connections for `idle_s`."""
    it = Served(folder / "server.sock")

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        await it.answer(scope, receive, send)

    server = Server(config(app, idle_s=idle_s, shutdown_s=1))
    with listen_unix(it.path) as listener:
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield it
        finally:
            server.should_exit = True
            await task


@pytest.mark.parametrize(
    "begun",
    [
        pytest.param(b"GET /", id="a request line"),
        pytest.param(b"GET / HTTP/1.1\r\nhost: worker\r\nx: ", id="a header"),
        pytest.param(CHUNKED + b"0\r\nx: ", id="a trailer"),
        pytest.param(CHUNKED + b"1;", id="an extension of a chunk"),
    ],
)
async def test_what_has_no_end_is_ended(tmp_path: Path, begun: bytes) -> None:
    """However much a client has to say, no more is held than the bound and what one read brings."""
    async with served(tmp_path) as it:
        _, sent = await it.told([begun, *itertools.repeat(b"a" * 4096, 4096)])
        assert sent < 4096 * 4096
        status, _ = await it.told([b"GET / HTTP/1.1\r\nhost: worker\r\nconnection: close\r\n\r\n"])
        assert status.startswith(b"HTTP/1.1 204"), "others are answered"


async def test_headers_without_end_are_told(tmp_path: Path) -> None:
    """Many small ones too; who still reads hears a 431."""
    async with served(tmp_path) as it:
        reader, writer = await it.connect()
        writer.write(b"GET / HTTP/1.1\r\nhost: worker\r\n")
        while not reader.at_eof() and not reader._buffer:  # type: ignore[attr-defined]
            writer.write(b"x: y\r\n" * 500)
            await writer.drain()
            await asyncio.sleep(0)
        assert (await reader.readline()).startswith(b"HTTP/1.1 431")
        writer.close()
        assert not it.count


async def test_long_heads_and_large_bodies_are_no_attack(tmp_path: Path) -> None:
    """Up to the bound a head may come in pieces; a body may be as large as the application takes."""
    head = b"GET / HTTP/1.1\r\nhost: worker\r\nconnection: close\r\nx: "
    async with served(tmp_path) as it:
        pieces = [head, *[b"a" * 1000] * ((HEAD_MAX_BYTES - 1000) // 1000), b"\r\n\r\n"]
        assert (await it.told(pieces))[0].startswith(b"HTTP/1.1 204")
        body = [b"POST / HTTP/1.1\r\nhost: worker\r\nconnection: close\r\ncontent-length: 4096000\r\n\r\n"]
        assert (await it.told(body + [b"a" * 4096] * 1000))[0].startswith(b"HTTP/1.1 204")


async def test_a_pipeline_without_end_is_ended(tmp_path: Path) -> None:
    """Requests behind one that is answered are held, but not as many as anyone likes; the first hears it."""
    async with served(tmp_path) as it:
        await it.told([HEAD + b"\r\n" + b"GET / HTTP/1.1\r\nhost: worker\r\n\r\n" * (PIPELINED_MAX + 1)])
        await it.left.wait()
        assert it.count == 1


async def test_the_end_of_a_connection_is_told_to_what_is_answered(tmp_path: Path) -> None:
    """And not to the last that was asked for only."""
    async with served(tmp_path) as it:
        _, writer = await it.connect()
        writer.write(HEAD + b"\r\n" + b"GET / HTTP/1.1\r\nhost: worker\r\n\r\n")
        await it.begun.wait()
        writer.close()
        await it.left.wait()


@pytest.mark.parametrize("said", [b"", b"\r\n", b"GET / HTTP/1.1\r\nhost:"])
async def test_a_connection_without_a_request_is_ended(tmp_path: Path, said: bytes) -> None:
    """As one that is idle after a request is: a stranger can't hold all that a process may have open."""
    async with served(tmp_path, idle_s=1) as it:
        answer, _ = await it.told([said])
        assert answer == b""
        assert not it.count


async def test_a_client_that_does_not_read_is_left(tmp_path: Path) -> None:
    """What makes its answer hears that it has gone; one that reads has it for as long as it lasts."""
    async with served(tmp_path, idle_s=1) as it:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        with sock:
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, str(it.path))
            await loop.sock_sendall(sock, b"GET /endless HTTP/1.1\r\nhost: worker\r\n\r\n")
            await it.left.wait()
