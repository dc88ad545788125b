"""What an answer has cost, from the answer itself: the tokens of its prompt and those that were made.

A whole answer says it, a stream of chat or text only to who asks for it (`stream_options.include_usage`). So
the engine is always asked, and the chunk that says it is taken out again for a client that did not ask.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from handler import sse
from handler.body import asks_for_stream
from handler.messages import Call, Reply, Request

_SAYS_ONLY_IF_ASKED = frozenset({"/v1/chat/completions", "/v1/completions"})
_ASK = b'{"stream_options":{"include_usage":true},'
_USAGE = b'"usage"'
"""Quotes inside JSON strings are escaped: no text of an answer looks like this."""
_DATA = b"data: {"
_PROMPT = ("prompt_tokens", "input_tokens")
_COMPLETION = ("completion_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class Usage:
    """What one answer has cost, by its own word; if it was left before that (not `whole`), by its frames."""

    model: str
    prompt_tokens: int
    completion_tokens: int
    whole: bool = True


def metered(call: Call, tell: Callable[[Usage], None]) -> Call:
    """`call`, of whose every successful answer to a POST `tell` hears what it has cost, once it is over.

    A stream that is left before its end counts a token for each frame, and none for its prompt: what was made
    by then the engine has not said.
    """

    @asynccontextmanager
    async def counted(request: Request) -> AsyncIterator[Reply]:
        if request.method != "POST":
            async with call(request) as reply:
                yield reply
            return
        asked, hides = _with_usage(request)
        async with call(asked) as reply:
            if reply.status >= 400:
                yield reply
                return
            meter = _Meter(hides=hides)
            try:
                frames = meter.stream(reply.frames) if reply.streams else meter.whole(reply.frames)
                yield replace(reply, frames=frames)
            finally:
                tell(meter.usage())

    return counted


def _with_usage(request: Request) -> tuple[Request, bool]:
    """The request as the engine gets it, and whether its client does not want to see what that adds."""
    if request.path.rstrip("/") not in _SAYS_ONLY_IF_ASKED or not asks_for_stream(request):
        return request, False
    if b'"stream_options"' not in request.body:
        return replace(request, body=request.body.replace(b"{", _ASK, 1)), True
    body = json.loads(request.body)
    options = body.get("stream_options")
    if options is None:
        options = {}
    if not isinstance(options, dict) or options.get("include_usage"):
        return request, False  # the client asks, or is told what is wrong with it
    body["stream_options"] = {**options, "include_usage": True}
    # JSON can name half a character (`\ud800`), UTF-8 can't hold it: it is escaped again.
    raw = json.dumps(body, ensure_ascii=False).encode(errors="backslashreplace")
    return replace(request, body=raw), True


class _Meter:
    """Reads along."""

    def __init__(self, *, hides: bool) -> None:
        self._hides = hides
        self._model = ""
        self._prompt = 0
        self._completion = 0
        self._frames = 0
        self._ended = False

    def usage(self) -> Usage:
        """What was found, or counted."""
        if self._ended:
            return Usage(self._model, self._prompt, self._completion)
        return Usage(self._model, self._prompt, max(self._completion, self._frames), whole=False)

    async def whole(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        parts = []
        async for chunk in chunks:
            parts.append(chunk)
            yield chunk
        self._ended = True
        try:
            self._find(json.loads(b"".join(parts)))
        except (ValueError, RecursionError):
            return  # an answer that is no JSON says nothing of it

    async def stream(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            if not self._model:
                self._name(chunk)
            if _USAGE in chunk:
                chunk = b"".join(frame for frame in sse.split(chunk) if self._shows(frame))  # noqa: PLW2901
                if not chunk:
                    continue
            else:
                self._frames += chunk.count(_DATA)
            yield chunk
        self._ended = True

    def _shows(self, frame: bytes) -> bool:
        """Whether the client sees `frame`."""
        value = _data(frame)
        if value is None or not self._find(value):
            self._frames += frame.count(_DATA)
            return True
        return not (self._hides and value.get("choices") == [])

    def _name(self, chunk: bytes) -> None:
        for frame in sse.split(chunk):
            value = _data(frame)
            if value is not None:
                self._find(value)
                return

    def _find(self, value: Any) -> bool:
        """Whether `value` says what was used, in one of the places where routes say it."""
        found = False
        if not isinstance(value, dict):
            return False
        for place in (value, value.get("response"), value.get("message")):
            if not isinstance(place, dict):
                continue
            self._model = self._model or str(place.get("model") or "")
            if isinstance(usage := place.get("usage"), dict):
                self._prompt = _first(usage, _PROMPT, self._prompt)
                self._completion = _first(usage, _COMPLETION, self._completion)
                found = True
        return found


def _data(frame: bytes) -> dict[str, Any] | None:
    """The JSON object of a frame, named events (`event: ...`) included."""
    at = frame.find(b"data:")
    value = sse.data(frame[at:]) if at >= 0 else None
    return value if isinstance(value, dict) else None


def _first(usage: Mapping[str, Any], names: tuple[str, str], otherwise: int) -> int:
    """The number under one of `names`."""
    for name in names:
        if isinstance(value := usage.get(name), int):
            return value
    return otherwise
