"""Lambda's side of the Runtime API, for tests: hands out invocations, keeps all that is said of them.

It is strict: what Lambda would refuse, or what would mean something else to it, is refused here and
in `faults`. h11 reads the trailers, which no HTTP server of Python's usual ones does.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import h11

HOST = "127.0.0.1"
FUNCTION = "arn:aws:lambda:eu-central-1:123456789012:function:worker:live"
WHOLE_MAX_BYTES = 6_291_556
RUNTIME = "/2018-06-01/runtime/"
EXTENSION = "/2020-01-01/extension/"
HTTP_INTEGRATION = "application/vnd.awslambda.http-integration-response"
STREAM_HEADERS = {
    "lambda-runtime-function-response-mode": "streaming",
    "transfer-encoding": "chunked",
    "trailer": "Lambda-Runtime-Function-Error-Type, Lambda-Runtime-Function-Error-Body",
}


@dataclass(slots=True)
class Said:
    """What was said of an invocation at one moment: `head`, `data`, `whole`, `error`, `end` or `cut`."""

    what: str
    data: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Invocation:
    """One event on its way, and what is said of it, in order."""

    event: Any
    deadline_s: float
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    echo: str = field(default_factory=lambda: str(uuid.uuid4()))
    said: asyncio.Queue[Said] = field(default_factory=asyncio.Queue)
    taken: asyncio.Event = field(default_factory=asyncio.Event)
    over: bool = False
    cut: Callable[[], None] = lambda: None
    """Close the connection on which its answer comes, as when nobody reads it any more."""

    async def whole(self) -> Any:
        """Its answer as JSON. Fails if it is another one, or an error."""
        said = await self.said.get()
        assert said.what == "whole", (said.what, said.data)
        return json.loads(said.data)

    async def error(self) -> dict[str, Any]:
        """The error that it failed with, as JSON."""
        said = await self.said.get()
        assert said.what == "error", (said.what, said.data)
        told: dict[str, Any] = json.loads(said.data)
        kind = said.headers.get("lambda-runtime-function-error-type")  # AWS's client for Python leaves it out
        assert kind in {None, told["errorType"]}
        return told

    async def chunks(self) -> AsyncIterator[bytes]:
        """Its answer as it comes. Ends with a `BrokenStream` if it did not end well."""
        assert (await self.said.get()).what == "head"
        while (said := await self.said.get()).what == "data":
            yield said.data
        if said.what == "cut":
            raise BrokenStream(None)
        if "lambda-runtime-function-error-type" in said.headers:
            body = base64.b64decode(said.headers["lambda-runtime-function-error-body"])
            raise BrokenStream(json.loads(body))

    async def stream(self, chunks: list[bytes] | None = None) -> bytes:
        """All of its streamed answer, which is added to `chunks` as it comes."""
        chunks = [] if chunks is None else chunks
        async for chunk in self.chunks():
            chunks.append(chunk)
        return b"".join(chunks)


class BrokenStream(Exception):
    """An answer that was not whole; `told` is what its trailers say."""

    def __init__(self, told: dict[str, Any] | None) -> None:
        super().__init__(str(told))
        self.told = told


class RuntimeApi:
    """Listens at `address` once it is `open`; an environment may have `at_once` invocations.

    It takes an answer for `patience_s` longer than it says.
    """

    def __init__(self, at_once: int = 8, patience_s: float = 0.0) -> None:
        self.address = ""
        self.faults: list[str] = []
        self.init_errors: list[dict[str, Any]] = []
        self.extensions: list[str] = []
        self.user_agents: set[str] = set()
        self.polling = 0
        """How many ask for an invocation right now."""
        self.most_at_once = 0
        """How many did at most."""
        self.streaming = 0
        self.patience_s = patience_s
        self._at_once = at_once
        self._line: list[Invocation] = []
        self._out: dict[str, Invocation] = {}
        self.news = asyncio.Condition()

    def environ(self) -> dict[str, str]:
        """What an environment of this function has of Lambda's."""
        return {
            "AWS_LAMBDA_RUNTIME_API": self.address,
            "AWS_LAMBDA_MAX_CONCURRENCY": str(self._at_once),
            "AWS_LAMBDA_FUNCTION_NAME": "worker",
            "AWS_LAMBDA_INITIALIZATION_TYPE": "lambda-managed-instances",
            "AWS_REGION": "eu-central-1",
            "AWS_DEFAULT_REGION": "eu-central-1",
            "LAMBDA_TASK_ROOT": "/var/task",
            "_HANDLER": "none",
        }

    @asynccontextmanager
    async def open(self) -> AsyncIterator[RuntimeApi]:
        """Listen on a port of the loopback for as long as the block runs."""
        handling: set[asyncio.Task[None]] = set()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            handling.add(task)
            try:
                await _Connection(self, reader, writer).serve()
            except (OSError, h11.RemoteProtocolError, asyncio.CancelledError):
                pass  # it has left, or the test has
            finally:
                handling.discard(task)
                writer.close()

        server = await asyncio.start_server(handle, HOST, 0)
        self.address = f"{HOST}:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for task in handling:
                task.cancel()
            await asyncio.gather(*handling, return_exceptions=True)

    async def invoke(self, event: Any, timeout_s: float = 900.0) -> Invocation:
        """Put an event in line."""
        invocation = Invocation(event, time.time() + timeout_s)
        async with self.news:
            self._line.append(invocation)
            self.news.notify_all()
        return invocation

    async def polled(self, count: int) -> None:
        """Return once so many ask for an invocation at the same time."""
        async with self.news:
            await self.news.wait_for(lambda: self.polling >= count)

    async def tell(self, change: Callable[[], Any]) -> None:
        """Change something that others wait for."""
        async with self.news:
            change()
            self.news.notify_all()

    async def take(self, gone: asyncio.Task[bytes]) -> Invocation | None:
        """The next in line; None if who asks is `gone` before there is one."""
        self.polling += 1
        await self.tell(lambda: None)
        if self.polling + len(self._out) + self.streaming > self._at_once:
            self.fault(f"more than {self._at_once} at once")
        self.most_at_once = max(self.most_at_once, self.polling)

        async def first() -> Invocation:
            async with self.news:
                await self.news.wait_for(lambda: bool(self._line))
                return self._line.pop(0)

        waiting = asyncio.create_task(first())
        try:
            await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                return None
            invocation = waiting.result()
            self._out[invocation.id] = invocation
            invocation.taken.set()
            return invocation
        finally:
            waiting.cancel()
            await self.tell(lambda: setattr(self, "polling", self.polling - 1))

    def answered(self, invocation_id: str, headers: dict[str, str]) -> Invocation | None:
        """The invocation that is being answered; None if Lambda would not take the answer."""
        invocation = self._out.pop(invocation_id, None)
        if invocation is None:
            self.fault(f"an answer to {invocation_id}, which is not out")
        elif headers.get("lambda-runtime-invocation-id") != invocation.echo:
            self.fault("an answer does not repeat Lambda-Runtime-Invocation-Id")
        elif time.time() <= invocation.deadline_s + self.patience_s:
            return invocation
        return None

    def fault(self, what: str) -> None:
        """Keep what was wrong."""
        self.faults.append(what)


class _Connection:
    """One connection of a runtime."""

    def __init__(self, api: RuntimeApi, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._api = api
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.SERVER)

    async def serve(self) -> None:
        while True:
            event = await self._next()
            if not isinstance(event, h11.Request):
                return
            headers = {name.decode(): value.decode() for name, value in _joined(event.headers).items()}
            self._api.user_agents.add(headers.get("user-agent", ""))
            await self._route(event.method.decode(), event.target.decode(), headers)
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                return
            self._http.start_next_cycle()

    async def _next(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(1 << 16))
        return event

    async def _body(self) -> bytes:
        parts = []
        while not isinstance(event := await self._next(), h11.EndOfMessage):
            parts.append(bytes(event.data))
        return b"".join(parts)

    async def _send(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        head = {"content-type": "application/json", "content-length": str(len(raw)), **(headers or {})}
        events = h11.Response(status_code=status, headers=list(head.items())), h11.Data(data=raw)
        for event in (*events, h11.EndOfMessage()):
            self._writer.write(self._http.send(event) or b"")
        await self._writer.drain()

    async def _route(self, method: str, path: str, headers: dict[str, str]) -> None:
        match method, *path.removeprefix(RUNTIME).removeprefix(EXTENSION).split("/"):
            case "GET", "invocation", "next":
                await self._hand_out()
            case "POST", "invocation", invocation_id, "response":
                await self._response(invocation_id, headers)
            case "POST", "invocation", invocation_id, "error":
                body = await self._body()
                await self._answer(invocation_id, headers, Said("error", body, headers))
            case "POST", "init", "error":
                told = json.loads(await self._body())
                assert headers["lambda-runtime-function-error-type"] == told["errorType"]
                await self._api.tell(lambda: self._api.init_errors.append(told))
                await self._send(202, {"status": "OK"})
            case "POST", "register":
                assert json.loads(await self._body()) == {"events": []}
                self._api.extensions.append(headers["lambda-extension-name"])
                await self._send(200, {}, {"Lambda-Extension-Identifier": "extension-1"})
            case "GET", "event", "next":
                assert headers["lambda-extension-identifier"] == "extension-1"
                await self._body()
                await self._reader.read(1)  # for ever: it has subscribed to nothing
            case _:
                self._api.fault(f"{method} {path}")
                await self._body()
                await self._send(404, {"errorMessage": "no such route", "errorType": "NotFound"})

    async def _hand_out(self) -> None:
        await self._body()
        gone = asyncio.create_task(self._reader.read(1))
        try:
            invocation = await self._api.take(gone)
        finally:
            gone.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await gone
        if invocation is None:
            raise ConnectionResetError
        told = {
            "Lambda-Runtime-Aws-Request-Id": invocation.id,
            "Lambda-Runtime-Invocation-Id": invocation.echo,
            "Lambda-Runtime-Deadline-Ms": str(int(invocation.deadline_s * 1000)),
            "Lambda-Runtime-Invoked-Function-Arn": FUNCTION,
            "Lambda-Runtime-Trace-Id": "Root=1-5bef4de7-ad49b0e87f6ef6c87fc2e700;Sampled=1",
        }
        event = invocation.event
        await self._send(200, event if isinstance(event, bytes) else json.dumps(event).encode(), told)

    async def _answer(self, invocation_id: str, headers: dict[str, str], said: Said) -> None:
        invocation = self._api.answered(invocation_id, headers)
        if invocation is None:
            await self._send(400, {"errorMessage": "Invalid request ID", "errorType": "InvalidRequestID"})
        elif len(said.data) > WHOLE_MAX_BYTES:
            self._api.fault("an answer is too large")
            await self._send(413, {"errorMessage": "too large", "errorType": "RequestEntityTooLarge"})
        else:
            invocation.said.put_nowait(said)
            await self._send(202, {"status": "OK"})

    async def _response(self, invocation_id: str, headers: dict[str, str]) -> None:
        if headers.get("transfer-encoding") != "chunked":
            await self._answer(invocation_id, headers, Said("whole", await self._body(), headers))
            return
        for name, value in STREAM_HEADERS.items():
            if headers.get(name) != value:
                self._api.fault(f"a stream says {headers.get(name)!r} for {name}")
        invocation = self._api.answered(invocation_id, headers)
        if invocation is None:
            await self._send(400, {"errorMessage": "Invalid request ID", "errorType": "InvalidRequestID"})
            return
        invocation.cut = self._writer.close
        invocation.said.put_nowait(Said("head", b"", headers))
        self._api.streaming += 1
        try:
            while isinstance(event := await self._next(), h11.Data):
                invocation.said.put_nowait(Said("data", bytes(event.data)))
        except (OSError, h11.RemoteProtocolError):
            invocation.said.put_nowait(Said("cut"))
            raise
        finally:
            self._api.streaming -= 1
        if time.time() > invocation.deadline_s:
            self._api.fault("an answer ends after its invocation")
        trailers = {name.decode(): value.decode() for name, value in event.headers}
        invocation.said.put_nowait(Said("end", b"", trailers))
        await self._send(202, {"status": "OK"})


def _joined(headers: Any) -> dict[bytes, bytes]:
    joined: dict[bytes, bytes] = {}
    for name, value in headers:
        joined[name] = joined[name] + b", " + value if name in joined else value
    return joined
