"""The OpenAI edge: what vLLM's server lacks of the contract, and the default-deny routes.

`front` is outermost on every server of ours; `openai` sits right before vLLM's
application. What differs from vLLM's own server, and why, is in docs/openai.md.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

from handler import sse
from handler.body import body_fault
from handler.errors import (
    EngineDead,
    MethodNotAllowed,
    NoSuchModel,
    NoSuchRoute,
    RequestError,
    error_body,
    json_reply,
)
from handler.messages import Call, Headers, Reply, Request, once, read, without

log = logging.getLogger(__name__)

ROUTES: Mapping[str, str] = {
    "/v1/models": "GET",
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/responses": "POST",
    "/v1/embeddings": "POST",
    "/v1/rerank": "POST",
    "/v1/score": "POST",
    "/v1/audio/transcriptions": "POST",
    "/v1/audio/translations": "POST",
    "/v1/messages": "POST",
    "/v1/messages/count_tokens": "POST",
    "/v1/tokenize": "POST",
    "/v1/detokenize": "POST",
}
"""Every route that is reachable from outside, besides `GET /v1/models/{id}`."""

_MODELS = "/v1/models"
_ELSEWHERE = {"/v1/tokenize": "/tokenize", "/v1/detokenize": "/detokenize"}  # where vLLM has them

REQUEST_ID_MAX_CHARS = 128
_REQUEST_ID = re.compile(rf"[!-~]{{1,{REQUEST_ID_MAX_CHARS}}}")

_NOT_FOR_THE_ENGINE = frozenset(
    {
        "authorization",
        "x-api-key",
        "cookie",
        "x-request-id",
        "host",
        "accept-encoding",
        "origin",
        "x-priority",  # vLLM's: who may go first, and on which rank, is not the client's to say
        "x-data-parallel-rank",
    }
)

OVERLOADED_RETRY_AFTER_S = 5
"""vLLM's 503 says only that its queue is full; this is about how long one takes to move."""


def allowed(method: str, path: str) -> None:
    """Raise `NoSuchRoute` or `MethodNotAllowed` unless the OpenAI route may be called."""
    path = _canonical(path)
    known = "GET" if path.startswith(_MODELS + "/") else ROUTES.get(path)
    if known is None:
        raise NoSuchRoute(method, path)
    if method != known:
        raise MethodNotAllowed(method, path, [known])


def pattern(path: str) -> str | None:
    """The route of `path`, as a label of which there are few; None if it is none of OpenAI's."""
    path = _canonical(path)
    return "/v1/models/{id}" if path.startswith(_MODELS + "/") else path if path in ROUTES else None


def _canonical(path: str) -> str:
    return path.rstrip("/")


def front(
    call: Call,
    *,
    cors_origins: Sequence[str] = (),
    request_id: Callable[[], str] = lambda: "req_" + secrets.token_hex(16),
) -> Call:
    """What every answer has: an `x-request-id`, CORS headers where set, OpenAI's error shape.

    An incoming request id is echoed if it is printable ASCII and at most 128 characters
    long; else `request_id` makes one. `cors_origins` holds origins, or `*`.
    """

    @asynccontextmanager
    async def fronted(request: Request) -> AsyncIterator[Reply]:
        given = request.header("x-request-id") or ""
        rid = given if _REQUEST_ID.fullmatch(given) else request_id()
        extra = (("x-request-id", rid), *_cors(request, cors_origins))
        if request.method == "OPTIONS" and request.header("access-control-request-method") and len(extra) > 1:
            yield Reply(204, extra, once(b""))
            return
        headers = (*without(request.headers, ["x-request-id"]), ("x-request-id", rid))
        async with AsyncExitStack() as stack:
            try:
                reply = await stack.enter_async_context(call(replace(request, headers=headers)))
            except RequestError as error:
                reply = error.reply()
            except Exception:  # the boundary of one request: whatever it was, the client hears of it
                log.exception("request failed", extra={"request_id": rid})
                reply = RequestError("The server had an internal error.", code="internal_error").reply()
            kept = without(reply.headers, [name for name, _ in extra])
            yield replace(reply, headers=(*kept, *extra))

    return fronted


def _cors(request: Request, origins: Sequence[str]) -> Headers:
    origin = request.header("origin")
    if origin is None or not ("*" in origins or origin in origins):
        return ()
    headers = (
        ("access-control-allow-origin", "*" if "*" in origins else origin),
        ("access-control-expose-headers", "x-request-id, retry-after"),
        ("vary", "origin"),
    )
    if request.method != "OPTIONS":
        return headers
    asked = request.header("access-control-request-headers") or "authorization, content-type"
    return (
        *headers,
        ("access-control-allow-methods", "GET, POST, DELETE, OPTIONS"),
        ("access-control-allow-headers", asked),
        ("access-control-max-age", "600"),
    )


def openai(call: Call, *, engine_is_dead: Callable[[], bool] = lambda: False) -> Call:
    """The OpenAI contract over vLLM's application.

    Only the routes of `ROUTES` are reachable. Errors get OpenAI's shape with a string
    `code`, before the stream and in its midst, where the error frame is the last one.
    `/models/{id}` is answered, and no entry of `/models` names a path of this machine.
    """

    @asynccontextmanager
    async def edged(request: Request) -> AsyncIterator[Reply]:
        allowed(request.method, request.path)
        path = _canonical(request.path)
        model_id = path[len(_MODELS) + 1 :]
        one_model = path.startswith(_MODELS + "/")
        inner = replace(
            request,
            path=_MODELS if one_model else _ELSEWHERE.get(path, path),
            headers=without(request.headers, _NOT_FOR_THE_ENGINE),
        )
        async with call(inner) as reply:
            if reply.status >= 400:
                if reply.status >= 500 and engine_is_dead():
                    raise EngineDead
                yield await _error(reply, path, request)
            elif reply.streams:
                yield await _stream(reply, path, engine_is_dead)
            elif path.startswith(_MODELS):
                yield _models(json.loads(await read(reply)), model_id if one_model else None)
            else:
                yield reply

    return edged


def _models(listing: dict[str, Any], model_id: str | None) -> Reply:
    for model in listing["data"]:
        if "root" in model:
            model["root"] = model["id"]  # vLLM puts the folder of the weights here
    if model_id is None:
        return json_reply(200, listing)
    for model in listing["data"]:
        if model["id"] == model_id:
            return json_reply(200, model)
    raise NoSuchModel(model_id)


async def _error(reply: Reply, path: str, request: Request) -> Reply:
    raw = await read(reply)
    if b"json_invalid" in raw:  # of a large body not all is known, and vLLM has read all of it
        request = replace(request, members=None)
    if reply.status == 400 and (fault := body_fault(request)):
        return fault.reply()
    body = openai_error(reply.status, raw, path=path, method=request.method)
    headers = tuple(pair for pair in reply.headers if pair[0] in {"retry-after", "allow"})
    if reply.status == 503 and not headers:
        headers = (("retry-after", str(OVERLOADED_RETRY_AFTER_S)),)
    return json_reply(reply.status, body, headers)


async def _stream(reply: Reply, path: str, engine_is_dead: Callable[[], bool]) -> Reply:
    """The event stream of `reply`, or its error if it fails before it says anything.

    Some faults of a request vLLM finds only when it generates: its answer is then a 200
    whose first frame is an error. Nothing has been sent yet, so the client gets the status.
    """

    def fault(frame: bytes) -> tuple[int, dict[str, Any]]:
        if engine_is_dead():
            return EngineDead.status, EngineDead().body()
        raw = frame[frame.index(sse.ERROR_FRAME) + len(b"data: ") :]
        code = _fault(raw).get("code")
        status = code if isinstance(code, int) and 400 <= code < 600 else 500
        return status, openai_error(status, raw, path=path)

    begun = await anext(reply.frames, b"")
    if sse.ERROR_FRAME in begun:
        first = next(frame for frame in sse.split(begun) if not frame.startswith(b":"))
        if sse.ERROR_FRAME in first:
            return json_reply(*fault(first))
    headers = without(reply.headers, ("content-length", *(name for name, _ in sse.UNBUFFERED)))
    return Reply(reply.status, (*headers, *sse.UNBUFFERED), _until_error(begun, reply.frames, fault))


async def _until_error(
    begun: bytes, rest: AsyncIterator[bytes], fault: Callable[[bytes], tuple[int, dict[str, Any]]]
) -> AsyncIterator[bytes]:
    """The frames up to the first error; vLLM goes on to say [DONE], as if all were well."""

    def ended(chunk: bytes) -> bytes:
        frames = sse.split(chunk)
        at = next(index for index, frame in enumerate(frames) if sse.ERROR_FRAME in frame)
        _, body = fault(frames[at])
        return b"".join(frames[:at]) + sse.event(body)

    if begun:
        yield ended(begun) if sse.ERROR_FRAME in begun else begun
    if sse.ERROR_FRAME in begun:
        return
    async for chunk in rest:
        if sse.ERROR_FRAME in chunk:
            yield ended(chunk)
            return
        yield chunk


_TYPES = {403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    413: "request_too_large",
    415: "unsupported_media_type",
    422: "unprocessable_entity",
    429: "rate_limit_exceeded",
    500: "internal_error",
    501: "not_implemented",
    503: "overloaded",
}
_TOO_LONG_PARAM = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}


def openai_error(status: int, raw: bytes, *, path: str, method: str = "POST") -> dict[str, Any]:
    """OpenAI's error object for what vLLM answered with `status`; its message is kept.

    vLLM answers with an integer `code`, with `{"error": text}`, or with FastAPI's
    `{"detail"}` or plain text, depending on which layer refused the request.
    """
    fault = _fault(raw)
    message = fault.get("message")
    param = _param(fault.get("param"))
    code = _CODES.get(status, "server_error" if status >= 500 else "invalid_request")
    if status == 404 and message == "Not Found":
        return NoSuchRoute(method, path).body()
    # Anthropic's errors have no param, and nothing else of a message can be missing.
    if status == 404 and (param == "model" or path.startswith("/v1/messages")):
        code, param = "model_not_found", "model"
    elif param in {"input_tokens", "input_text"}:  # counted, or told by the number of characters alone
        code, param = "context_length_exceeded", _TOO_LONG_PARAM.get(path, "input")
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return error_body(
        str(message or f"The request failed with status {status}."), type=kind, param=param, code=code
    )


def _param(param: Any) -> str | None:
    """`messages[0].content` for vLLM's `body.messages.0.ChatCompletionUserMessageParam.content`."""
    if not isinstance(param, str):
        return None
    first, *rest = param.split(".")
    name = "" if first == "body" else first
    for part in rest:
        if part.isdecimal() and name:
            name += f"[{part}]"
        elif part[:1].islower():  # else a branch of a union, named after its class, or a place in the text
            name += f".{part}" if name else part
    return name or None


def _fault(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except ValueError:
        return {"message": raw.decode(errors="replace").strip()}
    error = (body.get("error") or body.get("detail") or body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        return error
    return {"message": error if isinstance(error, str) else json.dumps(error)}
