"""A thousand jobs through the real SDK: each answered once, whatever becomes of the worker.

The engine is an application in this process, which says what it was asked and counts.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.servers import tree
from handler import sse
from handler.asgi import Message, Receive, Send, call_app, serve
from handler.listener import listen_unix
from handler.server import Server as HttpServer
from handler.server import config
from tests.servers import KEY, ROOT, Server, engine_environ, first_line, program

JOBS = 1000
AT_ONCE = 16
FRAMES = 5
LEASE_S = 280.0
"""Nothing may take longer than this, which is far more than all of it takes."""

pytestmark = pytest.mark.timeout(300)


@dataclass
class Echo:
    """Answers each job with its own name; of each it knows how often it was begun and finished."""

    begun: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    most_at_once: int = 0
    at_once: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """A stream says its first frame, and the rest once this is set."""
    taken: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    """Released by each job that has begun."""
    left: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    """Released by each job whose end has come."""

    async def __call__(self, _: Message, receive: Receive, send: Send) -> None:
        """Answer one job."""
        body = json.loads((await receive())["body"])
        name = body["messages"][0]["content"]
        self.begun[name] += 1
        self.taken.release()
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            answering = asyncio.ensure_future(self._answer(name, send, streamed=body["stream"]))
            leaving = asyncio.ensure_future(receive())
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            answering.cancel()
            leaving.cancel()
        finally:
            self.at_once -= 1
            self.left.release()

    async def _answer(self, name: str, send: Send, *, streamed: bool) -> None:
        await (self._stream if streamed else self._whole)(name, send)
        self.finished[name] += 1

    async def _whole(self, name: str, send: Send) -> None:
        headers = [(b"content-type", b"application/json")]
        await self.gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"said": name}).encode()})

    async def _stream(self, name: str, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number in range(FRAMES):
            frame = sse.event({"said": name, "number": number})
            await send({"type": "http.response.body", "body": frame, "more_body": True})
            await self.gate.wait()
        await send({"type": "http.response.body", "body": sse.DONE})


@dataclass
class Asked:
    """What a client has heard of one job."""

    name: str
    streamed: bool
    status: int = 0
    body: bytes = b""
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once something of the answer has come."""

    async def ask(self, http: httpx.AsyncClient) -> None:
        """Ask, and keep what is answered as it comes."""
        body = {"messages": [{"role": "user", "content": self.name}], "stream": self.streamed}
        async with http.stream("POST", "chat/completions", json=body) as reply:
            self.status = reply.status_code
            async for chunk in reply.aiter_bytes():
                self.body += chunk
                if self.said:
                    self.heard.set()

    @property
    def said(self) -> bytes:
        """The body without the comments that a stream hears while it waits."""
        return self.body.replace(sse.KEEP_ALIVE, b"")

    @property
    def whole(self) -> bool:
        """Whether this is all of the right answer and nothing else."""
        if not self.streamed:
            return self.status == 200 and json.loads(self.said) == {"said": self.name}
        frames = [sse.event({"said": self.name, "number": number}) for number in range(FRAMES)]
        return (self.status, self.said) == (200, b"".join([*frames, sse.DONE]))

    @property
    def broken(self) -> bool:
        """Whether this is the beginning of the right answer and then one error frame."""
        *frames, last = sse.split(self.said)
        said = [sse.event({"said": self.name, "number": number}) for number in range(len(frames))]
        return bool(frames) and frames == said and sse.data(last)["error"]["code"] == "upstream_failed"


@dataclass(frozen=True)
class Path_:  # noqa: N801 - `Path` is pathlib's
    """A gateway in front of one worker of the real SDK."""

    server: Server
    gateway_pid: int

    def http(self) -> httpx.AsyncClient:
        """A client that asks all at once."""
        return httpx.AsyncClient(
            base_url=self.server.base_url,
            headers={"authorization": f"Bearer {self.server.key}"},
            limits=httpx.Limits(max_connections=None),
            timeout=LEASE_S,
        )

    @property
    def health_url(self) -> str:
        """What tells how many jobs are in line."""
        return str(httpx.URL(self.server.base_url).join("/health"))

    def worker_pid(self) -> int:
        """The worker's process, which is the gateway's only child."""
        children = [
            pid
            for pid in tree(self.gateway_pid)
            if b"tests.jobs_worker\0" in _command(pid) and _parent(pid) == self.gateway_pid
        ]
        (pid,) = children
        return pid


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@contextmanager
def path(folder: Path, **settings: str) -> Iterator[Path_]:
    """The gateway, ready."""
    environ = {**engine_environ(ROOT), "PORT": "0", "API_KEY": KEY, "TMPDIR": str(folder)}
    environ |= {"DATA_DIR": str(folder / "data")}
    environ |= {"WARM_PARENT": "off", "ENGINE_SOCKET": str(folder / "engine.sock")}
    environ |= {"CAPACITY": str(AT_ONCE), "QUEUE_LIMIT": str(JOBS), **settings}
    with program("tests.jobs_worker", environ, folder, "gateway") as (process, errors):
        ready = first_line(process, "/openai/v1", errors)
        url = next(word for word in ready.split() if word.startswith("http://"))
        yield Path_(Server(url), process.pid)


@asynccontextmanager
async def engine(app: Any, folder: Path) -> AsyncIterator[None]:
    """`app` at the socket that the worker asks."""
    asgi = serve(call_app(app), max_body_bytes=1 << 20)
    server = HttpServer(config(asgi, idle_s=5, shutdown_s=1, links=True))
    serving = asyncio.create_task(server.serve(sockets=[listen_unix(folder / "engine.sock")]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as name:
        yield Path(name)


def jobs() -> list[Asked]:
    """Every second one is a stream."""
    return [Asked(f"job-{number}", streamed=number % 2 == 1) for number in range(JOBS)]


async def test_a_thousand_jobs_are_answered_once_each(folder: Path) -> None:
    """All asked for at once, sixteen worked on at a time."""
    app, asked = Echo(), jobs()
    app.gate.set()
    with path(folder) as gateway:
        async with engine(app, folder), asyncio.timeout(LEASE_S), gateway.http() as http:
            await asyncio.gather(*(one.ask(http) for one in asked))
    assert [one.name for one in asked if not one.whole] == []
    assert app.begun == app.finished == Counter(one.name for one in asked)
    assert app.most_at_once == AT_ONCE


async def test_a_worker_that_is_killed_loses_no_job(folder: Path) -> None:
    """What had no first byte is asked of the next worker, a stream that had one ends with an error frame.

    The line is exactly full when it happens.
    """
    app, asked = Echo(), jobs()
    in_line = JOBS - AT_ONCE
    with path(folder, QUEUE_LIMIT=str(in_line)) as gateway:
        async with engine(app, folder), asyncio.timeout(LEASE_S), gateway.http() as http:
            asking = [asyncio.create_task(one.ask(http)) for one in asked[:AT_ONCE]]
            for _ in range(AT_ONCE):
                await app.taken.acquire()
            asking += [asyncio.create_task(one.ask(http)) for one in asked[AT_ONCE:]]
            while (await http.get(gateway.health_url)).json()["endpoints"][0]["waiting"] < in_line:
                pass
            begun = [one for one in asked if app.begun[one.name]]
            await asyncio.gather(*(one.heard.wait() for one in begun if one.streamed))
            os.kill(gateway.worker_pid(), signal.SIGKILL)
            for one, task in zip(asked, asking, strict=True):
                if one in begun and one.streamed:
                    await task
            for _ in range(AT_ONCE):  # what the dead worker had is over
                await app.left.acquire()
            app.gate.set()
            await asyncio.gather(*asking)
    assert len(begun) == AT_ONCE
    broken = [one for one in asked if not one.whole]
    assert broken == [one for one in begun if one.streamed]
    assert all(one.broken for one in broken)
    assert [app.begun[one.name] for one in begun] == [1 if one.streamed else 2 for one in begun]
    assert app.finished == Counter(one.name for one in asked if one not in broken)


async def test_a_job_that_takes_too_long_is_a_504(folder: Path) -> None:
    """Or an error frame, if it had begun; either way the application is told that nobody waits."""
    app, asked = Echo(), jobs()[:2]
    with path(folder, EXECUTION_TIMEOUT_S="5") as gateway:  # the stream has to begin within it
        async with engine(app, folder), asyncio.timeout(LEASE_S), gateway.http() as http:
            whole, streamed = asked
            await asyncio.gather(*(one.ask(http) for one in asked))
            await app.left.acquire()
            await app.left.acquire()
    assert (whole.status, json.loads(whole.body)["error"]["code"]) == (504, "deadline_exceeded")
    first, last = sse.split(streamed.body)
    assert (streamed.status, sse.data(first)["number"]) == (200, 0)
    assert sse.data(last)["error"]["code"] == "deadline_exceeded"
    assert app.finished == Counter()
