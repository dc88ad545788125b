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

_FAILED = {"status": 500, "headers": [("content-type", "text/plain; charset=utf-8")]}
"""How uvicorn answers for an application that has failed and said nothing."""


class Link(wire.Wire):
    """Answers with `app`. Counted in `state` with uvicorn's connections, which it is asked to end like."""

    def __init__(self, app: App, state: ServerState) -> None:
        super().__init__()
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
        super().connection_lost(exc)
        for asked in self._asked.values():
            asked.leave()

    def shutdown(self) -> None:
        """Close once all that was asked is answered. Called by uvicorn."""
        self._shut = True
        self._close_if_over()

    def _close_if_over(self) -> None:
        if self._shut and not self._asked:
            self._loop.call_soon(self.transport.close)  # after what was put last

    def took(self, kind: int, number: int, payload: bytes) -> None:
        """The gateway has said this."""
        if kind == wire.ASK:
            asked = self._asked[number] = _Asked(self, number, json.loads(payload))
            task = self._loop.create_task(self._answer(asked))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
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

    async def _answer(self, asked: _Asked) -> None:
        try:
            await self._app(asked.scope, asked.receive, asked.send)
        except Exception:  # the boundary of one request
            log.exception("application failed")
            asked.fail()
        finally:
            del self._asked[asked.number]
            asked.cut()
            self._close_if_over()


class _Asked:
    """One request, as the application reads and answers it."""

    def __init__(self, link: wire.Wire, number: int, head: dict[str, Any]) -> None:
        self.number = number
        self.scope: Message = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": head["method"],
            "scheme": "http",
            "path": head["path"],
            "raw_path": head["path"].encode(),
            "query_string": head["query"].encode("latin-1"),
            "root_path": "",
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in head["headers"]],
            "client": None,
            "server": None,
        }
        self._link = link
        self._unread_bytes: int = head["body_bytes"]
        self._pieces: deque[bytes] = deque()
        if not self._unread_bytes:
            self._pieces.append(b"")
        self._news = asyncio.Event()
        self._wanted = asyncio.Event()
        """Set unless its reader is slow."""
        self._wanted.set()
        self._begun = False
        self._over = False
        """Answered, or left."""
        self._piecewise = False
        """Whether the answer may be cut anywhere."""

    def add(self, piece: bytes) -> None:
        """A piece of its body has come."""
        self._unread_bytes -= len(piece)
        self._pieces.append(piece)
        self._news.set()

    def leave(self) -> None:
        """Nobody wants the answer any more."""
        self._end()
        self.resume()

    def pause(self) -> None:
        """Say no more for now."""
        self._wanted.clear()

    def resume(self) -> None:
        """Go on."""
        self._wanted.set()

    def fail(self) -> None:
        """The application has raised."""
        if not (self._begun or self._over):
            self._link.put(wire.HEAD, self.number, json.dumps(_FAILED).encode())
            self._link.put(wire.DATA, self.number, b"Internal Server Error")
            self._link.put(wire.END, self.number)
            self._end()

    def cut(self) -> None:
        """The application has returned: whatever it has not said is missing."""
        if not self._over:
            self._link.put(wire.CUT, self.number)
            self._end()

    def _end(self) -> None:
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
            self._end()
        else:
            await self._turn()

    async def _turn(self) -> None:
        """Return once it may say more."""
        while not (self._wanted.is_set() and self._link.room.is_set()):
            await self._wanted.wait()
            await self._link.room.wait()

    def _start(self, message: Message) -> None:
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]]
        kinds = [value for name, value in headers if name.lower() == "content-type"]
        self._piecewise = not any(kind.startswith("text/event-stream") for kind in kinds)
        self._begun = True
        head = {"status": message["status"], "headers": headers}
        self._link.put(wire.HEAD, self.number, json.dumps(head).encode())

    async def _send_pieces(self, body: bytes) -> None:
        for at in range(0, len(body), wire.PIECE_BYTES):
            self._link.put(wire.DATA, self.number, body[at : at + wire.PIECE_BYTES])
            await asyncio.sleep(0)  # it goes out, and others have their say
            await self._turn()
            if self._over:
                return
