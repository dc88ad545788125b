"""Between ASGI and `Call`, both ways: streaming, back-pressure, cancellation.

`call_app` calls an ASGI application in this process; `serve` is an ASGI application
that answers with a `Call`. The two are inverse: `serve(call_app(app))` behaves as `app`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, MutableMapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass, replace
from typing import Any

from handler import sse
from handler.body import looked
from handler.errors import BodyTooLarge, RequestError
from handler.messages import Call, Headers, Reply, Request, Visit, read

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Coroutine[Any, Any, None]]

log = logging.getLogger(__name__)

HIGH_WATER_BYTES = 64 * 1024
"""A producer waits once this much is unread: a slow client slows its own stream only."""

LEAVE_GRACE_S = 5.0
"""How long an application may take to notice `http.disconnect` before it is cancelled."""


def call_app(app: App, *, keep_alive_s: float = 0) -> Call:
    """The `Call` that asks `app`, an ASGI application in this process and on this loop.

    An event stream in which nothing happens for `keep_alive_s` gets a comment frame, its
    prefill included; 0 turns that off.
    """

    @asynccontextmanager
    async def call(request: Request) -> AsyncIterator[Reply]:
        exchange = _Exchange(request, keep_alive_s)
        task = asyncio.create_task(app(exchange.scope(), exchange.receive, exchange.send))
        task.add_done_callback(exchange.ended)
        try:
            status, headers = await exchange.head()
            reply = Reply(status, headers, exchange.chunks())
            yield Reply(status, headers, sse.frames(reply.frames)) if reply.streams else reply
        finally:
            exchange.leave()
            await _end(task)

    return call


async def _end(task: asyncio.Task[None]) -> None:
    # Disconnect comes before cancel: vLLM's handlers run in tasks of their own, which they
    # stop on `http.disconnect` and forget when they are cancelled from outside.
    try:
        if not task.done():
            await asyncio.wait({task}, timeout=LEAVE_GRACE_S)
    finally:
        if not task.done():
            task.cancel()


class _Exchange:
    """One request inside an application: what it may read, what it has said so far."""

    def __init__(self, request: Request, keep_alive_s: float) -> None:
        self._request = request
        self._keep_alive_s = keep_alive_s
        self._keep_alive: asyncio.TimerHandle | None = None
        self._idle = True
        self._last = b""
        self._body_read = False
        self._start: Message | None = None
        self._ready: deque[bytes] = deque()
        self._ready_bytes = 0
        self._complete = False
        self._failure: BaseException | None = None
        self._left = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._news = self._loop.create_future()  # a bare future: an Event costs a token a microsecond more
        self._room = asyncio.Event()

    def scope(self) -> Message:
        request = self._request
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in request.headers]
        return {
            "type": "http",
            # Below 2.4 Starlette listens for `http.disconnect` while it streams, so a client
            # that leaves between two tokens is noticed at once and not at the next send.
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": "http",
            "path": request.path,
            "raw_path": request.path.encode(),
            "query_string": request.query.encode("latin-1"),
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 80),
            "state": {},
        }

    async def receive(self) -> Message:
        if not self._body_read:
            self._body_read = True
            return {"type": "http.request", "body": self._request.body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._left.is_set():
            return
        if message["type"] == "http.response.start":
            self._start = message
            if self._keep_alive_s and _is_event_stream(message):
                self._tick()
            return  # status and headers go out with the first body byte: one wake-up, not two
        if message["type"] != "http.response.body":
            return
        if body := bytes(message.get("body", b"")):
            self._ready.append(body)
            self._ready_bytes += len(body)
            self._last = body
            self._idle = False
        self._complete = not message.get("more_body", False)
        self._wake()
        if self._ready_bytes > HIGH_WATER_BYTES and not self._complete:
            self._room.clear()
            await self._room.wait()

    def _wake(self) -> None:
        if not self._news.done():
            self._news.set_result(None)

    def _tick(self) -> None:
        """Say something if nothing was said since the last tick. Costs a token nothing."""
        if self._left.is_set() or self._complete:
            return
        between_frames = sse.complete(self._last) == len(self._last)
        if self._idle and between_frames and self._keep_alive is not None:
            self._ready.append(sse.KEEP_ALIVE)
            self._wake()
        self._idle = True
        self._keep_alive = self._loop.call_later(self._keep_alive_s, self._tick)

    def ended(self, task: asyncio.Task[None]) -> None:
        """The application returned, raised, or was cancelled."""
        self._failure = None if task.cancelled() else task.exception()
        if self._failure is not None and not self._left.is_set():
            log.error("application failed", exc_info=self._failure)
        if not self._complete and self._failure is None:
            self._failure = _broken("The engine ended the answer before it was complete.")
        self._wake()

    def leave(self) -> None:
        """The caller reads no more: the application is told that its client has gone."""
        self._left.set()
        self._room.set()
        if self._keep_alive is not None:
            self._keep_alive.cancel()

    async def head(self) -> tuple[int, Headers]:
        await self._news
        if self._start is None:
            raise _answerable(self._failure)
        headers = tuple(
            (name.decode("latin-1").lower(), value.decode("latin-1"))
            for name, value in self._start["headers"]
        )
        return int(self._start["status"]), headers

    async def chunks(self) -> AsyncIterator[bytes]:
        while True:
            if self._ready:
                ready = self._ready[0] if len(self._ready) == 1 else b"".join(self._ready)
                self._ready.clear()
                self._ready_bytes = 0
                self._room.set()
                yield ready
            elif self._complete:
                return
            elif self._failure is not None:
                raise _answerable(self._failure)
            else:
                self._news = self._loop.create_future()
                await self._news


def _answerable(failure: BaseException | None) -> RequestError:
    if isinstance(failure, RequestError):
        return failure
    error = _broken("The engine failed while it answered this request.")
    error.__cause__ = failure
    return error


def _broken(message: str) -> RequestError:
    # Not `EngineDead`: the next request may well be answered (`handler.edge` knows when it can't be).
    return RequestError(message, code="internal_error")


def serve(
    call: Call,
    *,
    max_body_bytes: int,
    check: Callable[[Request], int | None] | None = None,
    front: Callable[[Call], Call] | None = None,
    hold: Callable[[Request], AbstractContextManager[Callable[[int], None]]] | None = None,
) -> App:
    """An ASGI application whose every HTTP request is answered by `call`.

    `check` sees each request before its body is read (`body` is still empty) and may raise a
    `RequestError`. If it returns a number, `call` reads the body by itself from `Request.pieces`, up to
    that many bytes. `front` wraps `call` and also the refusals of `check`, so that what it adds is on
    every answer. While a body is read for `call`, the function that `hold(request)` gives is called with
    the size of each piece, and may raise a `RequestError`. A client that disconnects cancels its call.
    """
    wrap = front or (lambda inner: inner)
    answer = wrap(call)

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        head = _parse(scope)
        unread = None
        try:
            limit_bytes = check(head) if check is not None else None
            _check_announced(head, max_body_bytes if limit_bytes is None else limit_bytes)
            if limit_bytes is None:
                with hold(head) if hold is not None else nullcontext(_nothing) as take:
                    body = await _whole(_pieces(receive, max_body_bytes), take)
                    # A client begins to wait once all of its request is here.
                    request = await looked(replace(head, body=body, visit=Visit()))
            else:
                unread = _Unread(_pieces(receive, limit_bytes))
                request = replace(head, pieces=unread.pieces())
        except RequestError as refusal:
            await _answer(wrap(refuse(refusal)), head, receive, send)
        except _ClientLeft:
            return
        else:
            await _answer(answer, request, receive, send, unread)

    return app


class _Refusal(AbstractAsyncContextManager[Reply]):
    def __init__(self, error: RequestError) -> None:
        self._error = error

    async def __aenter__(self) -> Reply:
        raise self._error

    async def __aexit__(self, *_: object) -> None:
        """Nothing was opened."""


def refuse(error: RequestError) -> Call:
    """The `Call` that answers nothing but `error`."""
    return lambda _: _Refusal(error)


class _ClientLeft(Exception):
    """The client closed the connection before its body was whole."""


def _parse(scope: Message) -> Request:
    headers = tuple(
        (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]
    )
    path = scope["path"].removeprefix(scope.get("root_path", ""))  # a server may have us below a folder
    return Request(scope["method"], path, headers, b"", scope["query_string"].decode("latin-1"))


def _check_announced(head: Request, limit_bytes: int) -> None:
    announced = head.header("content-length") or ""
    # Python refuses to read a number of more than 4,300 digits.
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit_bytes):
        raise BodyTooLarge(limit_bytes)


async def _pieces(receive: Receive, limit_bytes: int) -> AsyncIterator[bytes]:
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientLeft
        if piece := message.get("body", b""):
            size += len(piece)
            if size > limit_bytes:
                raise BodyTooLarge(limit_bytes)
            yield piece
        if not message.get("more_body", False):
            return


async def _whole(pieces: AsyncIterator[bytes], take: Callable[[int], None]) -> bytes:
    held: list[bytes] = []
    async for piece in pieces:
        take(len(piece))
        held.append(piece)
    return b"".join(held)


def _nothing(_: int) -> None:
    pass


class _Unread:
    """A body that its call reads by itself; then it is that call which hears that the client has left."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self.ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """Whether the whole body was read; False: its client has gone before."""

    async def pieces(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._pieces:
                yield piece
        except _ClientLeft:
            self.ended.set_result(False)
            await asyncio.Event().wait()  # until the call is cancelled
        self.ended.set_result(True)


@dataclass(slots=True)
class _Progress:
    """How far an answer has come on its way to the server."""

    begun: bool = False
    streams: bool = False
    complete: bool = False


async def _answer(
    call: Call, request: Request, receive: Receive, send: Send, unread: _Unread | None = None
) -> None:
    """Answer with `call`, or cancel it as soon as the client has gone."""
    progress = _Progress()
    work = asyncio.ensure_future(_render(call, request, send, progress))
    gone = asyncio.ensure_future(_gone(receive, unread))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if progress.complete:  # a server also reports a disconnect once there is nobody left to answer
            await asyncio.wait({work})
        if work.done():
            await work
    finally:
        gone.cancel()
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work


async def _gone(receive: Receive, unread: _Unread | None) -> None:
    if unread is not None and not await unread.ended:
        return
    while (await receive())["type"] != "http.disconnect":
        pass


async def _render(call: Call, request: Request, send: Send, progress: _Progress) -> None:
    try:
        async with call(request) as reply:
            progress.streams = reply.streams
            await send(_start(reply))
            progress.begun = True
            async for chunk in reply.frames:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            progress.complete = True
            await send({"type": "http.response.body", "body": b""})
    except RequestError as error:
        if progress.complete:
            return  # too late to be told
        if progress.begun and not progress.streams:
            raise  # the server cuts the connection: a short body can't be mended
        if progress.begun:
            body = error.frame()
        else:
            reply = error.reply()
            await send(_start(reply))
            body = await read(reply)
        progress.complete = True
        await send({"type": "http.response.body", "body": body})


def _start(reply: Reply) -> Message:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers]
    return {"type": "http.response.start", "status": reply.status, "headers": headers}


def _is_event_stream(start: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in start["headers"]
    )


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
