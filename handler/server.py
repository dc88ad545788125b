"""uvicorn, as every HTTP server of ours runs it: on the loop that runs, with its signals left to others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from handler import wire
from handler.asgi import App
from handler.link import Link

IDLE_S = 75
"""Longer than proxies keep an idle connection (60 s is usual), so that theirs ends first: no sporadic 502."""
HEAD_MAX_BYTES = 64 << 10
"""How long a request line with its headers may be, and trailers, beyond what one read brings."""
PIPELINED_MAX = 64
"""How many requests may wait on a connection behind the one that is answered."""

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Server(uvicorn.Server):
    """uvicorn, without its own signal handlers, which would end the process by the signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class Protocol(HttpToolsProtocol):
    """uvicorn's, which alone has no bound on what a stranger can have it hold: heads, trailers, pipelines.

    A connection without a whole head is closed after as long as one that is idle. So is one whose client does
    not read its answer: it holds a place at the engine that others wait for.
    """

    _brought = False
    """Whether the last read had an end of a head, some of a body or its end."""
    _dull_bytes = 0
    """Read since the last that had."""
    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _answered: RequestResponseCycle | None = None
    """What is answered: `cycle` is the last of those that were asked for."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._head_came()
        self._was_read()
        if self._answered is not None:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what was read; end the connection where it is too much."""
        self._brought = False
        super().data_received(data)
        self._dull_bytes = 0 if self._brought else self._dull_bytes + len(data)
        if self.transport.is_closing():
            return
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_complete:
            self._wait_for_head()
            if self._dull_bytes > HEAD_MAX_BYTES:
                self.transport.write(_TOO_LARGE)
                self.transport.close()
        elif self._dull_bytes > HEAD_MAX_BYTES or len(self.pipeline) > PIPELINED_MAX:
            self.transport.close()  # an answer is on its way: nothing else can be said

    def on_headers_complete(self) -> None:
        """A head is there."""
        self._brought = True
        self._head_came()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Some of a body is there."""
        self._brought = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A body is there."""
        self._brought = True
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client reads slowly, or not at all."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads."""
        self._was_read()
        super().resume_writing()

    def _was_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def _wait_for_head(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _head_came(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class LinkedProtocol(Protocol):
    """HTTP or a link (`handler.wire`), as who connects begins: for a socket that only its owner can open."""

    def data_received(self, data: bytes) -> None:
        """Take what was read. A preface comes in one piece: nothing was in its way."""
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None or not data.startswith(wire.PREFACE):
            super().data_received(data)
            return
        self._head_came()
        self.connections.discard(self)
        link = Link(self.app, self.server_state)
        self.transport.set_protocol(link)
        link.connection_made(self.transport)
        link.data_received(data[len(wire.PREFACE) :])


def config(
    app: App, *, idle_s: int = IDLE_S, shutdown_s: int | None = None, links: bool = False
) -> uvicorn.Config:
    """How `app` is served.

    An idle connection is kept for `idle_s`; once the server ends, a busy one for `shutdown_s` (None: as
    long as it takes). With `links` whoever connects is trusted, and may have a link.
    """
    return uvicorn.Config(
        app,
        loop="none",
        http=LinkedProtocol if links else Protocol,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=idle_s,
        timeout_graceful_shutdown=shutdown_s,
    )


def end(server: uvicorn.Server, within_s: float) -> None:
    """End `server`, whose loop this runs on: requests that are not answered `within_s` are cut off."""
    server.config.timeout_graceful_shutdown = within_s  # type: ignore[assignment] # a float will do
    server.should_exit = True
