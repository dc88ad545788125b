"""`handler.edge`: the routes that are reachable, and OpenAI's contract over what vLLM says."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from handler import sse
from handler.asgi import call_app, serve
from handler.body import look
from handler.edge import ROUTES, allowed, front, openai
from handler.errors import (
    EngineDead,
    Forbidden,
    MethodNotAllowed,
    NoSuchModel,
    NoSuchRoute,
    RequestError,
    UpstreamFailed,
)
from handler.members import LARGE_BYTES
from handler.messages import Call, Headers, Reply, Request, read
from tests.asgi_client import exchange
from tests.scripted_app import EVENT_STREAM, Fail, Pause, Say, Script, ScriptedApp, answer, stream

CHAT = "POST /v1/chat/completions"
REQUEST = Request("POST", "/v1/chat/completions")


def fault(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error body as OpenAI's."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def ask(call: Call, request: Request = REQUEST) -> tuple[int, Headers, bytes]:
    """Status, headers and body of an answer."""
    async with call(request) as reply:
        return reply.status, reply.headers, await read(reply)


# --- routes -------------------------------------------------------------------------------------

OURS = {
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{id}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/rerank"),
    ("POST", "/v1/score"),
    ("POST", "/v1/audio/transcriptions"),
    ("POST", "/v1/audio/translations"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/v1/tokenize"),
    ("POST", "/v1/detokenize"),
}
THEIRS = [  # what vLLM 0.32 can have beside these, from its /openapi.json and its routers
    *(
        "/invocations",
        "/ping",
        "/health",
        "/metrics",
        "/load",
        "/version",
        "/docs",
        "/redoc",
        "/openapi.json",
    ),
    *("/tokenize", "/detokenize", "/tokenizer_info", "/pooling", "/classify", "/score", "/rerank"),
    *("/v2/rerank", "/v2/embed", "/cohere/v2/chat", "/generative_scoring", "/kv_event_sources"),
    *("/inference/v1/generate", "/inference/v1/abort_requests", "/abort_requests", "/v1/systemone"),
    *("/v1/chat/completions/batch", "/v1/chat/completions/render", "/v1/completions/render"),
    *("/v1/responses/resp_1", "/v1/responses/resp_1/cancel", "/v1/realtime", "/v1/load_lora_adapter"),
    *("/v1/unload_lora_adapter", "/scale_elastic_ep", "/is_scaling_elastic_ep", "/start_profile"),
    *("/stop_profile", "/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/reset_prefix_cache"),
    *("/reset_mm_cache", "/server_info", "/pause", "/resume", "/update_weights"),
]
TRICKS = [  # as a server hands them on: decoded once
    *(
        "",
        "/",
        "//",
        "/v1",
        "/v1/",
        "v1/models",
        "//v1/models",
        "/v1//models",
        "/v1/./models",
        "/./v1/models",
    ),
    *("/v1/../invocations", "/v1/../v1/models", "/../v1/models", "/v1/chat/completions/../../invocations"),
    *(
        "/v1/%2e%2e/invocations",
        "/v1%2fmodels",
        "/v1/model%73",
        "/v1\\models",
        "/v1/models;x",
        "/v1/models?x",
    ),
    *(
        "/V1/models",
        "/v1/Models",
        "/v1/MODELS",
        "/v1/models ",
        " /v1/models",
        "/v1/models\x00",
        "/v1/modelsx",
    ),
    *(
        "/v1/model",
        "/v1/chat",
        "/v1/chat/completions/x",
        "/v1/chat/completions\n",
        "/v1/chat\u2215completions",
    ),
    *("/invocations/v1/models", "/metrics/v1/chat/completions", "http://127.0.0.1/v1/models"),
]


def test_the_routes_are_these() -> None:
    """The list is read against the documentation by a person: a new route is added here too."""
    assert {(method, path) for path, method in ROUTES.items()} == OURS - {("GET", "/v1/models/{id}")}


@pytest.mark.parametrize(("method", "path"), sorted(OURS))
def test_a_route_is_reachable_with_its_method(method: str, path: str) -> None:
    """With and without a slash at the end."""
    allowed(method, path)
    allowed(method, path + "/")


@pytest.mark.parametrize(("method", "path"), sorted(OURS))
def test_another_method_is_405_with_allow(method: str, path: str) -> None:
    """HEAD and OPTIONS count as others: vLLM has neither."""
    for other in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "get", ""):
        if other != method:
            with pytest.raises(MethodNotAllowed) as refused:
                allowed(other, path)
            assert refused.value.headers == (("allow", method),)


@pytest.mark.parametrize("path", [*THEIRS, *TRICKS])
async def test_nothing_else_is_reachable(path: str) -> None:
    """Neither vLLM's other routes nor a way around the list: the application is not even asked."""
    app = ScriptedApp({})
    for method in ("GET", "POST", "OPTIONS", "HEAD"):
        with pytest.raises(NoSuchRoute):
            await ask(openai(call_app(app)), Request(method, path))
    assert app.seen == []


@pytest.mark.parametrize(
    "model_id", ["../invocations", "../../metrics", "a/../../v1/completions", "%2e%2e/x", "/x"]
)
async def test_a_model_id_is_never_a_path(model_id: str) -> None:
    """Whatever stands behind `/models/`, vLLM is asked for its list and for nothing else."""
    app = ScriptedApp({"GET /v1/models": answer({"object": "list", "data": [{"id": "m"}]})})
    with pytest.raises(NoSuchModel):
        await ask(openai(call_app(app)), Request("GET", f"/v1/models/{model_id}"))
    assert [(seen.method, seen.path) for seen in app.seen] == [("GET", "/v1/models")]


@pytest.mark.parametrize(
    ("path", "inner"),
    [
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1/completions", "/v1/completions"),
        ("/v1/tokenize", "/tokenize"),
        ("/v1/detokenize/", "/detokenize"),
    ],
)
async def test_a_request_reaches_vllm_where_vllm_has_the_route(path: str, inner: str) -> None:
    """Without a redirect, and with method, query and body as they were."""
    app = ScriptedApp({f"POST {inner}": answer({"a": 1})})
    status, _, body = await ask(openai(call_app(app)), Request("POST", path, (), b"{}", "x=1"))
    assert (status, body) == (200, b'{"a": 1}')
    assert (app.seen[0].query, app.seen[0].body) == ("x=1", b"{}")


async def test_the_engine_sees_no_key_and_no_request_id() -> None:
    """Nor what would change the answer's encoding or origin; the rest it sees."""
    app = ScriptedApp({CHAT: answer({})})
    hidden = ("authorization", "x-api-key", "cookie", "x-request-id", "host", "accept-encoding", "origin")
    kept = (("content-type", "application/json"), ("x-other", "1"))
    headers = (*((name, "secret") for name in hidden), *kept)
    await ask(openai(call_app(app)), Request("POST", "/v1/chat/completions", headers))
    assert app.seen[0].headers == kept


# --- models -------------------------------------------------------------------------------------

LISTING = {
    "object": "list",
    "data": [
        {"id": "org/name", "object": "model", "root": "/root/.cache/models/org--name", "max_model_len": 1024},
        {"id": "adapter", "object": "model", "root": "/lora", "parent": "org/name"},
    ],
}
SHOWN = [
    {"id": "org/name", "object": "model", "root": "org/name", "max_model_len": 1024},
    {"id": "adapter", "object": "model", "root": "adapter", "parent": "org/name"},
]


async def test_models_name_no_folder_of_the_machine() -> None:
    """`root` is the name that clients use."""
    status, headers, body = await ask(
        openai(call_app(ScriptedApp({"GET /v1/models": answer(LISTING)}))), Request("GET", "/v1/models")
    )
    assert (status, json.loads(body)) == (200, {"object": "list", "data": SHOWN})
    assert dict(headers) == {"content-type": "application/json", "content-length": str(len(body))}


@pytest.mark.parametrize(("path", "index"), [("org/name", 0), ("org/name/", 0), ("adapter", 1)])
async def test_one_model_is_answered(path: str, index: int) -> None:
    """Its id may hold slashes."""
    call = openai(call_app(ScriptedApp({"GET /v1/models": answer(LISTING)})))
    status, _, body = await ask(call, Request("GET", f"/v1/models/{path}"))
    assert (status, json.loads(body)) == (200, SHOWN[index])


@pytest.mark.parametrize("model_id", ["org", "name", "ORG/NAME", "org/name/x", "org//name"])
async def test_an_unknown_model_is_404(model_id: str) -> None:
    """Only the whole id counts."""
    with pytest.raises(NoSuchModel) as refused:
        await ask(
            openai(call_app(ScriptedApp({"GET /v1/models": answer(LISTING)}))),
            Request("GET", f"/v1/models/{model_id}"),
        )
    assert refused.value.body() == fault(
        f"The model `{model_id}` does not exist.", param="model", code="model_not_found"
    )


# --- errors -------------------------------------------------------------------------------------


def vllm(message: str, status: int, kind: str = "BadRequestError", param: str | None = None) -> str:
    """vLLM's `ErrorResponse`."""
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}})


NO_MODEL = "The model `x` does not exist. Valid aliases: tiny."
TOO_LONG = "This model's maximum context length is 1024 tokens."
REWRITTEN = [
    # path, status, what vLLM says, what the client gets
    (
        "/v1/chat/completions",
        404,
        vllm(NO_MODEL, 404, "NotFoundError", "model"),
        fault(NO_MODEL, param="model", code="model_not_found"),
    ),
    (
        "/v1/chat/completions",
        400,
        vllm(TOO_LONG, 400, param="input_tokens"),
        fault(TOO_LONG, param="messages", code="context_length_exceeded"),
    ),
    (
        "/v1/chat/completions",
        400,
        vllm(TOO_LONG, 400, param="input_text"),
        fault(TOO_LONG, param="messages", code="context_length_exceeded"),
    ),
    (
        "/v1/completions",
        400,
        vllm(TOO_LONG, 400, param="input_text"),
        fault(TOO_LONG, param="prompt", code="context_length_exceeded"),
    ),
    (
        "/v1/embeddings",
        400,
        vllm(TOO_LONG, 400, param="input_tokens"),
        fault(TOO_LONG, param="input", code="context_length_exceeded"),
    ),
    (
        "/v1/chat/completions",
        400,
        vllm("temperature must be in [0, 2].", 400, param="temperature"),
        fault("temperature must be in [0, 2].", param="temperature", code="invalid_request"),
    ),
    (
        "/v1/chat/completions",
        400,
        vllm("1 validation error: ...", 400, "Bad Request", "body.messages"),
        fault("1 validation error: ...", param="messages", code="invalid_request"),
    ),
    (
        "/v1/chat/completions",
        400,
        vllm("no", 400, "Bad Request", "body.messages.0.ChatCompletionUserMessageParam.content"),
        fault("no", param="messages[0].content", code="invalid_request"),
    ),
    (
        "/v1/chat/completions",
        400,
        vllm("no", 400, "Bad Request", "body.response_format.type"),
        fault("no", param="response_format.type", code="invalid_request"),
    ),
    (
        "/v1/chat/completions",
        400,
        vllm("JSON decode error", 400, "Bad Request", "body.1"),
        fault("JSON decode error", code="invalid_request"),
    ),
    (
        "/v1/chat/completions",
        400,
        vllm("not an object", 400, "Bad Request", "body"),
        fault("not an object", code="invalid_request"),
    ),
    (
        "/v1/chat/completions",
        400,
        '{"detail": "There was an error parsing the body"}',
        fault("There was an error parsing the body", code="invalid_request"),
    ),
    (
        "/v1/chat/completions",
        422,
        '{"detail": [{"loc": ["body"], "msg": "no"}]}',
        fault('[{"loc": ["body"], "msg": "no"}]', code="unprocessable_entity"),
    ),
    (
        "/v1/embeddings",
        404,
        vllm("Not Found", 404, "Not Found"),
        fault("Unknown request URL: POST /v1/embeddings. Check the URL for typos.", code="unknown_url"),
    ),
    (
        "/v1/embeddings",
        404,
        '{"detail": "Not Found"}',
        fault("Unknown request URL: POST /v1/embeddings. Check the URL for typos.", code="unknown_url"),
    ),
    ("/v1/responses", 404, vllm("gone", 404, "NotFoundError"), fault("gone", code="not_found")),
    (
        "/v1/messages",
        404,
        '{"detail": "Not Found"}',
        fault("Unknown request URL: POST /v1/messages. Check the URL for typos.", code="unknown_url"),
    ),
    ("/v1/models", 401, '{"error": "Unauthorized"}', fault("Unauthorized", code="invalid_api_key")),
    (
        "/v1/messages",
        404,
        '{"type": "error", "error": {"type": "NotFoundError", "message": "no such"}}',
        fault("no such", param="model", code="model_not_found"),
    ),
    ("/v1/completions", 409, vllm("busy", 409, "Conflict"), fault("busy", code="conflict")),
    ("/v1/completions", 418, vllm("tea", 418), fault("tea", code="invalid_request")),
    (
        "/v1/completions",
        429,
        vllm("slow down", 429),
        fault("slow down", "rate_limit_error", code="rate_limit_exceeded"),
    ),
    (
        "/v1/completions",
        500,
        vllm("oops", 500, "InternalServerError"),
        fault("oops", "server_error", code="internal_error"),
    ),
    (
        "/v1/completions",
        500,
        "Internal Server Error",
        fault("Internal Server Error", "server_error", code="internal_error"),
    ),
    (
        "/v1/completions",
        501,
        vllm("later", 501, "NotImplementedError"),
        fault("later", "server_error", code="not_implemented"),
    ),
    (
        "/v1/completions",
        503,
        vllm("queue full", 503, "Service Unavailable"),
        fault("queue full", "server_error", code="overloaded"),
    ),
    ("/v1/completions", 504, vllm("slow", 504), fault("slow", "server_error", code="server_error")),
    (
        "/v1/completions",
        500,
        "",
        fault("The request failed with status 500.", "server_error", code="internal_error"),
    ),
    (
        "/v1/completions",
        400,
        "{}",
        fault("The request failed with status 400.", code="invalid_request"),
    ),
    (
        "/v1/completions",
        400,
        '{"object": "error", "message": "old shape", "code": 400}',
        fault("old shape", code="invalid_request"),
    ),
    (
        "/v1/completions",
        400,
        '{"error": {"message": "half \\ud800", "param": 7}}',
        fault("half \ud800", code="invalid_request"),
    ),
]


@pytest.mark.parametrize(("path", "status", "said", "expected"), REWRITTEN)
async def test_errors_get_openais_shape(path: str, status: int, said: str, expected: dict[str, Any]) -> None:
    """The status stays, the message stays, `code` becomes a string, and `param` names a field."""
    method = ROUTES[path]
    app = ScriptedApp({f"{method} {path}": Script((Say(said),), status, (("x-internal", "1"),))})
    request = Request(method, path, (("content-type", "application/json"),), b"{}")
    got_status, headers, body = await ask(openai(call_app(app)), request)
    assert (got_status, json.loads(body)) == (status, expected)
    extra = {"retry-after": "5"} if status == 503 else {}
    assert dict(headers) == {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **extra,
    }


@pytest.mark.parametrize(
    ("status", "given", "kept"),
    [
        (503, (("retry-after", "7"), ("x-internal", "1")), {"retry-after": "7"}),
        (405, (("allow", "GET"),), {"allow": "GET"}),
        (400, (("content-encoding", "gzip"),), {}),
    ],
)
async def test_headers_that_tell_what_to_do_are_kept(
    status: int, given: Headers, kept: dict[str, str]
) -> None:
    """Of an error's headers only these say something about the new body."""
    app = ScriptedApp({CHAT: Script((Say("{}"),), status, given)})
    _, headers, body = await ask(openai(call_app(app)))
    assert dict(headers) == {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **kept,
    }


async def test_a_body_that_is_no_object_is_told_in_words() -> None:
    """As the gateway tells it while it has no worker; vLLM's text is the parser's own structure."""
    said = vllm("1 validation error:\n  {'type': 'json_invalid', 'loc': 'body.1'}", 400, "Bad Request")
    request = Request("POST", "/v1/chat/completions", (("content-type", "application/json"),), b"[1")
    app = ScriptedApp({CHAT: Script((Say(said),), 400)})
    _, _, body = await ask(openai(call_app(app)), request)
    assert json.loads(body) == fault(
        "We could not parse the JSON body of your request: Expecting ',' delimiter (character 2).",
        code="invalid_request",
    )


async def test_of_a_large_body_it_is_told_too_what_is_wrong() -> None:
    """vLLM has read all of it, of which until then only what matters here was known."""
    told = answer({"error": {"message": "{'type': 'json_invalid', 'loc': 'body.16'}", "code": 400}}, 400)
    body = b'{"messages": [{"x": nonsense, "content": "%b"}]}' % (b"a" * LARGE_BYTES)
    asked = look(Request("POST", "/v1/chat/completions", (("content-type", "application/json"),), body))
    assert asked.members is not None
    status, _, raw = await ask(openai(call_app(ScriptedApp({CHAT: told}))), asked)
    why = "We could not parse the JSON body of your request: Expecting value (character 20)."
    assert (status, json.loads(raw)) == (400, fault(why, code="invalid_request"))


async def test_a_body_is_judged_only_when_it_was_refused() -> None:
    """vLLM has the say: what it takes is not parsed a second time."""
    app = ScriptedApp({CHAT: answer({"id": "a"})})
    request = Request("POST", "/v1/chat/completions", (("content-type", "application/json"),), b"[1")
    assert (await ask(openai(call_app(app)), request))[0] == 200


async def test_an_answer_passes_untouched() -> None:
    """What is no error, no stream and no list of models has vLLM's own headers and bytes."""
    script = Script((Say('{"a":'), Say(" 1}")), 200, (("content-type", "application/json"), ("x-vllm", "1")))
    _, headers, body = await ask(openai(call_app(ScriptedApp({CHAT: script}))))
    assert (headers, body) == (script.headers, b'{"a": 1}')


async def test_a_dead_engine_is_named() -> None:
    """A 5xx of an engine that has died says so; a client's own fault does not."""
    app = ScriptedApp({CHAT: [answer({}, 500), answer({"error": {"message": "no"}}, 400)]})
    call = openai(call_app(app), engine_is_dead=lambda: True)
    with pytest.raises(EngineDead):
        await ask(call)
    assert (await ask(call))[0] == 400


# --- streams ------------------------------------------------------------------------------------

FAILED = vllm("EngineCore encountered an issue.", 500, "InternalServerError")
FAILED_BODY = fault("EngineCore encountered an issue.", "server_error", code="internal_error")
REFUSED = vllm("token_id(s) [9] are out of vocabulary", 400, param="logprob_token_ids")
REFUSED_BODY = fault(
    "token_id(s) [9] are out of vocabulary", param="logprob_token_ids", code="invalid_request"
)


async def streamed(*steps: str | Pause | Say, dead: bool = False) -> tuple[int, Headers, list[Any], bytes]:
    """Status, headers, the data of each frame, and the bytes of a stream with `steps`."""
    app = ScriptedApp({CHAT: stream(*steps)})
    for step in steps:
        if isinstance(step, Pause):
            app.gate(step.name).opened.set()
    status, headers, body = await ask(openai(call_app(app), engine_is_dead=lambda: dead))
    return status, headers, [sse.data(frame) for frame in sse.split(body)], body


async def test_a_stream_passes_untouched_with_headers_against_buffering() -> None:
    """Every frame as vLLM made it, `[DONE]` last, and no cache or proxy keeps them."""
    _, headers, _, body = await streamed("1", Pause("a"), '{"text": "x"}')
    assert body == b'data: 1\n\ndata: {"text": "x"}\n\ndata: [DONE]\n\n'
    assert headers == (
        ("content-type", "text/event-stream; charset=utf-8"),
        ("cache-control", "no-cache"),
        ("x-accel-buffering", "no"),
    )


async def test_an_application_can_not_weaken_the_headers() -> None:
    """A length would be wrong as soon as a comment is added, and two cache headers are one too many."""
    given = (*EVENT_STREAM, ("content-length", "5"), ("cache-control", "public"), ("x-vllm", "1"))
    _, headers, _ = await ask(
        openai(call_app(ScriptedApp({CHAT: Script((Say("data: 1\n\n"),), 200, given)})))
    )
    assert headers == (
        *EVENT_STREAM,
        ("x-vllm", "1"),
        ("cache-control", "no-cache"),
        ("x-accel-buffering", "no"),
    )


@pytest.mark.parametrize(
    ("said", "status", "expected"),
    [
        (REFUSED, 400, REFUSED_BODY),
        (FAILED, 500, FAILED_BODY),
        (
            '{"error": {"message": "m", "code": "text"}}',
            500,
            fault("m", "server_error", code="internal_error"),
        ),
        ('{"error": {"message": "m", "code": 200}}', 500, fault("m", "server_error", code="internal_error")),
        ('{"error": "m"}', 500, fault("m", "server_error", code="internal_error")),
    ],
)
async def test_an_error_in_the_first_frame_becomes_the_status(
    said: str, status: int, expected: dict[str, Any]
) -> None:
    """Nothing has been sent yet, so the client gets what it would have got without `stream`."""
    got, headers, _, body = await streamed(said)
    assert (got, json.loads(body)) == (status, expected)
    assert dict(headers)["content-type"] == "application/json"


async def test_a_comment_before_the_first_frame_changes_nothing() -> None:
    """As long as it was not sent either."""
    status, _, _, body = await streamed(Say(sse.KEEP_ALIVE.decode()), REFUSED)
    assert (status, json.loads(body)) == (400, REFUSED_BODY)


@pytest.mark.parametrize(
    "steps",
    [
        ("1", Pause("a"), FAILED, "2"),
        ("1", FAILED, "2"),
        (Say("data: 1\n\ndata: " + FAILED + "\n\ndata: 2\n\n"),),
    ],
    ids=["apart", "at once", "in one piece"],
)
async def test_an_error_in_mid_stream_is_the_last_frame(steps: tuple[str | Pause | Say, ...]) -> None:
    """However the frames travel: what came before stays, and neither `[DONE]` nor more text follows."""
    status, _, data, _ = await streamed(*steps)
    assert (status, data) == (200, [1, FAILED_BODY])


async def test_an_error_in_mid_stream_keeps_its_kind() -> None:
    """A fault of the request is no fault of the server, though the status can't tell any more."""
    assert (await streamed("1", REFUSED))[2] == [1, REFUSED_BODY]


@pytest.mark.parametrize("begun", [False, True])
async def test_the_death_of_the_engine_is_named_in_a_stream_too(begun: bool) -> None:
    """As a status, or as the last frame."""
    status, _, data, body = await streamed(*(["1"] if begun else []), FAILED, dead=True)
    if begun:
        assert (status, data) == (200, [1, EngineDead().body()])
    else:
        assert (status, json.loads(body)) == (500, EngineDead().body())


async def test_text_that_looks_like_an_error_is_text() -> None:
    """A model may write anything into a string, also what a broken parser takes for a frame."""
    text = 'data: {"error": {"message": "no"}}\n\ndata: {"error"'
    chunk = json.dumps({"choices": [{"delta": {"content": text}}]})
    _, _, data, _ = await streamed(chunk, Pause("a"), chunk)
    assert data == [json.loads(chunk), json.loads(chunk), None]


async def test_an_error_event_with_a_name_is_found() -> None:
    """A frame may have other lines before its data."""
    named = Say(f"event: error\ndata: {FAILED}\n\n")
    assert (await streamed("1", named))[2] == [1, FAILED_BODY]


async def test_an_empty_stream_is_an_empty_stream() -> None:
    """Nothing is made up."""
    app = ScriptedApp({CHAT: Script((), 200, EVENT_STREAM)})
    assert (await ask(openai(call_app(app))))[::2] == (200, b"")


async def test_a_failure_before_the_first_frame_is_an_error() -> None:
    """The status had been 200, but nobody has seen it."""

    async def frames(chunks: tuple[bytes, ...] = ()) -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk
        raise UpstreamFailed("gone")

    @asynccontextmanager
    async def failing(_: Request) -> AsyncIterator[Reply]:
        yield Reply(200, EVENT_STREAM, frames())

    with pytest.raises(UpstreamFailed):
        await ask(openai(failing))


async def test_leaving_behind_the_edge_stops_the_application() -> None:
    """While it waits for the first frame, and in mid-stream."""
    app = ScriptedApp({CHAT: [stream(Pause("first")), stream("1", Pause("second"))]})
    edged = serve(openai(call_app(app)), max_body_bytes=100)
    for gate in ("first", "second"):
        async with exchange(edged) as client:
            await app.gate(gate).reached.wait()
            client.leave()
            await client.over()
    assert [seen.ended for seen in app.seen] == ["disconnected", "disconnected"]


# --- front: request ids -------------------------------------------------------------------------


def fronted(call: Call, *origins: str) -> Call:
    """`call` behind `front`, with a request id that is known."""
    return front(call, cors_origins=origins, request_id=lambda: "req_made")


def refusing(error: Exception) -> Call:
    """The call that raises `error`."""

    class Refusal(AbstractAsyncContextManager[Reply]):
        async def __aenter__(self) -> Reply:
            raise error

        async def __aexit__(self, *_: object) -> None:
            """Nothing was opened."""

    return lambda _: Refusal()


def headed(*headers: tuple[str, str], method: str = "POST") -> Request:
    """A request with `headers`."""
    return Request(method, "/v1/chat/completions", headers)


@pytest.mark.parametrize("given", ["a", "req-1_2.3:/=+~!", "x" * 128])
async def test_a_good_request_id_is_echoed(given: str) -> None:
    """Printable ASCII of at most 128 characters, and the layers below see the same."""
    app = ScriptedApp({CHAT: answer({})})
    _, headers, _ = await ask(fronted(call_app(app)), headed(("x-request-id", given)))
    assert dict(headers)["x-request-id"] == given
    assert app.seen[0].headers == (("x-request-id", given),)


@pytest.mark.parametrize("given", ["", " ", "a b", "x" * 129, "\u00e9", "a\tb", "a\x7f", "a\nb"])
async def test_a_bad_request_id_is_replaced(given: str) -> None:
    """It is not cut, which might make two the same."""
    app = ScriptedApp({CHAT: answer({})})
    _, headers, _ = await ask(fronted(call_app(app)), headed(("x-request-id", given)))
    assert dict(headers)["x-request-id"] == "req_made"
    assert app.seen[0].headers == (("x-request-id", "req_made"),)


async def test_there_is_one_request_id() -> None:
    """Of several that came the first counts, and that of a layer below gives way."""
    app = ScriptedApp({CHAT: answer({}, 200, (("x-request-id", "theirs"),))})
    _, headers, _ = await ask(fronted(call_app(app)), headed(("x-request-id", "a"), ("x-request-id", "b")))
    assert [value for name, value in headers if name == "x-request-id"] == ["a"]
    assert app.seen[0].headers == (("x-request-id", "a"),)


async def test_made_request_ids_differ() -> None:
    """Each answer can be found in the log."""
    call = front(refusing(Forbidden("no")))
    ids = {dict((await ask(call))[1])["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(len(rid) == 36 and rid.startswith("req_") for rid in ids)


async def test_a_request_id_never_reaches_the_engine() -> None:
    """vLLM would make it its own id, of any length, and repeat it in every chunk."""
    app = ScriptedApp({CHAT: answer({})})
    await ask(fronted(openai(call_app(app))), headed(("x-request-id", "mine")))
    assert app.seen[0].headers == ()


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(Forbidden("no"), 403, "forbidden"), (RuntimeError("secret path"), 500, "internal_error")],
)
async def test_errors_are_answered_with_a_request_id(error: Exception, status: int, code: str) -> None:
    """Also what nobody expected, of which the client hears no detail."""
    got, headers, body = await ask(fronted(refusing(error)))
    assert (got, dict(headers)["x-request-id"], json.loads(body)["error"]["code"]) == (
        status,
        "req_made",
        code,
    )
    assert b"secret" not in body


async def test_an_error_in_mid_stream_passes_through_front() -> None:
    """Its frame is made by whoever sends the stream."""
    app = ScriptedApp({CHAT: Script((Say("data: 1\n\n"), Fail()), 200, EVENT_STREAM)})
    async with fronted(call_app(app))(REQUEST) as reply:
        assert await anext(reply.frames) == b"data: 1\n\n"
        with pytest.raises(RequestError):
            await anext(reply.frames)


# --- front: CORS --------------------------------------------------------------------------------

PAGE = "https://page.example"


def cors(headers: Headers) -> dict[str, str]:
    """What a browser looks at."""
    return {name: value for name, value in headers if name.startswith("access-control") or name == "vary"}


SIMPLE = {"access-control-expose-headers": "x-request-id, retry-after", "vary": "origin"}


@pytest.mark.parametrize(
    ("origins", "allow"),
    [
        ((PAGE,), PAGE),
        (("https://other.example", PAGE), PAGE),
        (("*",), "*"),
    ],
)
@pytest.mark.parametrize(
    "call", [lambda: call_app(ScriptedApp({CHAT: answer({})})), lambda: refusing(Forbidden("no"))]
)
async def test_an_allowed_page_may_read_answers_and_errors(
    call: Callable[[], Call], origins: tuple[str, ...], allow: str
) -> None:
    """Without the headers on a 401 a browser would only show that the fetch failed."""
    _, headers, _ = await ask(fronted(call(), *origins), headed(("origin", PAGE)))
    assert cors(headers) == {"access-control-allow-origin": allow, **SIMPLE}


@pytest.mark.parametrize(
    ("origins", "headers"),
    [
        ((), (("origin", PAGE),)),
        (("https://other.example",), (("origin", PAGE),)),
        ((PAGE,), (("origin", PAGE + ".evil.example"),)),
        ((PAGE,), (("origin", "null"),)),
        ((PAGE,), (("origin", "http://page.example"),)),
        ((PAGE,), ()),
        (("*",), ()),
    ],
)
async def test_nobody_else_may(origins: tuple[str, ...], headers: Headers) -> None:
    """Off unless set, exact where set, and silent where no browser asks."""
    app = ScriptedApp({CHAT: answer({})})
    status, got, _ = await ask(fronted(call_app(app), *origins), headed(*headers))
    assert (status, cors(got)) == (200, {})


async def test_a_preflight_is_answered_without_the_call() -> None:
    """It carries no key, so it must not be asked for one."""
    request = headed(
        ("origin", PAGE),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization,content-type,x-stainless-lang"),
        method="OPTIONS",
    )
    status, headers, body = await ask(fronted(refusing(Forbidden("no")), PAGE), request)
    assert (status, body) == (204, b"")
    assert cors(headers) == {
        "access-control-allow-origin": PAGE,
        "access-control-allow-methods": "GET, POST, DELETE, OPTIONS",
        "access-control-allow-headers": "authorization,content-type,x-stainless-lang",
        "access-control-max-age": "600",
        **SIMPLE,
    }
    assert dict(headers)["x-request-id"] == "req_made"


@pytest.mark.parametrize(
    "headers",
    [
        (("origin", "https://other.example"), ("access-control-request-method", "POST")),
        (("access-control-request-method", "POST"),),
        (("origin", PAGE),),
    ],
    ids=["another page", "no page", "no preflight"],
)
async def test_other_options_requests_are_405(headers: Headers) -> None:
    """Only a preflight of an allowed page is answered; vLLM has no OPTIONS."""
    request = headed(*headers, method="OPTIONS")
    status, _, _ = await ask(fronted(openai(call_app(ScriptedApp({}))), PAGE), request)
    assert status == 405


async def test_a_layer_below_can_not_open_cors() -> None:
    """vLLM's own headers, should they be switched on, don't stand beside ours."""
    theirs = (("access-control-allow-origin", "https://evil.example"),)
    app = ScriptedApp({CHAT: answer({}, 200, theirs)})
    _, headers, _ = await ask(fronted(call_app(app), PAGE), headed(("origin", PAGE)))
    allowed_origins = [value for name, value in headers if name == "access-control-allow-origin"]
    assert allowed_origins == [PAGE]


def test_the_error_frame_is_vllms() -> None:
    """`create_streaming_error_response` writes it with json.dumps, so with a space after the colon."""
    assert f"data: {FAILED}\n\n".encode().startswith(sse.ERROR_FRAME)
