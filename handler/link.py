"""The worker's end of a link (`handler.wire`): an ASGI server of many requests on one connection."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from typing import Any

from uvicorn.server import ServerState

from handler import wire
from handler.asgi import App, Message

log = logging.getLogger(__name__)

_FAILED = b"Internal Server Error"
"""How uvicorn answers for an application that has said nothing."""


class Link(wire.Wire):
    """Answers with `app`. Counted in `state` with uvicorn's connections, which it is asked to end like."""

    def __init__(self, app: App, state: ServerState) -> None:
        super().__init__("the gateway")
        self._app = app
        self._connections: set[Any] = state.connections
        self._tasks = state.tasks
        self._asked: dict[int, _Asked] = {}
        self._shut = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        super().connection_made(transport)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """End: who has asked is gone."""
        self._connections.discard(self)
        for asked in self._asked.values():
            asked.leave()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Close as soon as nothing is asked. Called by uvicorn."""
        self._shut = True
        self._close_if_over()

    def _close_if_over(self) -> None:
        if self._shut and not self._asked:
            self._loop.call_soon(self.transport.close)  # after what was put last

    def took(self, kind: int, number: int, payload: bytes) -> None:
        """The gateway has said this."""
        if kind == wire.ASK:
            self._begin(number, payload)
        elif (known := self._asked.get(number)) is None:
            pass
        elif kind == wire.BODY:
            known.add(payload)
        elif kind == wire.LEAVE:
            known.leave()
        elif kind == wire.PAUSE:
            known.pause()
        elif kind == wire.RESUME:
            known.resume()

    def _begin(self, number: int, payload: bytes) -> None:
        asked = self._asked[number] = _Asked(self, number)
        try:
            asked.read_head(json.loads(payload))
        except Exception:  # whatever it was, it is one request's: the others go on
            log.exception("what was asked can't be read")
            self._finished(asked)
            return
        task = self._loop.create_task(self._answer(asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, asked: _Asked) -> None:
        try:
            await self._app(asked.scope, asked.receive, asked.send)
        except Exception:  # the boundary of one request
            log.exception("application failed")
        finally:
            self._finished(asked)

    def _finished(self, asked: _Asked) -> None:
        del self._asked[asked.number]
        asked.complete()
        self._close_if_over()


class _Asked:
    """One request, as the application reads and answers it."""

    scope: Message

    def __init__(self, link: wire.Wire, number: int) -> None:
        self.number = number
        self._link = link
        self._unread_bytes = 0
        self._pieces: deque[bytes] = deque()
        self._news = asyncio.Event()
        self._wanted = asyncio.Event()
        """Set unless its reader is slow."""
        self._wanted.set()
        self._begun = False
        self._over = False
        """Answered, or left."""
        self._piecewise = False
        """Whether the answer may be cut anywhere."""

    def read_head(self, head: dict[str, Any]) -> None:
        """Know what is asked."""
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": head["method"],
            "scheme": "http",
            "path": head["path"],
            "raw_path": head["path"].encode(),
            "query_string": head["query_string"].encode("latin-1"),
            "root_path": "",
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in head["headers"]],
            "client": None,
            "server": None,
        }
        self._unread_bytes = head["body_bytes"]
        if not self._unread_bytes:
            self._pieces.append(b"")

    def add(self, piece: bytes) -> None:
        """A piece of its body has come."""
        self._unread_bytes -= len(piece)
        self._pieces.append(piece)
        self._news.set()

    def leave(self) -> None:
        """Nobody wants the answer any more."""
        self._finish()
        self.resume()

    def pause(self) -> None:
        """Say no more for now."""
        self._wanted.clear()

    def resume(self) -> None:
        """Go on."""
        self._wanted.set()

    def complete(self) -> None:
        """The application has returned, or raised: what it has not said is missing."""
        if self._over:
            return
        if self._begun:
            self._link.put(wire.CUT, self.number)
        else:
            self._say_head(500, [("content-type", "text/plain; charset=utf-8")])
            self._link.put(wire.DATA, self.number, _FAILED)
            self._link.put(wire.END, self.number)
        self._finish()

    def _finish(self) -> None:
        self._over = True
        self._news.set()

    async def receive(self) -> Message:
        """The next message to the application."""
        while not (self._pieces or self._over):
            self._news.clear()
            await self._news.wait()
        if self._pieces and not self._over:
            piece = self._pieces.popleft()
            more = bool(self._pieces or self._unread_bytes)
            return {"type": "http.request", "body": piece, "more_body": more}
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """A message of the application."""
        if self._over:
            await asyncio.sleep(0)  # that is how who talks on without a pause comes to be stopped
            return
        if message["type"] == "http.response.start":
            self._start(message)
            return
        if body := message.get("body", b""):
            if len(body) > wire.PIECE_BYTES and self._piecewise:
                await self._send_pieces(body)
            else:
                self._link.put(wire.DATA, self.number, body)
        if not message.get("more_body", False):
            self._link.put(wire.END, self.number)
            self._finish()
        else:
            await self._turn()

    async def _turn(self) -> None:
        """Return once it may say more."""
        while not (self._wanted.is_set() and self._link.room.is_set()):
            await self._wanted.wait()
            await self._link.room.wait()

    def _start(self, message: Message) -> None:
        fields = message.get("headers", ())
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in fields]
        kinds = [value for name, value in headers if name.lower() == "content-type"]
        self._piecewise = not any(kind.startswith("text/event-stream") for kind in kinds)
        self._say_head(message["status"], headers)

    def _say_head(self, status: int, headers: list[tuple[str, str]]) -> None:
        self._begun = True
        self._link.put(wire.HEAD, self.number, json.dumps({"status": status, "headers": headers}).encode())

    async def _send_pieces(self, body: bytes) -> None:
        for at in range(0, len(body), wire.PIECE_BYTES):
            self._link.put(wire.DATA, self.number, body[at : at + wire.PIECE_BYTES])
            await asyncio.sleep(0)  # it goes out, and others have their say
            await self._turn()
            if self._over:
                return
