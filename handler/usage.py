"""What an answer has cost, from the answer itself: the tokens of its prompt and those that were made.

A whole answer says it, a stream of chat or text only to who asks for it (`stream_options.include_usage`). So
the engine is always asked, and for a client that did not ask the stream is made what it would have been: the
chunk that says it is taken out, and vLLM's fingerprint, which is then on it alone, put where it is else.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from handler import sse
from handler.body import asks_for_stream, member, truth, with_member
from handler.errors import RequestError
from handler.messages import Call, Reply, Request, as_json, without

_SAYS_ONLY_IF_ASKED = frozenset({"/v1/chat/completions", "/v1/completions"})
_OPTIONS = "stream_options"
_USAGE = b'"usage"'
"""Quotes inside JSON strings are escaped: no text of an answer looks like this."""
_EACH = "continuous_usage_stats"
_FINGERPRINT = "system_fingerprint"
_FINISHED = b'"finish_reason":"'
_DATA = b"data: {"
_LAST = (
    sse.DONE,
    *(b"event: response.%b\n" % how for how in (b"completed", b"incomplete", b"failed")),
    b"event: message_stop\n",
)
LARGE_BYTES = 1 << 20
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

    @contextmanager
    def meter(_: Request, hides: bool) -> Iterator[Meter]:
        reading = Meter(hides=hides)
        try:
            yield reading
        finally:
            tell(reading.usage())

    return read_along(call, meter)


def read_along(call: Call, meter: Callable[[Request, bool], AbstractContextManager[Meter]]) -> Call:
    """`call`, of which a meter reads every successful answer to a POST.

    `meter` is given the request, and whether its client does not want to see what that adds (`with_usage`);
    what it gives is left when the answer is over.
    """

    @asynccontextmanager
    async def counted(request: Request) -> AsyncIterator[Reply]:
        if request.method != "POST":
            async with call(request) as reply:
                yield reply
            return
        asked, hides = with_usage(request)
        async with call(asked) as reply:
            if reply.status >= 400:
                yield reply
                return
            with meter(request, hides) as reading:
                yield reading.read(reply)

    return counted


def with_usage(request: Request) -> tuple[Request, bool]:
    """The request as the engine gets it, and whether its client does not want to see what that adds."""
    if request.path.rstrip("/") not in _SAYS_ONLY_IF_ASKED or not asks_for_stream(request):
        return request, False
    options = member(request, _OPTIONS)
    if options is None:
        options = {}
    if not isinstance(options, dict) or truth(options.get("include_usage", False)) is not False:
        return request, False  # the client asks, or is told what is wrong with it
    added = {"include_usage": True}
    if truth(options.get(_EACH)):  # which says nothing to who does not ask for usage
        added[_EACH] = False
    return with_member(request, _OPTIONS, {**options, **added}), True


async def _nothing() -> None:
    """Nothing has to be done before an answer ends."""


class Meter:
    """Reads an answer along. `settle` is awaited once, before its last bytes are passed on.

    Nothing else holds a byte back, but for a whole answer's last chunk. `hides`: the client does not see that
    a stream says its usage. A frame by which a choice ends is then held until the next one, which comes with
    it where that was the last choice.
    """

    def __init__(self, *, hides: bool, settle: Callable[[], Awaitable[None]] = _nothing) -> None:
        self._hides = hides
        self._settle = settle
        self._model = ""
        self._prompt = 0
        self._completion = 0
        self._frames = 0
        self._found = False
        self._whole = False
        self._held: list[bytes] = []

    def usage(self) -> Usage:
        """What was found, or counted, by now."""
        if self._whole:
            return Usage(self._model, self._prompt, self._completion)
        return Usage(self._model, self._prompt, max(self._completion, self._frames), whole=False)

    def read(self, reply: Reply) -> Reply:
        """`reply`, whose frames are read along."""
        if not reply.streams:
            return replace(reply, frames=self._body(reply.frames))
        # A server that has all of its events before it answers may say how long they are.
        headers = without(reply.headers, ["content-length"])
        return replace(reply, headers=headers, frames=self._stream(reply.frames))

    async def _body(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        parts: list[bytes] = []
        async for chunk in chunks:
            if parts:
                yield parts[-1]
            parts.append(chunk)
        self._whole = True
        with suppress(ValueError, RecursionError):  # an answer that is no JSON says nothing of it
            self._find(_answer(b"".join(parts)))
        await self._settle()
        if parts:
            yield parts[-1]

    async def _stream(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        chunk = b""
        try:
            async for chunk in chunks:
                shown = self._passed(chunk)
                if not self._whole and _ends(chunk):
                    self._whole = True
                    await self._settle()
                if shown:
                    yield shown
        except RequestError:
            if self._held:
                yield b"".join(self._released())
            raise
        if self._held:
            yield b"".join(self._released())
        if self._whole:
            return
        if sse.ERROR_FRAME in chunk:  # the last frame of a stream that broke
            self._frames -= 1
        else:
            self._whole = self._found
        await self._settle()

    def _passed(self, chunk: bytes) -> bytes:
        """What the client gets now that `chunk` has come: nearly always that."""
        ends = self._hides and (self._held or _FINISHED in chunk)
        if not (ends or _USAGE in chunk or not self._frames):
            self._frames += chunk.count(_DATA)
            return chunk
        frames = sse.split(chunk)
        passed = [part for frame in frames for part in self._shown(frame)]
        return chunk if passed == frames else b"".join(passed)

    def _shown(self, frame: bytes) -> list[bytes]:
        """The frames that the client sees now that `frame` has come."""
        value = sse.data(frame)
        if not isinstance(value, dict):
            return [*self._released(), frame]
        says = self._find(value)
        if not says:
            self._frames += not _opens(value)
        elif self._hides and value.get("choices") == []:
            return self._released(value.get(_FINGERPRINT))
        elif value.get("choices"):
            self._hides = False  # nobody has asked for it there: this engine says it to everybody
        if self._hides and not says and _FINISHED in frame:
            self._held.append(frame)
            return []
        return [*self._released(), frame]

    def _released(self, fingerprint: object = None) -> list[bytes]:
        """The frames that were held, with the `fingerprint` that they would have had."""
        released, self._held = self._held, []
        if fingerprint is None:
            return released
        said = b"," + as_json({_FINGERPRINT: fingerprint})[1:]
        return [frame[: frame.rindex(b"}")] + said + b"\n\n" for frame in released]

    def _find(self, value: Any) -> bool:
        """Whether `value` says what was used, in one of the places where routes say it."""
        found = False
        if not isinstance(value, dict):
            return False
        for place in (value, value.get("response"), value.get("message")):
            if not isinstance(place, dict):
                continue
            # Half a character, which JSON can name, could be written down nowhere.
            name = str(place.get("model") or "").encode(errors="replace").decode()
            self._model = self._model or name
            if isinstance(usage := place.get("usage"), dict):
                self._prompt = _first(usage, _PROMPT, self._prompt)
                self._completion = _first(usage, _COMPLETION, self._completion)
                self._found = found = True
        return found


def _answer(body: bytes) -> Any:
    """The JSON of a whole answer; of a large one, of embeddings say, only what it has used.

    To parse those whole would take a hundred milliseconds, in which no other answer goes on.
    """
    if len(body) < LARGE_BYTES:
        return json.loads(body)
    at = body.rfind(_USAGE)
    text = body[at + len(_USAGE) :].decode().lstrip(" :\n") if at >= 0 else "null"
    return {"usage": json.JSONDecoder().raw_decode(text)[0]}


def _ends(chunk: bytes) -> bool:
    """Whether the last frame of `chunk` is the one by which clients know that the answer is whole."""
    before = chunk.rfind(b"\n\n", 0, -2)
    return chunk.startswith(_LAST, before + 2 if before >= 0 else 0)


def _opens(value: Mapping[str, Any]) -> bool:
    """Whether a chunk of a chat says only who speaks."""
    choices = value.get("choices")
    said = choices if isinstance(choices, list) and choices else [None]
    deltas = [one.get("delta") if isinstance(one, dict) else None for one in said]
    return all(
        isinstance(delta, dict) and {name for name in delta if delta[name]} == {"role"} for delta in deltas
    )


def _first(usage: Mapping[str, Any], names: tuple[str, str], otherwise: int) -> int:
    """The number under one of `names`."""
    for name in names:
        if isinstance(value := usage.get(name), int):
            return value
    return otherwise
