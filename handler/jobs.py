r"""RunPod jobs: their input as a `Request`, an answer as their output, and both the other way round.

Inputs, `parse` and for the first one `dump`:

    {"openai_route": "/v1/chat/completions", "openai_input": {...}}    what RunPod's OpenAI URL makes
    {"route": "/v1/completions", "body": {...}, "method": "POST"}
    {"messages" or "prompt": ..., "sampling_params": {...}, "stream": false}

Outputs, `render` and `load`: a stream is strings of whole SSE frames, anything else one value. An
error is OpenAI's object with two more fields, which RunPod's path has no other place for:

    {"error": {"message", "type", "param", "code", "status": 404, "retry_after": 5}}

The SDK (runpod 1.12, serverless/modules/rp_job.py) turns a dict that has an `error` into Python's
own spelling of it and fails the job. What survives, and is used here:

- a request's own fault (4xx): the object as a dict that does not give its error away to `.get`,
  in a stream the frame `data: {"error": {...}}`. The job is COMPLETED, its output is the object;
- the worker's fault (5xx), and a stream that broke: the same frame in a stream, and then the object
  as JSON text for the job's `error`. The job is FAILED.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from handler import sse
from handler.body import asks_for_stream, body_fault
from handler.errors import BadEvent, BadRequest, RequestError, UpstreamFailed, json_reply
from handler.messages import Call, Reply, Request, as_json, once, read

log = logging.getLogger(__name__)

_JSON = (("content-type", "application/json"),)

SHAPES = (
    '{"openai_route": "/v1/chat/completions", "openai_input": {...}}, '
    '{"route": "/v1/chat/completions", "body": {...}, "method": "POST"}, '
    '{"messages": [...], "sampling_params": {...}, "stream": false} or the same with "prompt"'
)

TOO_LARGE = "answer_too_large"
ANSWER_MAX_BYTES = 20_000_000
"""What RunPod takes as a job's result; it refuses a larger one, and the SDK gives up."""

_OF_WORKER_VLLM = frozenset(
    {
        "sampling_params",
        "apply_chat_template",
        "use_openai_format",
        "batch_size",
        "max_batch_size",
        "min_batch_size",
        "batch_size_growth_factor",
    }
)
"""Fields of its shorthand that are no parameters of OpenAI's: tokens are sent as they are made."""

_ERROR_FRAME = sse.ERROR_FRAME.decode()


def parse(job_input: object, dump: Callable[[object], bytes] = as_json) -> Request:
    """The request that a job's `input` holds; `dump` makes its body of what is for that.

    Raises `BadEvent`, which names the shapes that there are. Whether its route may be called is
    asked of `handler.edge`, as for every request.
    """
    if not isinstance(job_input, dict):
        raise BadEvent(f"A job's input is a JSON object: {SHAPES}.")
    if "openai_route" in job_input or "openai_input" in job_input:
        path = _path(job_input.get("openai_route", "/v1/chat/completions"), "openai_route")
        body = job_input.get("openai_input")
        empty = body is None or (not body and (path + "/").startswith("/v1/models/"))
        return _request("GET" if empty else "POST", path, None if empty else body, dump)
    if "route" in job_input:
        body = job_input.get("body")
        method = job_input.get("method") or ("GET" if body is None else "POST")
        if not isinstance(method, str):
            raise BadEvent('"method" of a job\'s input is a string, "GET" or "POST".')
        return _request(method.upper(), _path(job_input["route"], "route"), body, dump)
    if job_input.get("messages") is not None or job_input.get("prompt") is not None:
        return _shorthand({name: value for name, value in job_input.items() if value is not None}, dump)
    named = ", ".join(sorted(map(repr, job_input))) or "none"
    raise BadEvent(f"A job's input has one of these shapes: {SHAPES}. The keys of this one: {named}.")


def _shorthand(job_input: Mapping[str, Any], dump: Callable[[object], bytes]) -> Request:
    params = job_input.get("sampling_params") or {}
    if not isinstance(params, dict):
        raise BadEvent('"sampling_params" of a job\'s input is a JSON object.')
    body = {**params, **{key: value for key, value in job_input.items() if key not in _OF_WORKER_VLLM}}
    if "messages" not in body and job_input.get("apply_chat_template"):
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    if "messages" in body:
        return _request("POST", "/v1/chat/completions", body, dump)
    return _request("POST", "/v1/completions", body, dump)


def _path(route: object, key: str) -> str:
    if not isinstance(route, str):
        raise BadEvent(f'"{key}" of a job\'s input is a string such as "/v1/chat/completions".')
    path = "/" + route.strip().lstrip("/")
    return path if path.startswith("/v1/") else "/v1" + path


def _request(method: str, path: str, body: object, dump: Callable[[object], bytes]) -> Request:
    if body is None:
        return Request(method, path)
    return Request(method, path, _JSON, dump(body))


def dump(request: Request) -> dict[str, Any]:
    """The job's input for `request`, as RunPod's OpenAI URL makes it.

    Raises `BadRequest` for a body that is no JSON object: no job can hold it.
    """
    if request.method != "POST":
        return {"openai_route": request.path}
    if fault := body_fault(replace(request, members=None)):  # which must be all that is wrong with it
        raise fault
    try:
        return {"openai_route": request.path, "openai_input": json.loads(request.body)}
    except (ValueError, RecursionError):  # a form: files of sound
        raise BadRequest(
            "A job holds JSON: this route takes files, and can't be asked through jobs."
        ) from None


class _Output(dict[str, Any]):
    """A dict that the SDK passes on as it is, whatever it holds: it looks with `.get("error")`."""

    def get(self, key: str, default: Any = None) -> Any:
        return default if key == "error" else super().get(key, default)


async def outputs(
    call: Call, job_id: str, job_input: object, *, opened: Callable[[AsyncExitStack], object] = lambda _: None
) -> AsyncGenerator[Any, None]:
    """The outputs of a job that `call` is asked, whatever happens; see the top of this file.

    `job_input` may be what `parse` has made of it. `opened` is given the stack that the call is entered on,
    before it is.
    """
    streamed = begun = False
    try:
        request = job_input if isinstance(job_input, Request) else parse(job_input)
        streamed = asks_for_stream(request)
        request = replace(request, headers=(*request.headers, ("x-request-id", job_id)))
        async with AsyncExitStack() as work:
            opened(work)
            reply = await work.enter_async_context(call(request))
            async for output in render(reply, streamed=streamed):
                begun = streamed
                yield output
    except RequestError as error:
        for output in render_error(error_of(error), streamed=streamed, begun=begun):
            yield output
    except Exception:  # the boundary of a job: it is answered whatever happens
        log.exception("job failed", extra={"job": job_id})
        fault = RequestError("The server had an internal error.", code="internal_error")
        for output in render_error(error_of(fault), streamed=streamed, begun=begun):
            yield output


def failure(output: Any) -> str | None:
    """Why a job FAILED whose last output is `output`, as the SDK looks for it; None if it did not."""
    return (output.get("error") or None) if isinstance(output, dict) else None


async def render(reply: Reply, *, streamed: bool) -> AsyncIterator[Any]:
    """The outputs of a job that is answered with `reply`, in order; see the top of this file.

    `streamed` is whether the request asked for a stream. Raises `RequestError` for an answer that
    RunPod would not take: its job would hang. The job of a stream that is too long FAILED likewise,
    after its last frame.
    """
    if reply.status >= 400:
        error = {**_error(await read(reply)), "status": reply.status}
        if (seconds := reply.header("retry-after") or "").isdecimal():
            error["retry_after"] = int(seconds)
        for output in render_error(error, streamed=streamed):
            yield output
    elif reply.streams:
        broken, posted = "", 0
        async for chunk in reply.frames:
            text = chunk.decode(errors="replace")
            broken = text if _ERROR_FRAME in text else ""
            posted += _posted_bytes(text)
            yield text
        if posted > ANSWER_MAX_BYTES and not broken:  # it was told whole; its result would be refused
            yield {"error": json.dumps(error_of(too_large(posted)))}
        if broken:
            text = broken[broken.index(_ERROR_FRAME) + len("data: ") :]
            yield {"error": json.dumps(_error(text.partition("\n\n")[0]))}
    else:
        raw = await read(reply)
        value = _value(raw, reply.header("content-type") or "")
        # With the SDK's spaces it is half as long again at most.
        if len(raw) > ANSWER_MAX_BYTES / 2 and (posted := _posted_bytes(value)) > ANSWER_MAX_BYTES:
            raise too_large(posted)
        yield value


def render_error(error: Mapping[str, Any], *, streamed: bool, begun: bool = False) -> list[Any]:
    """The outputs that tell `error`, an error object with its `status`; `begun` is in mid-stream."""
    told = {name: value for name, value in error.items() if name != "status"} if begun else dict(error)
    frame = [sse.event({"error": told}).decode()] if streamed else []
    if begun or error["status"] >= 500:
        return [*frame, {"error": json.dumps(error)}]
    return frame or [_Output(_held({"error": told}))]


def error_of(error: RequestError) -> dict[str, Any]:
    """The error object of `error`, with what of its answer is not in the body."""
    found = {**error.body()["error"], "status": error.status}
    for name, value in error.headers:
        if name == "retry-after":
            found["retry_after"] = int(value)
    return found


def load(output: Any, *, streamed: bool) -> Reply | None:
    """The reply that a job's first `output` is all of; None if it begins a stream.

    The inverse of `render`.
    """
    if isinstance(output, str):
        error = _told(output.partition("\n\n")[0].removeprefix("data: ")) if streamed else None
        if error is not None and "status" in error:  # else a stream's own frame
            return _error_reply(error)
        text = output.encode(errors="replace")
        return None if streamed else Reply(200, (("content-type", "text/plain; charset=utf-8"),), once(text))
    if isinstance(output, dict) and isinstance(error := output.get("error"), dict) and "status" in error:
        return _error_reply(error)
    return json_reply(200, output)


def load_failure(error: object) -> Reply:
    """The reply for a job that FAILED with `error`."""
    try:
        found = json.loads(error) if isinstance(error, str) else error
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and "message" in found:
        return _error_reply({"status": 500, **found})
    first = next(iter(str(error or "").split("\n")), "").strip()[:300]
    return UpstreamFailed(f"The job failed: {first or 'no reason was given'}").reply()


def _error_reply(error: Mapping[str, Any]) -> Reply:
    status, retry_after = error["status"], error.get("retry_after")
    if not (_is_number(status) and 400 <= status < 600):
        return UpstreamFailed("The job failed, with a status that is none.").reply()
    body = {name: error.get(name) for name in ("message", "type", "param", "code")}
    headers = (("retry-after", str(retry_after)),) if _is_number(retry_after) else ()
    return json_reply(status, {"error": body}, headers)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _posted_bytes(output: Any) -> int:
    """What `output` takes of a job's result."""
    return len(json.dumps(output, ensure_ascii=False).encode(errors="replace")) + len(", ")


def too_large(posted_bytes: int) -> RequestError:
    """What a job fails with whose answer takes `posted_bytes`."""
    return RequestError(
        f"The answer takes {posted_bytes} bytes, and a job can't hold more than {ANSWER_MAX_BYTES}.",
        code=TOO_LARGE,
    )


def _told(text: str | bytes) -> dict[str, Any] | None:
    """The error object in `text`, or None."""
    try:
        error = json.loads(text)["error"]
    except (ValueError, TypeError, KeyError):
        return None
    return error if isinstance(error, dict) else None


def _error(text: str | bytes) -> dict[str, Any]:
    return _told(text) or error_of(RequestError("The server had an internal error.", code="internal_error"))


def _value(raw: bytes, content_type: str) -> Any:
    if not content_type.startswith("application/json"):
        return raw.decode(errors="replace")
    value = json.loads(raw)
    if b"\\ud" in raw.lower():
        value = _held(value)
    return _Output(value) if isinstance(value, dict) else value


def _held(value: Any) -> Any:
    """`value` with a mark for each half of a character: the SDK sends UTF-8, and loses what it can't send."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
