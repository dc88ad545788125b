"""Lines of OpenAI's batches: from the bytes of a file to requests, from answers to lines of its output.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}             in
    {"id": "batch_req_...", "custom_id": "a", "error": null,
     "response": {"status_code": 200, "request_id": "batch_req_...", "body": {...}}}               out

A line that was never asked has an `error` in place of its `response`. The shapes are those of
https://platform.openai.com/docs/guides/batch; its `error` here has `param` and the `line`'s number too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Self

from handler import edge
from handler.body import asks_for_stream
from handler.errors import BadRequest, BodyTooLarge, RequestError
from handler.messages import Request, as_json

REQUESTS_MAX = 50_000
FILE_MAX_BYTES = 200 << 20
"""OpenAI's limits of one batch: https://platform.openai.com/docs/guides/batch#rate-limits."""

CUSTOM_ID_MAX_CHARS = 512
"""So that what has to be remembered of a line is bounded."""
ENVELOPE_BYTES = 64 * 1024
"""How much longer than its body a line may be."""

OVERHEAD_BYTES = 1024
"""What Python takes for a line in work beside its bytes, about."""

_JSON = (("content-type", "application/json"),)
_FILES = "/v1/audio/"
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file, from byte `start` to before `end`; `raw` is None if it is too long to be held."""

    number: int
    start: int
    end: int
    raw: bytes | None = field(repr=False)


class Splitter:
    """Cuts what comes in pieces into lines, and holds no more than one of at most `max_bytes`.

    `at` and `number` are where the first piece begins: its byte, and the number of its line, from 1.
    """

    def __init__(self, max_bytes: int, at: int = 0, number: int = 1) -> None:
        self._max_bytes = max_bytes
        self._start = self._end = at
        self._number = number
        self._held = bytearray()
        self._too_long = False

    def feed(self, piece: bytes) -> Iterator[Line]:
        """The lines that end in `piece`."""
        at = 0
        while (newline := piece.find(b"\n", at)) >= 0:
            self._add(piece[at : newline + 1])
            at = newline + 1
            yield self._cut()
        self._add(piece[at:])

    def close(self) -> Iterator[Line]:
        """What comes after the last line's end, if anything does."""
        if self._end > self._start:
            yield self._cut()

    def _add(self, piece: bytes) -> None:
        self._end += len(piece)
        if self._end - self._start > self._max_bytes:
            self._too_long = True
            self._held.clear()
        else:
            self._held += piece

    def _cut(self) -> Line:
        raw = None if self._too_long else bytes(self._held)
        line = Line(self._number, self._start, self._end, raw)
        self._held.clear()
        self._too_long = False
        self._start = self._end
        self._number += 1
        return line


@dataclass(frozen=True, slots=True)
class Item:
    """One request of a batch, or what is wrong with it; `raw` of its line is not held any more.

    `key` is the same whoever runs the batch; `model` is what its body says.
    """

    line: Line
    key: str
    custom_id: str | None
    request: Request | None = field(repr=False)
    fault: RequestError | None = None
    model: str | None = None

    @property
    def size_bytes(self) -> int:
        """What it takes in memory, about."""
        return OVERHEAD_BYTES + (len(self.request.body) if self.request else 0)


def is_blank(line: Line) -> bool:
    """Whether `line` holds nothing, and is no request."""
    return line.raw is not None and not line.raw.removeprefix(_BOM).strip()


def head_of(line: Line) -> tuple[str | None, str]:
    """The line's `custom_id` if it has one, and the route that it asks if that can be asked."""
    try:
        given = _load(line)
        custom_id = _custom_id(given)
    except RequestError:
        return None, ""
    try:
        return custom_id, route(given)
    except RequestError:
        return custom_id, ""


def parse(line: Line, batch: str, *, duplicate: bool, max_body_bytes: int) -> Item:
    """The request that `line` of the batch called `batch` holds.

    `duplicate` is whether a line above it has the same `custom_id`.
    """
    key = "batch_req_" + blake2b(f"{batch}:{line.start}".encode(), digest_size=16).hexdigest()
    custom_id = None
    try:
        given = _load(line, max_body_bytes)
        custom_id = _custom_id(given)
        if duplicate:
            raise BadRequest(
                "A line above has the same 'custom_id'.", param="custom_id", code="duplicate_custom_id"
            )
        request = _request(given)
        if len(request.body) > max_body_bytes:
            raise BodyTooLarge(max_body_bytes)
    except RequestError as fault:
        return Item(replace(line, raw=None), key, custom_id, None, fault)
    model = given["body"].get("model")
    return Item(
        replace(line, raw=None), key, custom_id, request, model=model if isinstance(model, str) else None
    )


def _custom_id(given: Mapping[str, Any]) -> str:
    custom_id = given.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= CUSTOM_ID_MAX_CHARS:
        raise BadRequest(
            f"'custom_id' has to be a text of at most {CUSTOM_ID_MAX_CHARS} characters.",
            param="custom_id",
            code="invalid_custom_id",
        )
    return custom_id


def _load(line: Line, max_body_bytes: int = 0) -> Mapping[str, Any]:
    if line.raw is None:
        raise BodyTooLarge(max_body_bytes)
    try:
        given = json.loads(line.raw.removeprefix(_BOM).decode())
    except (ValueError, RecursionError):
        raise BadRequest("The line is not valid JSON.", code="invalid_json_line") from None
    if not isinstance(given, dict):
        raise BadRequest("The line is not a JSON object.", code="invalid_json_line")
    return given


def route(given: Mapping[str, Any]) -> str:
    """The route that a line asks. Raises `RequestError` for what no line can ask."""
    method, url = given.get("method"), given.get("url")
    if method != "POST":
        raise BadRequest("'method' has to be \"POST\".", param="method", code="invalid_method")
    if not isinstance(url, str):
        raise BadRequest(
            "'url' has to be a route such as \"/v1/chat/completions\".",
            param="url",
            code="missing_required_parameter",
        )
    edge.allowed(method, url)
    if url.startswith(_FILES):
        raise BadRequest(f"{url} takes a file, which a line can't hold.", param="url", code="invalid_url")
    return url


def _request(given: Mapping[str, Any]) -> Request:
    url, body = route(given), given.get("body")
    if not isinstance(body, dict):
        raise BadRequest("'body' has to be a JSON object.", param="body", code="missing_required_parameter")
    request = Request("POST", url, _JSON, as_json(body))
    if asks_for_stream(request):
        raise BadRequest('The answers of a batch are whole: leave "stream" out.', param="stream")
    return request


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch has come: `start` and `number` of the line that is next, and what came of those before.

    Tokens are those that the answers say.
    """

    start: int = 0
    number: int = 1
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def after(self, line: Line, outcome: Outcome) -> Progress:
        """As far as this, and `line`."""
        used = outcome.tokens
        return Progress(
            line.end,
            line.number + 1,
            self.completed + outcome.good,
            self.failed + (not outcome.good),
            *(getattr(self, name) + count for name, count in zip(_TOKENS, used, strict=True)),
        )

    def dump(self) -> dict[str, str]:
        """This progress as the metadata of an object: strings by name."""
        return {name.replace("_", "-"): str(getattr(self, name)) for name in self.__slots__}

    @classmethod
    def load(cls, metadata: Mapping[str, str]) -> Self:
        """The inverse of `dump`. Raises `KeyError` and `ValueError` for what is none."""
        return cls(**{name: int(metadata[name.replace("_", "-")]) for name in cls.__slots__})


_TOKENS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a line: its line for the output, if it is `good`, or for the file of errors."""

    good: bool
    raw: bytes = field(repr=False)
    tokens: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Of the prompt, of these from a cache, of the answer, of these for reasoning."""


def answered(item: Item, status: int, body: bytes) -> Outcome:
    """What an answer makes of `item`."""
    tokens = (0, 0, 0, 0)
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        body = json.dumps(body.decode(errors="replace")).encode()
    else:
        tokens = _tokens(value)
        if b"\n" in body or b"\r" in body:  # a line is one line
            body = as_json(value)
    head = json.dumps({"id": item.key, "custom_id": item.custom_id})[:-1]
    raw = (
        f'{head}, "response": {{"status_code": {status}, "request_id": "{item.key}", "body": '.encode()
        + body
        + b'}, "error": null}\n'
    )
    return Outcome(status < 400, raw, tokens)


def refused(item: Item, fault: RequestError) -> Outcome:
    """What `fault`, for which `item` was not asked, makes of it."""
    error = {"code": fault.code, "message": fault.message, "param": fault.param, "line": item.line.number}
    line = {"id": item.key, "custom_id": item.custom_id, "response": None, "error": error}
    return Outcome(good=False, raw=json.dumps(line).encode() + b"\n")


def _tokens(answer: Any) -> tuple[int, int, int, int]:
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return (0, 0, 0, 0)
    return (
        _number(usage, "prompt_tokens", "input_tokens"),
        _number(_details(usage, "prompt_tokens_details", "input_tokens_details"), "cached_tokens"),
        _number(usage, "completion_tokens", "output_tokens"),
        _number(_details(usage, "completion_tokens_details", "output_tokens_details"), "reasoning_tokens"),
    )


def _details(usage: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    return next((value for name in names if isinstance(value := usage.get(name), dict)), {})


def _number(values: Mapping[str, Any], *names: str) -> int:
    return next((value for name in names if isinstance(value := values.get(name), int)), 0)
