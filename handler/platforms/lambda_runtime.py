"""The Runtime API of AWS Lambda, spoken over one connection on asyncio; h11 has the framing.

    GET  /2018-06-01/runtime/invocation/next            waits for an invocation, however long
    POST /2018-06-01/runtime/invocation/{id}/response   its answer, whole or in chunks
    POST /2018-06-01/runtime/invocation/{id}/error      that it failed
    POST /2018-06-01/runtime/init/error                 that there will never be a first `next`

https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html has these four, runtimes-custom.html the
chunks and their trailers; what else is said here is what AWS's own runtimes for Node, Go and Rust say.
AWS's client for Python can't stream (docs/decisions/0010-lambda-runtime.md).
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import h11

from handler.errors import AnswerCut, RuntimeApiFailed
from handler.messages import Headers, first

log = logging.getLogger(__name__)

RUNTIME = "/2018-06-01/runtime"
EXTENSION = "/2020-01-01/extension"
EXTENSION_NAME = "firsttoken"

HTTP_INTEGRATION = "application/vnd.awslambda.http-integration-response"
"""The content type of an answer that begins with status and headers, for a front door that streams."""
DELIMITER = b"\0" * 8
"""What stands between these and the body."""

ERROR_TYPE = "Lambda-Runtime-Function-Error-Type"
ERROR_BODY = "Lambda-Runtime-Function-Error-Body"

LONGEST_S = 900.0
"""What an invocation may take, if Lambda does not say."""
READ_BYTES = 64 * 1024
END_S = 10.0
"""How long the end of an answer may take to be heard. It is next door: this is for when it hangs."""
INIT_ERROR_S = 5.0


@dataclass(frozen=True, slots=True)
class Fault:
    """A failure as Lambda records it. `more` are further fields of its JSON object."""

    type: str
    message: str
    more: dict[str, Any] = field(default_factory=dict)

    def body(self) -> bytes:
        """The JSON object."""
        told = {"errorMessage": self.message, "errorType": self.type, "stackTrace": [], **self.more}
        return json.dumps(told).encode()


@dataclass(frozen=True, slots=True)
class Invocation:
    """One event. `deadline_s` is Unix time; `headers` are what Lambda says of it beside."""

    id: str
    deadline_s: float
    headers: Headers
    event: bytes = field(repr=False)

    @property
    def echo(self) -> Headers:
        """What the answer has to repeat, where Lambda says it."""
        given = first(self.headers, "lambda-runtime-invocation-id")
        return () if given is None else (("Lambda-Runtime-Invocation-Id", given),)


class Runtime:
    """One connection to the Runtime API at `address`, `host:port`. It has one request at a time.

    Every method raises `RuntimeApiFailed`.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None
        self._http = h11.Connection(h11.CLIENT)

    async def next(self) -> Invocation:
        """The next invocation, whenever it comes."""
        status, headers, event = await self._ask("GET", f"{RUNTIME}/invocation/next")
        request_id = first(headers, "lambda-runtime-aws-request-id")
        if status != 200 or request_id is None:
            raise RuntimeApiFailed(f"asked for an invocation, the Runtime API answered {status}", status)
        deadline_ms = first(headers, "lambda-runtime-deadline-ms")
        deadline_s = time.time() + LONGEST_S if deadline_ms is None else float(deadline_ms) / 1000
        return Invocation(request_id, deadline_s, headers, event)

    async def respond(self, invocation: Invocation, body: bytes) -> None:
        """Answer `invocation` with JSON, at once and whole."""
        headers = (("Content-Type", "application/json"), *invocation.echo)
        await self._post(f"{RUNTIME}/invocation/{invocation.id}/response", headers, body)

    async def fail(self, invocation: Invocation, fault: Fault) -> None:
        """Say that `invocation` failed."""
        headers = (("Content-Type", "application/json"), (ERROR_TYPE, fault.type), *invocation.echo)
        await self._post(f"{RUNTIME}/invocation/{invocation.id}/error", headers, fault.body())

    @asynccontextmanager
    async def stream(self, invocation: Invocation) -> AsyncIterator[Stream]:
        """The answer to `invocation`, in chunks; nothing is sent before its `begin`.

        The answer ends with the block. Raises `AnswerCut` in it, wherever it waits, when Lambda closes
        the connection or answers before the end: nobody reads what would be said. A block that
        raises leaves an answer that Lambda takes for broken off.
        """
        stream = Stream(self, invocation)
        ended = False
        try:
            try:
                async with asyncio.timeout(None) as limit:
                    stream.cut = limit
                    yield stream
            except TimeoutError:
                if limit.expired():
                    raise AnswerCut("Lambda has closed the answer") from None
                raise
            if stream.begun:
                await stream.end()
            ended = True
        except ConnectionError as error:
            raise AnswerCut(f"Lambda has closed the answer: {error}") from error
        finally:
            stream.leave()
            if stream.begun and not ended:
                self.close()

    async def register(self) -> str:
        """Become an extension; returns its identifier. Without one there is no SIGTERM before SIGKILL."""
        name = ("Lambda-Extension-Name", EXTENSION_NAME)
        status, headers, _ = await self._ask("POST", f"{EXTENSION}/register", (name,), b'{"events": []}')
        identifier = first(headers, "lambda-extension-identifier")
        if status != 200 or identifier is None:
            raise RuntimeApiFailed(f"the Extensions API answered {status}", status)
        return identifier

    async def extension_events(self, identifier: str) -> None:
        """Say that the extension is there, and wait for what it wants to hear of: nothing, so for ever."""
        known = (("Lambda-Extension-Identifier", identifier),)
        status, _, _ = await self._ask("GET", f"{EXTENSION}/event/next", known)
        raise RuntimeApiFailed(
            f"the Extensions API answered {status}, though there is nothing to say", status
        )

    def close(self) -> None:
        """Close the connection, whatever is on its way. The next request opens another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # --- one request ---------------------------------------------------------------------------

    async def _post(self, target: str, headers: Headers, body: bytes) -> None:
        status, _, said = await self._ask("POST", target, headers, body)
        accepted(status, said)

    async def _ask(
        self, method: str, target: str, headers: Headers = (), body: bytes = b""
    ) -> tuple[int, Headers, bytes]:
        kept = self._writer is not None
        if method == "POST":
            headers = (*headers, ("Content-Length", str(len(body))))
        try:
            try:
                await self.begin(method, target, headers, body)
                return await self.answer()
            except (OSError, h11.RemoteProtocolError):
                if not kept:
                    raise
                # A connection that was kept may have been closed while nothing was said.
                self.close()
                await self.begin(method, target, headers, body)
                return await self.answer()
        except (OSError, h11.RemoteProtocolError) as error:
            self.close()
            raise RuntimeApiFailed(f"the Runtime API can't be reached: {error}") from error
        except BaseException:
            self.close()
            raise

    async def begin(self, method: str, target: str, headers: Headers, body: bytes | None = None) -> None:
        """Send the head of a request, and the whole of it if there is a `body`."""
        if self._writer is None:
            host, _, port = self._address.rpartition(":")
            self._reader, self._writer = await asyncio.open_connection(host.strip("[]"), int(port))
            self._http = h11.Connection(h11.CLIENT)
        head = (("Host", self._address), ("User-Agent", "firsttoken"), *headers)
        events: list[h11.Event] = [h11.Request(method=method, target=target, headers=list(head))]
        if body is not None:
            events += [h11.Data(data=body)] if body else []
            events.append(h11.EndOfMessage())
        await self.send(*events)

    async def send(self, *events: h11.Event) -> None:
        """Write what says `events`; wait while too much is unread."""
        if self._writer is None:
            raise ConnectionResetError("it was answered before it was whole")
        self._writer.write(b"".join(self._http.send(event) or b"" for event in events))
        await self._writer.drain()

    async def answer(self) -> tuple[int, Headers, bytes]:
        """Status, headers and body of the answer to what was sent."""
        status, headers, parts = 0, Headers(), []
        while True:
            match event := self._http.next_event():
                case h11.NEED_DATA:
                    self._http.receive_data(await self._reader.read(READ_BYTES))
                case h11.Response():
                    status, headers = event.status_code, tuple(_texts(event.headers))
                case h11.Data():
                    parts.append(bytes(event.data))
                case h11.EndOfMessage():
                    break
                case h11.ConnectionClosed():
                    raise ConnectionResetError("the connection was closed")
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        else:  # it was answered early, or will be closed
            self.close()
        return status, headers, b"".join(parts)


class Stream:
    """An answer on its way, in chunks."""

    def __init__(self, runtime: Runtime, invocation: Invocation) -> None:
        self._runtime = runtime
        self._invocation = invocation
        self._heard: asyncio.Task[tuple[int, Headers, bytes]] | None = None
        self._trailers: list[tuple[str, str]] = []
        self.cut: asyncio.Timeout

    @property
    def begun(self) -> bool:
        """Whether Lambda has heard of it."""
        return self._heard is not None

    async def begin(self, content_type: str, data: bytes = b"") -> None:
        """Send its head, and the first `data`."""
        headers = (
            ("Content-Type", content_type),
            ("Lambda-Runtime-Function-Response-Mode", "streaming"),
            ("Transfer-Encoding", "chunked"),
            ("Trailer", ERROR_TYPE),
            ("Trailer", ERROR_BODY),
            *self._invocation.echo,
        )
        await self._runtime.begin("POST", f"{RUNTIME}/invocation/{self._invocation.id}/response", headers)
        self._heard = asyncio.create_task(self._runtime.answer())
        self._heard.add_done_callback(self._over)
        if data:
            await self.send(data)

    async def send(self, data: bytes) -> None:
        """Send the next chunk."""
        await self._runtime.send(h11.Data(data=data))

    def fail(self, fault: Fault) -> None:
        """Have the end of the answer say that it is not whole, because of `fault`."""
        self._trailers = [(ERROR_TYPE, fault.type), (ERROR_BODY, base64.b64encode(fault.body()).decode())]

    async def end(self) -> None:
        """End the answer. Raises `AnswerCut` and `RuntimeApiFailed` if Lambda does not say that it has it."""
        assert self._heard is not None, "it has begun"
        heard = self._heard
        try:
            async with asyncio.timeout(END_S):
                if not heard.done():
                    await self._runtime.send(h11.EndOfMessage(headers=self._trailers))
                status, _, said = await heard
        except TimeoutError:
            raise AnswerCut("Lambda does not say that it has the answer") from None
        except h11.RemoteProtocolError as error:
            raise AnswerCut(f"Lambda has closed the answer: {error}") from error
        accepted(status, said)

    def leave(self) -> None:
        """Listen no more."""
        if self._heard is not None:
            self._heard.remove_done_callback(self._over)
            self._heard.cancel()

    def _over(self, heard: asyncio.Task[tuple[int, Headers, bytes]]) -> None:
        if not heard.cancelled():
            heard.exception()  # it is heard: `end` tells it, or nobody has to know
        with suppress(RuntimeError):  # the block has ended meanwhile
            self.cut.reschedule(asyncio.get_running_loop().time())


def accepted(status: int, said: bytes) -> None:
    """Raise `RuntimeApiFailed` unless Lambda has taken what was posted."""
    if status != 202:
        why = said.decode(errors="replace")[:300]
        raise RuntimeApiFailed(f"the Runtime API answered {status} to an answer: {why}", status)


def init_error(address: str, fault: Fault) -> None:
    """Say that this runtime can't start. It is about to end: who does not listen is not waited for."""
    connection = http.client.HTTPConnection(address, timeout=INIT_ERROR_S)
    try:
        headers = {"Content-Type": "application/json", ERROR_TYPE: fault.type}
        connection.request("POST", f"{RUNTIME}/init/error", fault.body(), headers)
        connection.getresponse().read()
    except (OSError, http.client.HTTPException) as error:
        log.warning("Lambda was not told why the start failed", extra={"reason": str(error)})
    finally:
        connection.close()


def _texts(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[str, str]]:
    return ((name.decode("latin-1"), value.decode("latin-1")) for name, value in headers)
