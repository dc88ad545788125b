"""The server's side of one HTTP exchange with an ASGI application, message by message.

What uvicorn does between a socket and an application, a test does here by hand: it gives
the body in pieces, lets the client leave, and holds back a `send` as a slow client does.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from handler.asgi import App, Message
from handler.messages import Headers


class Exchange:
    """One request to `app`; `sent` is what the application has said, in order."""

    def __init__(self, app: App, method: str, path: str, headers: Headers, query: str) -> None:
        self._app = app
        self._scope: Message = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "state": {},
        }
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._said: asyncio.Condition = asyncio.Condition()
        self._window: float = math.inf
        self.sent: list[Message] = []
        self.reads = 0
        self.task: asyncio.Task[None]

    def start(self) -> None:
        """Call the application."""
        self.task = asyncio.create_task(self._app(self._scope, self._receive, self._send))

    def body(self, part: bytes = b"", *, more: bool = False) -> None:
        """Give a piece of the request's body."""
        self._to_app.put_nowait({"type": "http.request", "body": part, "more_body": more})

    def leave(self) -> None:
        """The client closes its connection."""
        self._to_app.put_nowait({"type": "http.disconnect"})

    def hold(self, after: int = 0) -> None:
        """The client reads no more for now: a `send` waits once `after` messages were sent."""
        self._window = max(after, len(self.sent))

    async def go_on(self) -> None:
        """The client reads again."""
        async with self._said:
            self._window = math.inf
            self._said.notify_all()

    async def heard(self, count: int) -> list[Message]:
        """The first `count` messages, once there are that many."""
        async with self._said:
            await self._said.wait_for(lambda: len(self.sent) >= count)
        return self.sent[:count]

    async def over(self) -> list[Message]:
        """All messages, once the application has returned; raises what it raised."""
        await self.task
        return self.sent

    @property
    def status(self) -> int:
        """The status of the answer."""
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer."""
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in self.sent[0]["headers"]}

    @property
    def answer(self) -> bytes:
        """The body of the answer so far."""
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    async def _receive(self) -> Message:
        self.reads += 1
        return await self._to_app.get()

    async def _send(self, message: Message) -> None:
        async with self._said:
            await self._said.wait_for(lambda: len(self.sent) < self._window)
        complete = bool(self.sent) and self.sent[-1]["type"] == "http.response.body"
        complete = complete and not self.sent[-1].get("more_body", False)
        assert not complete, f"sent after the answer was complete: {message}"  # uvicorn raises here too
        expected = "http.response.body" if self.sent else "http.response.start"
        assert message["type"] == expected, f"{message['type']} where {expected} belongs"
        async with self._said:
            self.sent.append(message)
            self._said.notify_all()
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.leave()  # as uvicorn does: there is nobody left to answer


@asynccontextmanager
async def exchange(
    app: App,
    method: str = "POST",
    path: str = "/v1/chat/completions",
    headers: Headers = (),
    parts: Sequence[bytes] | None = (b"",),
    query: str = "",
) -> AsyncIterator[Exchange]:
    """An exchange with `app` that has been given `parts` as its body, or nothing yet if None."""
    client = Exchange(app, method, path, headers, query)
    for index, part in enumerate(parts or ()):
        client.body(part, more=index + 1 < len(parts or ()))
    client.start()
    try:
        yield client
    finally:
        client.task.cancel()
        await asyncio.wait({client.task})


async def turns(count: int = 20) -> None:
    """Let everything that can run on the loop run, so that what has not happened won't."""
    for _ in range(count):
        await asyncio.sleep(0)
