"""Server-sent events as bytes: whole frames, never a cut one.

A frame ends with a blank line (https://html.spec.whatwg.org/multipage/server-sent-events.html).
Clients drop an event without its blank line and mangle a character that was cut in two,
so whatever sits between the engine and the client passes whole frames on.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from handler.messages import Headers, as_json

UNBUFFERED: Headers = (("cache-control", "no-cache"), ("x-accel-buffering", "no"))
"""So that no cache and no proxy collects a stream; the second is for nginx."""
HEADERS: Headers = (("content-type", "text/event-stream; charset=utf-8"), *UNBUFFERED)
"""Of a stream that is ours."""

DONE = b"data: [DONE]\n\n"
ERROR_FRAME = b'data: {"error"'
"""How a frame that is an error begins. Quotes inside JSON strings are escaped: no text looks like this."""
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment frame: every client ignores it, every proxy counts it as traffic."""

_BLANK_LINES = (b"\n\n", b"\r\n\r\n", b"\r\r")


def complete(buffer: bytes) -> int:
    """How many leading bytes of `buffer` are whole frames."""
    return max(end + len(blank) if (end := buffer.rfind(blank)) >= 0 else 0 for blank in _BLANK_LINES)


async def frames(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Regroup `chunks`, cut anywhere, so that each one yielded holds whole frames only.

    What is ready goes out together and at once. Bytes after the last blank line wait for
    theirs; when the source ends without it they are passed on as they are, and when the
    source raises they are dropped, because half a frame helps nobody.
    """
    rest = b""
    async for chunk in chunks:
        if not rest and chunk.endswith(b"\n\n"):  # what vLLM sends: nearly every chunk
            yield chunk
            continue
        rest += chunk
        if end := complete(rest):
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def split(chunk: bytes) -> list[bytes]:
    """The frames of `chunk`, each with its blank line; `chunk` holds whole LF frames."""
    return [part + b"\n\n" for part in chunk.split(b"\n\n") if part]


def data(frame: bytes) -> Any:
    """The JSON value of a frame's `data:` line, its last, or None if it holds none."""
    line = frame if frame.startswith(b"data:") else frame[frame.find(b"\ndata:") + 1 :]
    if not line.startswith(b"data:"):
        return None
    try:
        return json.loads(line[5:])
    except ValueError:
        return None


def event(value: object) -> bytes:
    """One frame whose data is `value` as JSON."""
    return b"data: " + as_json(value) + b"\n\n"
