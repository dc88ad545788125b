"""An OpenAI server that others run, behind the gateway: what stands between is told from what it answers."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import cast

import httpx
import pytest

from gateway.upstreams import WorkerLost
from gateway.upstreams.events import Ended, Event, KeyRefused, KeyTaken, Progress, Ready, Starting
from gateway.upstreams.http import TRIES, HttpPool, Upstream
from handler.errors import DeadlineExceeded, NotAdmitted, UpstreamFailed
from handler.messages import Reply, Request, read
from judge.servers import free_port
from tests.servers import KEY, first_line, program

STOPPING = json.dumps({"error": {"message": "bye", "type": "server_error", "code": "worker_stopping"}})
ERROR = json.dumps({"error": {"message": "it broke", "type": "server_error", "param": None, "code": None}})
MODELS = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
METRICS = '# TYPE vllm:prompt_tokens_total counter\nvllm:prompt_tokens_total{engine="0"} 7.0\n'
STREAM = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def whole(status: str, kind: str, body: str, *headers: str) -> str:
    """One answer as it goes over the wire."""
    lines = [
        f"HTTP/1.1 {status}",
        f"content-type: {kind}",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    return "\r\n".join([*lines, *headers]) + "\r\n\r\n" + body


def chunk(text: str) -> str:
    """A piece of a body whose length nobody knows."""
    return f"{len(text):x}\r\n{text}\r\n"


class Scripted:
    """A server that plays a script for each POST and closes the connection.

    It has its models always, and its metrics.
    """

    def __init__(self, *scripts: str, models: str = MODELS) -> None:
        self.scripts = list(scripts)
        self.models = models
        self.heads: list[str] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                if head.startswith("GET /serve/metrics "):
                    self.heads.append(head)
                    writer.write(whole("200 OK", "text/plain", METRICS).encode())
                    break
                if head.startswith("GET"):
                    writer.write(self.models.encode())
                    continue
                self.heads.append(head)
                length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0])
                await reader.readexactly(length)
                writer.write(self.scripts.pop(0).encode())
                await writer.drain()
                break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def served(scripted: Scripted, port: int = 0) -> AsyncIterator[int]:
    """The port of `scripted`."""
    server = await asyncio.start_server(scripted.answer, "127.0.0.1", port, reuse_address=True)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def pool(
    port: int, *, key: str | None = None, slots: int = 8, timeout_s: float = 20, tell: Callable[[Event], None]
) -> AsyncIterator[HttpPool]:
    """The upstream at `port`, once it is there."""
    upstream = Upstream(f"http://127.0.0.1:{port}/serve/v1", key, slots)
    async with HttpPool(upstream, queue_timeout_s=timeout_s, keep_alive_s=0, tell=tell) as opened:
        yield opened


def chat(body: bytes = b"{}") -> Request:
    """A request of a client's."""
    headers = (("authorization", "Bearer the client's"), ("content-type", "application/json"))
    return Request("POST", "/v1/chat/completions", headers, body)


async def asked(scripted: Scripted, use: Callable[[HttpPool], Coroutine[None, None, None]]) -> list[Event]:
    """What was told while `use` asked a pool in front of `scripted`."""
    events: list[Event] = []
    async with served(scripted) as port, pool(port, tell=events.append) as opened:
        await use(opened)
    assert not scripted.scripts
    return events


async def test_it_is_asked_under_its_own_path_and_key() -> None:
    """The client's key ends at the gateway."""
    scripted = Scripted(whole("200 OK", "application/json", '{"id": 1}'))
    async with (
        served(scripted) as port,
        pool(port, key="theirs", tell=lambda _: None) as opened,
        opened.call(chat()) as reply,
    ):
        assert (reply.status, await read(reply)) == (200, b'{"id": 1}')
    (head,) = scripted.heads
    assert head.startswith("POST /serve/v1/chat/completions HTTP/1.1\r\n")
    assert "Bearer theirs" in head
    assert "the client's" not in head


@pytest.mark.parametrize(
    "lost",
    [
        "",
        whole("500 Internal Server Error", "text/plain", "replica died"),
        whole("502 Bad", "text/html", "<p>"),
        whole("503 Service Unavailable", "application/json", STOPPING),
    ],
    ids=["cut", "bare-500", "bare-502", "draining"],
)
async def test_what_was_not_answered_is_asked_again(lost: str) -> None:
    """Nothing of an answer was there: another of its workers gets the request."""
    scripted = Scripted(lost, lost, whole("200 OK", "application/json", "{}"))

    async def use(opened: HttpPool) -> None:
        async with opened.call(chat()) as reply:
            assert reply.status == 200

    await asked(scripted, use)


async def test_it_is_asked_again_a_few_times_only() -> None:
    """A request that every worker dies of has an end."""

    async def use(opened: HttpPool) -> None:
        with pytest.raises(WorkerLost):
            async with opened.call(chat()):
                pass

    await asked(Scripted(*[""] * TRIES), use)


async def test_an_error_of_the_models_is_an_answer() -> None:
    """OpenAI's shape says whose it is."""

    async def use(opened: HttpPool) -> None:
        async with opened.call(chat()) as reply:
            assert (reply.status, await read(reply)) == (500, ERROR.encode())

    await asked(Scripted(whole("500 Internal Server Error", "application/json", ERROR)), use)


@pytest.mark.parametrize(
    ("answer", "wait_s"),
    [
        (whole("503 Service Unavailable", "text/plain", "full"), "5"),
        (whole("503 Service Unavailable", "text/plain", "full", "retry-after: 17"), "17"),
    ],
)
async def test_a_bare_503_says_when_to_come_again(answer: str, wait_s: str) -> None:
    """In OpenAI's shape, whatever stood there."""

    async def use(opened: HttpPool) -> None:
        with pytest.raises(NotAdmitted) as refused:
            async with opened.call(chat()):
                pass
        assert dict(refused.value.headers)["retry-after"] == wait_s

    await asked(Scripted(answer), use)


async def test_a_503_of_the_models_says_it_too() -> None:
    """It has OpenAI's shape and lacks the header."""

    async def use(opened: HttpPool) -> None:
        async with opened.call(chat()) as reply:
            assert (reply.status, reply.header("retry-after")) == (503, "5")
            assert await read(reply) == ERROR.encode()

    await asked(Scripted(whole("503 Service Unavailable", "application/json", ERROR)), use)


async def test_a_stream_that_is_cut_fails() -> None:
    """After the first byte nobody else is asked: what the client has can't be taken back."""
    scripted = Scripted(STREAM + chunk("data: {}\n\n"))

    async def use(opened: HttpPool) -> None:
        async with opened.call(chat()) as reply:
            frames = reply.frames
            assert await anext(frames) == b"data: {}\n\n"
            with pytest.raises(UpstreamFailed):
                await anext(frames)

    await asked(scripted, use)


async def test_who_comes_while_it_is_away_waits_for_it() -> None:
    """It comes back at the same address, and everybody hears of that."""
    events: list[Event] = []  # but for what it does while it is away

    def tell(event: Event) -> None:
        if not isinstance(event, Progress):
            events.append(event)

    scripted = Scripted(whole("200 OK", "application/json", "{}"))
    port = free_port()
    heard = asyncio.Event()
    async with pool(port, tell=tell) as opened:
        opened.listen(heard.set)
        assert (opened.free, opened.workers[0].state) == (0, "starting")

        async def ask() -> Reply:
            async with opened.call(chat()) as reply:
                return reply

        asking = asyncio.create_task(ask())
        await asyncio.sleep(0)
        async with served(scripted, port):
            assert (await asking).status == 200
        await heard.wait()
        assert [type(event) for event in events] == [Starting, Ready]
        assert (opened.free, opened.workers[0].state) == (8, "ready")
        with pytest.raises(DeadlineExceeded):
            async with opened.call(patient(chat())):  # it has gone again
                pass
        assert [type(event) for event in events] == [Starting, Ready, Ended, Starting]
        assert opened.free == 0


async def test_why_it_is_not_there_is_told_once() -> None:
    """Nobody listens, then what stands before it has none: a slip in its URL is seen in log and status."""
    events: asyncio.Queue[Event] = asyncio.Queue()
    port = free_port()
    async with pool(port, tell=events.put_nowait) as opened:
        assert isinstance(await events.get(), Starting)
        told = [await events.get()]
        assert opened.workers[0].phase == cast("Progress", told[0]).text
        async with served(Scripted(models=whole("502 Bad Gateway", "text/html", "none")), port):
            told.append(await events.get())
    assert [re.sub(r"host .*", "host", cast("Progress", event).text) for event in told] == [
        "waiting for the upstream: Cannot connect to host",
        "waiting for the upstream: it answers with status 502",
    ]


async def refused(opened: HttpPool) -> bytes:
    """What a client hears whose own key is good."""
    async with opened.call(chat()) as reply:
        body = await read(reply)
        assert (reply.status, reply.header("www-authenticate")) == (502, None)
    assert json.loads(body)["error"]["code"] == "upstream_unauthorized"
    return body


async def test_a_key_that_it_refuses_is_the_gateways_fault() -> None:
    """A 401 would tell clients that theirs is wrong. It is told once, and over with the first good answer."""
    unauthorized = whole("401 Unauthorized", "application/json", ERROR, "www-authenticate: Bearer")
    forbidden = whole("403 Forbidden", "application/json", '{"message": "Forbidden"}')
    good = whole("200 OK", "application/json", "{}")

    async def use(opened: HttpPool) -> None:
        for _ in range(2):
            said = await refused(opened)
        assert opened.refusal is not None
        assert opened.refusal.message in said.decode()
        assert opened.free == 8  # the next is asked all the same
        async with opened.call(chat()) as reply:
            assert reply.status == 200
        assert opened.refusal is None

    events = await asked(Scripted(unauthorized, forbidden, good), use)
    assert [type(event) for event in events] == [Starting, Ready, KeyRefused, KeyTaken]


async def test_a_403_of_the_models_is_an_answer() -> None:
    """What moderation does not let through is about the request, and in OpenAI's shape."""

    async def use(opened: HttpPool) -> None:
        async with opened.call(chat()) as reply:
            assert (reply.status, await read(reply)) == (403, ERROR.encode())
        assert opened.refusal is None

    await asked(Scripted(whole("403 Forbidden", "application/json", ERROR)), use)


async def test_a_key_that_its_models_refuse_is_told_before_anybody_asks() -> None:
    """It is there, and requests hear at once what is wrong."""
    events: asyncio.Queue[Event] = asyncio.Queue()
    unauthorized = whole("401 Unauthorized", "application/json", ERROR)
    async with (
        served(Scripted(unauthorized, models=unauthorized)) as port,
        pool(port, key="wrong", tell=events.put_nowait) as opened,
    ):
        told = [await events.get() for _ in range(3)]
        assert [type(event) for event in told] == [Starting, Ready, KeyRefused]
        assert opened.refusal is not None
        assert "mend UPSTREAM_KEY" in opened.refusal.message
        await refused(opened)
        assert events.empty()


async def test_who_finds_it_away_as_the_gateway_stops_is_told_so() -> None:
    """Nobody waits for it any more, and nobody looks for it."""
    events: list[Event] = []
    async with AsyncExitStack() as stack:
        async with served(Scripted(whole("200 OK", "application/json", "{}"))) as port:
            opened = await stack.enter_async_context(pool(port, tell=events.append))

            async def ask() -> None:
                async with opened.call(chat()):
                    pass

            await ask()  # its connection is closed with it
        asking = asyncio.create_task(ask())
        await asyncio.sleep(0)  # it is being connected
        opened.stop_taking()
        with pytest.raises(NotAdmitted, match="stopping"):
            await asking
    assert [type(event) for event in events] == [Starting, Ready]


def patient(request: Request) -> Request:
    """`request`, which has waited for nearly as long as it may."""
    loop = asyncio.get_running_loop()
    object.__setattr__(request.visit, "arrived_s", loop.time() - 19.8)
    return request


async def test_each_request_has_a_connection_of_its_own() -> None:
    """What balances connections sends the next request to another worker, and a new one gets its share."""
    connections: list[asyncio.Task[None] | None] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.current_task())
        with suppress(asyncio.IncompleteReadError):
            while True:  # as long as the other side wants to keep it
                await reader.readuntil(b"\r\n\r\n")
                writer.write(MODELS.encode())
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, pool(server.sockets[0].getsockname()[1], tell=lambda _: None) as opened:
        for number in range(1, 4):
            async with opened.call(Request("GET", "/v1/models")) as reply:
                assert await read(reply) == b"{}"
            assert len(connections) == number + 1  # and the one that asked whether it is there
    await asyncio.gather(*filter(None, connections))


async def test_it_has_as_many_places_as_it_was_given() -> None:
    """The others wait at the gateway, where turns are fair."""
    scripted = Scripted(STREAM + chunk("data: {}\n\n") + "0\r\n\r\n")
    async with served(scripted) as port, pool(port, slots=1, tell=lambda _: None) as opened:
        async with opened.call(chat()):
            assert (opened.free, opened.capacity, opened.workers[0].in_flight) == (0, 1, 1)
        assert opened.free == 1


@pytest.mark.parametrize("switch", ["on", "off"])
async def test_the_gateway_has_its_metrics_where_it_is_one_process(tmp_path: Path, switch: str) -> None:
    """Under its own path and with its key, only if it is said to be one: of many each would have its turn."""
    scripted = Scripted()
    async with served(scripted) as port:
        environ = {
            "PATH": os.environ["PATH"],
            "UPSTREAM": "http",
            "UPSTREAM_URL": f"http://127.0.0.1:{port}/serve/v1",
            "UPSTREAM_KEY": "theirs",
            "UPSTREAM_METRICS": switch,
            "MODEL_NAME": "m",
            "PORT": "0",
            "API_KEY": KEY,
            "DATA_DIR": f"{tmp_path}/data",
        }
        with program("gateway", environ, tmp_path) as (process, errors):
            line = await asyncio.to_thread(first_line, process, "/openai/v1", errors)
            base = next(word for word in line.split() if word.startswith("http://")).partition("/v2/")[0]
            async with httpx.AsyncClient(headers={"authorization": f"Bearer {KEY}"}) as client:
                text = (await client.get(f"{base}/metrics")).text
    own = 'vllm:prompt_tokens_total{endpoint="local",engine="0",worker="upstream"} 7.0'
    assert (own in text.splitlines()) == (switch == "on")
    keyed = ["authorization: bearer theirs" in head.lower() for head in scripted.heads]
    assert keyed == ([True] if switch == "on" else [])
