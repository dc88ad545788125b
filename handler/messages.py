"""The one contract of firsttoken: a `Request` goes in, a `Reply` comes out.

Whatever answers an OpenAI request is a `Call`: the engine's application, a local
worker behind a socket, a remote endpoint. Platform adapters translate an event to a
`Request` and a `Reply` to what the platform wants back, and do nothing else.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol
from urllib.parse import parse_qsl

if TYPE_CHECKING:
    from handler.members import Members

Headers = tuple[tuple[str, str], ...]
"""Header fields in wire order; names in lower case, values as latin-1 text."""


PATIENCE_S = 590.0
"""How long a client waits that hears nothing: OpenAI's give up after 600 s."""


class Trace(Protocol):
    """Told what becomes of a request, where traces are on (`handler.otel`)."""

    def waited(self, since_s: float) -> None:
        """It waited for a worker from `since_s` until now."""

    def attempted(self, call: Call) -> Call:
        """`call`, which asks a worker: each request to it is told as an attempt."""


@dataclass(frozen=True, slots=True)
class Visit:
    """How long a request has waited so far, and for whom. Times are of `time.monotonic`."""

    arrived_s: float = field(default_factory=time.monotonic)
    admitted: bool = False
    """It was admitted before: it has waited, or was with a worker that is lost. No full queue refuses it."""
    worked_s: float = 0.0
    """Seconds that it spent with workers that were lost; they do not count as waiting."""
    taken: Callable[[], object] = lambda: None
    """Called when a worker gets it; again when another one does, after that one was lost."""
    kept_alive: bool = False
    """Its client is sent comments while it waits, if it asks for a stream."""
    caller: str = ""
    """The id of the key that asks: turns are taken and tokens counted by it."""
    background: bool = False
    """Nobody sits there and waits: a line of a batch, a job with low priority. All others go first."""

    wait_s: float | None = None
    """How long it may wait in all, where whoever asks sets that; None for a request over HTTP."""
    trace: Trace | None = None
    """None where traces are off."""

    def deadline_s(self, timeout_s: float) -> float:
        """Until when it may wait: `timeout_s` from its arrival.

        Time with workers that were lost is added, as long as that stays within `PATIENCE_S`.
        """
        if self.wait_s is not None:
            return self.arrived_s + self.wait_s
        return self.arrived_s + min(timeout_s + self.worked_s, max(timeout_s, PATIENCE_S))


@dataclass(frozen=True, slots=True)
class Request:
    """One OpenAI request, whatever carried it.

    `path` starts at `/v1/...`, is percent-decoded and holds no query string; `body` is
    the whole body (a request is bounded by `MAX_BODY_BYTES`, see `handler.edge`).
    """

    method: str
    path: str
    headers: Headers = ()
    body: bytes = b""
    query: str = ""
    visit: Visit = field(default_factory=Visit, compare=False, repr=False)
    members: Members | None = field(default=None, compare=False, repr=False)
    """What was found in a large `body` (`handler.body.looked`); None: whoever wants to know reads it."""
    pieces: AsyncIterator[bytes] | None = field(default=None, compare=False, repr=False)
    """The body as it comes, for a call that reads it by itself; `body` is empty then."""

    def header(self, name: str) -> str | None:
        """The first value of `name` (lower case), or None."""
        return first(self.headers, name)

    @property
    def parameters(self) -> dict[str, str]:
        """What `query` says; of a name that stands there more than once its last value."""
        return dict(parse_qsl(self.query, keep_blank_values=True))


@dataclass(frozen=True, slots=True)
class Reply:
    """Status, headers and the body as it is made.

    `frames` yields non-empty byte chunks. Of an event stream each chunk holds whole SSE
    frames only (see `handler.sse`). It is valid inside the `async with` that opened it.
    """

    status: int
    headers: Headers
    frames: AsyncIterator[bytes] = field(repr=False)

    def header(self, name: str) -> str | None:
        """The first value of `name` (lower case), or None."""
        return first(self.headers, name)

    @property
    def streams(self) -> bool:
        """Whether the body is a server-sent event stream."""
        return (self.header("content-type") or "").startswith("text/event-stream")


Call = Callable[[Request], AbstractAsyncContextManager[Reply]]
"""`async with call(request) as reply:` answers one request.

Entering waits for status and headers. Leaving the block early, or cancelling the task
that waits in it, cancels the work behind it: there is no other abort API. Raises
`handler.errors.RequestError` for what could not be answered at all.
"""


def first(headers: Headers, name: str) -> str | None:
    """The first value of the header `name` (lower case), or None."""
    for key, value in headers:
        if key == name:
            return value
    return None


def without(headers: Headers, names: Iterable[str]) -> Headers:
    """`headers` without the fields called `names` (lower case)."""
    drop = frozenset(names)
    return tuple([pair for pair in headers if pair[0] not in drop])


def as_json(value: object) -> bytes:
    """`value` as JSON, in UTF-8 and without spaces."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # JSON can name half a character (`\ud800`), UTF-8 can't hold it: it is escaped again.
    return text.encode(errors="backslashreplace")


async def once(body: bytes) -> AsyncIterator[bytes]:
    """The frames of a body that is already whole."""
    if body:
        yield body


async def read(reply: Reply) -> bytes:
    """The whole body of `reply`."""
    return b"".join([chunk async for chunk in reply.frames])
