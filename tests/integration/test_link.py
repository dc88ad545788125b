"""A link from end to end: the gateway's on one side, the worker's server on the other, a socket between."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from gateway.upstreams import WorkerLost
from gateway.upstreams.link import Link
from gateway.upstreams.proxy import Refused
from handler import wire
from handler.asgi import Message, Receive, Send
from handler.errors import BadRequest, UpstreamFailed
from handler.listener import listen, listen_unix
from handler.messages import Request, read
from handler.server import Server, config
from tests.until import until

LARGE_BYTES = 8 << 20
JSON = [(b"Content-Type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


@dataclass
class App:
    """An application that answers by path, and tells what it sees."""

    seen: list[str] = field(default_factory=list)
    scopes: list[Message] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    sent_bytes: int = 0
    open: asyncio.Event = field(default_factory=asyncio.Event)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, what: str) -> None:
        """Tell it to whoever waits in `saw`."""
        self.seen.append(what)
        self.news.set()

    async def saw(self, what: str) -> None:
        """Return once it has."""
        while what not in self.seen:
            self.news.clear()
            await self.news.wait()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer."""
        self.scopes.append(scope)
        await getattr(self, scope["path"].strip("/"))(receive, send)

    async def echo(self, receive: Receive, send: Send) -> None:
        """Say what was asked."""
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.bodies.append(body)
        self.tell(f"read {len(body)}")
        headers = [*JSON, (b"date", b"today"), (b"connection", b"close"), (b"X-Made", b"h\xe9re")]
        await send({"type": "http.response.start", "status": 201, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def stream(self, receive: Receive, send: Send) -> None:
        """Two frames, the second once it is let."""
        await receive()
        self.tell("began")
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        gone = asyncio.ensure_future(receive())
        going = asyncio.ensure_future(self.open.wait())
        await asyncio.wait({gone, going}, return_when=asyncio.FIRST_COMPLETED)
        going.cancel()
        if gone.done():
            self.tell(gone.result()["type"])
            return
        await send({"type": "http.response.body", "body": b"data: 2\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        self.tell((await gone)["type"])

    async def silent(self, receive: Receive, send: Send) -> None:
        """Nothing until its client is gone."""
        await receive()
        self.tell("began")
        self.tell((await receive())["type"])

    async def large(self, receive: Receive, send: Send) -> None:
        """More than a slow reader reads."""
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": JSON})
        await send({"type": "http.response.body", "body": b"x" * LARGE_BYTES})
        self.tell("sent")

    async def flood(self, receive: Receive, send: Send) -> None:
        """The same in frames."""
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        for _ in range(LARGE_BYTES >> 10):
            self.sent_bytes += 1 << 10
            frame = b"data: " + b"x" * ((1 << 10) - 8) + b"\n\n"
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        self.tell("sent")

    async def full(self, receive: Receive, send: Send) -> None:
        """Too large, says who has not read it."""
        self.tell("refused")
        await send({"type": "http.response.start", "status": 413, "headers": JSON})
        await send({"type": "http.response.body", "body": b"{}"})

    async def raises(self, receive: Receive, send: Send) -> None:
        """A fault before anything is said."""
        raise ValueError("at once")

    async def says_nothing(self, receive: Receive, send: Send) -> None:
        """It returns."""

    async def breaks(self, receive: Receive, send: Send) -> None:
        """A fault in the middle."""
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        raise ValueError("in the middle")

    async def forgets(self, receive: Receive, send: Send) -> None:
        """An answer without an end."""
        await send({"type": "http.response.start", "status": 200, "headers": JSON})
        await send({"type": "http.response.body", "body": b"[", "more_body": True})


@dataclass
class Stage:
    """A worker's server and the link to it."""

    app: App
    link: Link
    server: Server
    path: Path

    def connections(self) -> int:
        """How many the server has."""
        return len(self.server.server_state.connections)


@asynccontextmanager
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    """Both ends."""
    app, path = App(), tmp_path / "worker.sock"
    server = Server(config(app, shutdown_s=2, links=True))
    serving = asyncio.create_task(server.serve(sockets=[listen_unix(path)]))
    link = Link(path)
    try:
        yield Stage(app, link, server, path)
    finally:
        app.open.set()
        await link.close()
        server.should_exit = True
        await serving


def post(path: str, body: bytes = b"{}") -> Request:
    """A request."""
    return Request("POST", f"/{path}", (("x-mine", "\xe9"), ("authorization", "Bearer no")), body, "a=%20b")


async def test_it_says_what_http_says(tmp_path: Path) -> None:
    """Method, path, query, headers and body there; status, headers and body back."""
    async with stage(tmp_path) as on, on.link.call(post("echo", b"\x00body")) as reply:
        assert (reply.status, await read(reply)) == (201, b"\x00body")
        assert reply.headers == (("content-type", "application/json"), ("x-made", "h\xe9re"))
        (scope,) = on.app.scopes
        assert (scope["method"], scope["path"], scope["query_string"]) == ("POST", "/echo", b"a=%20b")
        assert scope["headers"] == [(b"x-mine", b"\xe9")]
        assert on.app.bodies == [b"\x00body"]


async def test_all_requests_have_one_connection(tmp_path: Path) -> None:
    """However many there are at once, and one after the other."""
    async with stage(tmp_path) as on:

        async def ask(number: int) -> bytes:
            async with on.link.call(post("echo", b"%d" % number)) as reply:
                return await read(reply)

        for _ in range(2):
            assert await asyncio.gather(*map(ask, range(100))) == [b"%d" % number for number in range(100)]
        assert on.connections() == 1


async def test_http_is_spoken_on_the_same_socket(tmp_path: Path) -> None:
    """Who is no gateway asks as ever."""
    async with stage(tmp_path) as on:
        transport = httpx.AsyncHTTPTransport(uds=str(on.path))
        async with httpx.AsyncClient(transport=transport) as client:
            assert (await client.post("http://worker/echo", content=wire.PREFACE)).content == wire.PREFACE
            assert (await client.post("http://worker/echo", content=b"again")).content == b"again"


async def test_only_a_socket_of_ones_own_has_links() -> None:
    """On a port the preface is no HTTP, like all that is none."""
    listener = listen("127.0.0.1", 0)
    address = listener.getsockname()
    server = Server(config(App()))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    reader, writer = await asyncio.open_connection(*address)
    writer.write(wire.PREFACE)
    assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
    writer.close()
    server.should_exit = True
    await serving


async def test_a_frame_is_there_when_it_is_made(tmp_path: Path) -> None:
    """And not when the next one is."""
    async with stage(tmp_path) as on, on.link.call(post("stream")) as reply:
        assert (reply.streams, await anext(reply.frames)) == (True, b"data: 1\n\n")
        on.app.open.set()
        assert await read(reply) == b"data: 2\n\n"
        await on.app.saw("http.disconnect")  # as with uvicorn, once all is said


@pytest.mark.parametrize("path", ["stream", "silent"])
async def test_who_leaves_is_known_to_have_left(tmp_path: Path, path: str) -> None:
    """The worker hears it while it works, and the connection stays."""
    async with stage(tmp_path) as on:

        async def ask() -> None:
            async with on.link.call(post(path)) as reply:
                async for _ in reply.frames:
                    pass

        asking = asyncio.create_task(ask())
        await on.app.saw("began")
        asking.cancel()
        await on.app.saw("http.disconnect")
        async with on.link.call(post("echo")) as reply:
            assert await read(reply) == b"{}"
        assert on.connections() == 1


async def test_others_have_their_say_while_a_large_body_is_sent(tmp_path: Path) -> None:
    """It goes in pieces."""
    async with stage(tmp_path) as on:

        async def ask(body: bytes) -> None:
            async with on.link.call(post("echo", body)) as reply:
                assert await read(reply) == body

        async with on.link.call(post("echo", b"connected")) as reply:
            await read(reply)
        await asyncio.gather(ask(b"large" * (LARGE_BYTES // 5)), ask(b"small"))
        assert on.app.seen == ["read 9", "read 5", f"read {LARGE_BYTES // 5 * 5}"]


@pytest.mark.parametrize("path", ["large", "flood"])
async def test_a_slow_reader_holds_up_its_own_answer_only(tmp_path: Path, path: str) -> None:
    """What nobody reads is not made, be it one chunk or many."""
    async with stage(tmp_path) as on:
        async with on.link.call(post(path)) as reply:
            first = await anext(reply.frames)
            for _ in range(20):
                async with on.link.call(post("echo")) as other:
                    assert await read(other) == b"{}"
            assert "sent" not in on.app.seen
            assert on.app.sent_bytes < LARGE_BYTES // 4
            assert len(first) + len(await read(reply)) == LARGE_BYTES
        await on.app.saw("sent")


async def test_leaving_an_answer_that_waits_ends_it(tmp_path: Path) -> None:
    """Its application is not left to wait for a reader that is gone."""
    async with stage(tmp_path) as on:
        async with on.link.call(post("flood")) as reply:
            await anext(reply.frames)
            async with on.link.call(post("echo")) as other:
                await read(other)
        await on.app.saw("sent")
        assert on.connections() == 1


async def test_an_answer_may_come_before_the_body_is_sent(tmp_path: Path) -> None:
    """The rest of it is not."""
    async with stage(tmp_path) as on:
        async with on.link.call(post("full", b"x" * LARGE_BYTES)) as reply:
            assert (reply.status, await read(reply)) == (413, b"{}")
        async with on.link.call(post("echo")) as reply:
            assert await read(reply) == b"{}"


@pytest.mark.parametrize("path", ["raises", "says_nothing"])
async def test_a_fault_before_the_answer_is_one(tmp_path: Path, path: str) -> None:
    """As uvicorn has it."""
    async with stage(tmp_path) as on, on.link.call(post(path)) as reply:
        assert (reply.status, await read(reply)) == (500, b"Internal Server Error")


@pytest.mark.parametrize("path", ["breaks", "forgets"])
async def test_an_answer_that_breaks_off_is_not_taken_for_whole(tmp_path: Path, path: str) -> None:
    """What came before is passed on."""
    async with stage(tmp_path) as on:
        async with on.link.call(post(path)) as reply:
            assert await anext(reply.frames)
            with pytest.raises(UpstreamFailed):
                await anext(reply.frames)
        assert on.connections() == 1


@pytest.mark.parametrize(
    "bad",
    [
        Request("POST", "/v1/models/\ud800"),
        Request("POST", "/echo", query="\u20ac"),
        Request("POST", "/echo", (("x-mine", "\u20ac"),)),
    ],
    ids=["path", "query", "header"],
)
async def test_what_no_http_could_say_is_one_request_s_fault(tmp_path: Path, bad: Request) -> None:
    """A job may name any route. Those beside it go on."""
    async with stage(tmp_path) as on, on.link.call(post("stream")) as reply:
        await anext(reply.frames)
        with pytest.raises(BadRequest):
            async with on.link.call(bad):
                pass
        on.app.open.set()
        assert await read(reply) == b"data: 2\n\n"


async def test_nothing_listens(tmp_path: Path) -> None:
    """Which is known at once."""
    link = Link(tmp_path / "nobody.sock")
    with pytest.raises(Refused):
        async with link.call(post("echo")):
            pass
    await link.close()


@asynccontextmanager
async def raw(tmp_path: Path, answers: bytes | None) -> AsyncIterator[tuple[Link, Callable[[], int]]]:
    """A worker that says `answers` to who connects, and ends; for None it only ends. And how many came."""
    path, came = tmp_path / "raw.sock", 0

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal came
        came += 1
        await reader.read(1 << 16)
        if answers:
            writer.write(answers)
        with suppress(ConnectionError):
            await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(accept, str(path))
    link = Link(path)
    try:
        yield link, lambda: came
    finally:
        await link.close()
        server.close()


@pytest.mark.parametrize("answers", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["gone", "http"])
async def test_a_worker_that_goes_before_it_answers_is_lost(tmp_path: Path, answers: bytes | None) -> None:
    """Another may be asked; and this one again, on a new connection."""
    async with raw(tmp_path, answers) as (link, came):
        for _ in range(2):
            with pytest.raises(WorkerLost):
                async with link.call(post("echo")):
                    pass
        assert came() == 2


@pytest.mark.parametrize("turns", range(5))
async def test_a_worker_that_goes_while_it_is_connected_to_is_lost(tmp_path: Path, turns: int) -> None:
    """At whichever moment: nobody waits for what can't come."""
    link = Link(tmp_path / "leaving.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "leaving.sock"))
        listener.listen()

        async def ask() -> None:
            async with link.call(post("echo")):
                pass

        asking = asyncio.create_task(ask())
        for _ in range(turns):
            await asyncio.sleep(0)
    with pytest.raises(WorkerLost):
        await asking
    await link.close()


@asynccontextmanager
async def stopped(tmp_path: Path) -> AsyncIterator[tuple[Link, asyncio.Event]]:
    """A worker that reads nothing, and goes once it is told."""
    path, over = tmp_path / "stopped.sock", asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.transport.abort()

    server = await asyncio.start_unix_server(accept, str(path), limit=1)
    link = Link(path)
    try:
        yield link, over
    finally:
        over.set()
        await link.close()
        server.close()


async def test_who_leaves_a_worker_that_stands_still_takes_nobody_along(tmp_path: Path) -> None:
    """The others wait on, and hear when it is gone."""
    async with stopped(tmp_path) as (link, over):

        async def ask(size_bytes: int) -> None:
            async with link.call(post("echo", b"x" * size_bytes)):
                pass

        leaving, large, small = (asyncio.create_task(ask(size)) for size in (LARGE_BYTES, LARGE_BYTES, 1))
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.sleep(0.05)
        assert not large.done()
        assert not small.done()
        over.set()
        for asking in (large, small):
            with pytest.raises(WorkerLost):
                await asking


async def test_what_nobody_wants_is_not_kept_for_a_worker_that_stands_still(tmp_path: Path) -> None:
    """Clients that ask and leave cost no memory."""
    async with stopped(tmp_path) as (link, _):

        async def ask() -> None:
            async with link.call(post("echo", b"x" * 60_000)):
                pass

        for _ in range(100):
            asking = asyncio.create_task(ask())
            await asyncio.wait({asking}, timeout=0.001)
            asking.cancel()
            await asyncio.wait({asking})
        assert link._connection is not None
        assert link._connection.transport.get_write_buffer_size() < 1 << 20


async def test_a_head_alone_is_no_answer_yet(tmp_path: Path) -> None:
    """Nothing of it has been passed on: another may be asked."""
    head = b'{"status":200,"headers":[]}'
    said = wire._FRAME.pack(wire.HEAD, 1, len(head)) + head
    async with raw(tmp_path, said) as (link, _):
        with pytest.raises(WorkerLost):
            async with link.call(post("echo")):
                pass


def listens(path: Path) -> bool:
    """Whether one can connect there."""
    with socket.socket(socket.AF_UNIX) as probe, suppress(ConnectionRefusedError):
        probe.connect(str(path))
        return True
    return False


async def test_what_runs_is_finished_when_the_worker_drains(tmp_path: Path) -> None:
    """Then the connection ends, and who asks next is refused."""
    async with stage(tmp_path) as on:
        async with on.link.call(post("stream")) as reply:
            assert await anext(reply.frames) == b"data: 1\n\n"
            on.server.should_exit = True
            await asyncio.to_thread(until, lambda: not listens(on.path))
            on.app.open.set()
            assert await read(reply) == b"data: 2\n\n"
        await asyncio.to_thread(until, lambda: not on.connections())
        with pytest.raises(Refused):
            async with on.link.call(post("echo")):
                pass
