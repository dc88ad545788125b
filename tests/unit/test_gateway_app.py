"""The gateway's routes, with a scripted application where the upstream would be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest

from gateway.accounts.keys import Key, Keys
from gateway.endpoints.admission import Admission
from handler import early, sse
from handler.asgi import App, Message, call_app
from handler.auth import digest
from handler.errors import UpstreamFailed
from handler.messages import Headers, Request, read
from tests import gateways
from tests.asgi_client import exchange, turns
from tests.pools import ScriptedPool
from tests.scripted_app import EVENT_STREAM, Fail, Pause, Say, Script, ScriptedApp, answer, stream

KEY: Headers = (("authorization", "Bearer secret"),)
BASE = "/v2/local/openai"
HEALTH = {
    "status": "ok",
    "endpoints": [{"id": "local", "waiting": 0, "in_flight": 0, "capacity": 8, "workers": {}}],
}


def gateway(
    scripted: ScriptedApp,
    *,
    open_metrics: bool = False,
    cors_origins: tuple[str, ...] = (),
    max_body_bytes: int = 100,
) -> App:
    """The application in front of `scripted`."""
    return gateways.one(
        call_app(scripted),
        Keys("secret"),
        open_metrics=open_metrics,
    ).app(max_body_bytes=max_body_bytes, cors_origins=cors_origins)


async def ask(
    app: App, method: str, path: str, headers: Headers = KEY, body: bytes = b""
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one answer."""
    async with call_app(app)(Request(method, path, headers, body)) as reply:
        return reply.status, dict(reply.headers), await read(reply)


def error(raw: bytes) -> tuple[str, str | None, str | None]:
    """Type, param and code of an error body, which has nothing else but a message."""
    fault = json.loads(raw)["error"]
    assert set(fault) == {"message", "type", "param", "code"}
    assert fault["message"]
    return fault["type"], fault["param"], fault["code"]


async def test_openai_request_reaches_the_endpoint_as_v1() -> None:
    """Method, query and body arrive as sent, the path from `/v1` on; status and body come back."""
    scripted = ScriptedApp({"POST /v1/chat/completions": answer({"id": "a"}, 200, (("x-worker", "1"),))})
    status, headers, body = await ask(
        gateway(scripted), "POST", f"{BASE}/v1/chat/completions", KEY, b'{"a":1}'
    )
    assert (status, headers["x-worker"], body) == (200, "1", b'{"id": "a"}')
    seen = scripted.seen[0]
    assert (seen.method, seen.path, seen.body) == ("POST", "/v1/chat/completions", b'{"a":1}')


async def test_who_comes_from_vllms_own_server_hears_where_an_endpoint_is() -> None:
    """There it is at `/v1`."""
    _, _, body = await ask(gateway(ScriptedApp({})), "POST", "/v1/chat/completions")
    assert json.loads(body)["error"]["message"] == (
        "Unknown request URL: POST /v1/chat/completions. "
        "The gateway has an endpoint at /v2/{endpoint_id}/openai/v1."
    )


async def test_model_ids_may_hold_slashes() -> None:
    """`/models/{id}` takes the rest of the path."""
    scripted = ScriptedApp({"GET /v1/models/org/name": answer({"id": "org/name"})})
    assert (await ask(gateway(scripted), "GET", f"{BASE}/v1/models/org/name"))[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "expected"),
    [
        ("GET", f"{BASE}/v1/models", (), 401, ("invalid_request_error", None, "invalid_api_key")),
        (
            "GET",
            f"{BASE}/v1/models",
            (("authorization", "Bearer no"),),
            401,
            ("invalid_request_error", None, "invalid_api_key"),
        ),
        (
            "GET",
            f"{BASE}/v1/models",
            (("authorization", "Basic secret"),),
            401,
            ("invalid_request_error", None, "invalid_api_key"),
        ),
        (
            "GET",
            f"{BASE}/v1/models",
            (("api-key", "secret"),),
            401,
            ("invalid_request_error", None, "invalid_api_key"),
        ),
        ("GET", "/v2", (), 401, ("invalid_request_error", None, "invalid_api_key")),
        ("GET", "/v2/other/openai/v1/models", (), 401, ("invalid_request_error", None, "invalid_api_key")),
        ("POST", f"{BASE}/invocations", (), 401, ("invalid_request_error", None, "invalid_api_key")),
        (
            "GET",
            "/v2/other/openai/v1/models",
            KEY,
            404,
            ("invalid_request_error", None, "endpoint_not_found"),
        ),
        ("GET", "/v2", KEY, 404, ("invalid_request_error", None, "endpoint_not_found")),
        ("POST", "/v2/local/run", KEY, 404, ("invalid_request_error", None, "unknown_url")),
        ("GET", "/v2/local/openai", KEY, 404, ("invalid_request_error", None, "unknown_url")),
        ("OPTIONS", "*", (), 404, ("invalid_request_error", None, "unknown_url")),
        ("POST", f"{BASE}/v1/nothing", KEY, 404, ("invalid_request_error", None, "unknown_url")),
        ("POST", f"{BASE}/invocations", KEY, 404, ("invalid_request_error", None, "unknown_url")),
        ("POST", f"{BASE}/v1/load_lora_adapter", KEY, 404, ("invalid_request_error", None, "unknown_url")),
        ("GET", f"{BASE}/metrics", KEY, 404, ("invalid_request_error", None, "unknown_url")),
        ("GET", "/", (), 404, ("invalid_request_error", None, "unknown_url")),
        ("GET", "/v1/models", KEY, 404, ("invalid_request_error", None, "unknown_url")),
        ("GET", "/docs", (), 404, ("invalid_request_error", None, "unknown_url")),
        (
            "GET",
            f"{BASE}/v1/chat/completions",
            KEY,
            405,
            ("invalid_request_error", None, "method_not_allowed"),
        ),
        ("HEAD", f"{BASE}/v1/models", KEY, 405, ("invalid_request_error", None, "method_not_allowed")),
        ("POST", "/health", (), 405, ("invalid_request_error", None, "method_not_allowed")),
    ],
)
async def test_refusals_have_openai_shape(
    method: str, path: str, headers: Headers, status: int, expected: tuple[str, str | None, str | None]
) -> None:
    """Who is refused gets status, type, param and code, and a request id; nothing gets through."""
    scripted = ScriptedApp({})
    got, answered, body = await ask(gateway(scripted), method, path, headers)
    assert (got, error(body)) == (status, expected)
    assert answered["x-request-id"]
    assert scripted.seen == []


async def test_key_is_checked_before_the_body_is_read() -> None:
    """A body of any size costs nothing without the key."""
    sent: list[Message] = []

    async def receive() -> Message:
        assert sent, "the body was read before the answer began"
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": f"{BASE}/v1/chat/completions",
        "headers": [(b"content-length", b"99")],
        "query_string": b"",
    }
    await gateway(ScriptedApp({}))(scope, receive, send)
    assert sent[0]["status"] == 401


async def test_body_over_the_cap_is_413() -> None:
    """`MAX_BODY_BYTES` holds for whoever has the key."""
    scripted = ScriptedApp({})
    status, _, body = await ask(gateway(scripted), "POST", f"{BASE}/v1/completions", KEY, b"x" * 101)
    assert (status, error(body)) == (413, ("invalid_request_error", None, "request_too_large"))


async def test_a_key_holds_no_more_than_its_share_of_what_is_not_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many connections it has: another one is a 429, until one of those has gone."""
    monkeypatch.setattr("gateway.app.HELD_MAX_BYTES", 200)
    chat = f"{BASE}/v1/chat/completions"
    app = gateway(ScriptedApp({"POST /v1/chat/completions": [answer({}), answer({})]}))
    async with (
        exchange(app, path=chat, headers=KEY, parts=None) as first,
        exchange(app, path=chat, headers=KEY, parts=None) as second,
    ):
        for one in (first, second):
            one.body(b" " * 100, more=True)
        await turns()
        assert (await ask(app, "POST", chat, body=b"{}"))[0] == 429
        first.leave()
        await first.over()
        assert (await ask(app, "POST", chat, body=b"{}"))[0] == 200
        second.body()
        await second.over()
        assert second.status == 200, "what it has, it may finish"


async def test_request_id_is_echoed_and_passed_on() -> None:
    """One id names the request for client, gateway and worker."""
    scripted = ScriptedApp({"GET /v1/models": answer({})})
    _, headers, _ = await ask(gateway(scripted), "GET", f"{BASE}/v1/models", (*KEY, ("x-request-id", "mine")))
    assert headers["x-request-id"] == "mine"
    assert scripted.seen[0].header("x-request-id") == "mine"


async def test_cors_is_on_answers_errors_and_preflights() -> None:
    """A browser may read every answer of an allowed origin, its 401 too, and preflight without a key."""
    app = gateway(ScriptedApp({}), cors_origins=("https://a.example",))
    origin = ("origin", "https://a.example")
    refused = await ask(app, "GET", f"{BASE}/v1/models", (origin,))
    assert (refused[0], refused[1]["access-control-allow-origin"]) == (401, "https://a.example")
    preflight = await ask(
        app, "OPTIONS", f"{BASE}/v1/chat/completions", (origin, ("access-control-request-method", "POST"))
    )
    assert (preflight[0], preflight[1]["access-control-allow-origin"]) == (204, "https://a.example")


async def test_failure_in_mid_stream_is_the_last_frame() -> None:
    """A stream that breaks ends with an error frame and without `[DONE]`."""
    scripted = ScriptedApp(
        {"POST /v1/completions": Script((Say("data: 1\n\n"), Say("data: 2\n\n"), Fail()), 200, EVENT_STREAM)}
    )
    status, _, body = await ask(gateway(scripted), "POST", f"{BASE}/v1/completions")
    *frames, last, end = body.decode().split("\n\n")
    assert (status, frames, end) == (200, ["data: 1", "data: 2"], "")
    assert error(last.removeprefix("data: ").encode()) == ("server_error", None, "internal_error")


async def test_stream_passes_through_byte_by_byte() -> None:
    """Frames arrive as they were made, `[DONE]` included."""
    scripted = ScriptedApp({"POST /v1/completions": stream("héllo 😀", "2")})
    _, _, body = await ask(gateway(scripted), "POST", f"{BASE}/v1/completions")
    assert body == "data: héllo 😀\n\ndata: 2\n\ndata: [DONE]\n\n".encode()


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ((), (200, {"status": "ok"})),
        ((("authorization", "Basic c2VjcmV0"),), (200, {"status": "ok"})),
        (KEY, (200, HEALTH)),
        ((("x-api-key", "own"),), (200, HEALTH)),
        ((("authorization", "Bearer other"),), (200, {"status": "ok", "endpoints": []})),
    ],
)
async def test_health_says_to_a_key_how_its_endpoints_are(
    headers: Headers, expected: tuple[int, Mapping[str, Any]]
) -> None:
    """Probes have no key, and hear that the gateway answers; what a proxy asks of them is no key of ours."""
    bound = {"own": frozenset({"local"}), "other": frozenset({"elsewhere"})}
    stored = [Key(f"key_{name}", name, digest(name), endpoints=to) for name, to in bound.items()]
    keys = Keys("secret", stored)
    app = gateways.one(call_app(ScriptedApp({})), keys).app(max_body_bytes=100, cors_origins=())
    status, _, body = await ask(app, "GET", "/health", headers)
    assert (status, json.loads(body)) == expected


async def test_health_refuses_a_key_that_opens_nothing() -> None:
    """Who has the wrong one hears of it."""
    wrong = (("authorization", "Bearer wrong"),)
    status, _, body = await ask(gateway(ScriptedApp({})), "GET", "/health", wrong)
    assert (status, error(body)[2]) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("open_metrics", "headers", "expected"),
    [
        (False, (), 401),
        (False, KEY, 200),
        (True, (), 200),
        (True, (("x-forwarded-for", "203.0.113.9"),), 401),
        (True, (("x-forwarded-proto", "https"),), 401),
        (True, (("host", "127.0.0.1:8000"),), 200),
        (True, (("host", "[::1]:8000"),), 200),
        (True, (("host", "localhost"),), 200),
        (True, (("host", "rebound.example:8000"),), 401),
        (True, (("host", "[::1"),), 401),
        (True, (("host", "rebound.example"), *KEY), 200),
    ],
)
async def test_metrics_want_the_key_unless_on_loopback(
    open_metrics: bool, headers: Headers, expected: int
) -> None:
    """A proxy on this machine does not open them to the world."""
    status, _, _ = await ask(gateway(ScriptedApp({}), open_metrics=open_metrics), "GET", "/metrics", headers)
    assert status == expected


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        ({}, 200),
        ({"endpoints": frozenset({"local"})}, 403),
        ({"models": frozenset({"m"})}, 403),
        ({"endpoints": frozenset({"local"}), "admin": True}, 200),
    ],
)
async def test_metrics_are_for_keys_that_are_not_bound(bound: Mapping[str, Any], expected: int) -> None:
    """They tell of all endpoints and models."""
    keys = Keys(stored=[Key("key_a", "a", digest("own"), **bound)])
    app = gateways.one(call_app(ScriptedApp({})), keys).app(max_body_bytes=100, cors_origins=())
    assert (await ask(app, "GET", "/metrics", (("authorization", "Bearer own"),)))[0] == expected


async def test_requests_are_counted_by_route_and_status() -> None:
    """Refusals are counted too, and what clients make up is one label."""
    app = gateway(ScriptedApp({"GET /v1/models": answer({}), "GET /v1/models/x": answer({}, 404)}))
    await ask(app, "GET", f"{BASE}/v1/models")
    await ask(app, "GET", f"{BASE}/v1/models/x")
    await ask(app, "GET", f"{BASE}/v1/models", ())
    await ask(app, "GET", "/made-up-by-a-scanner")
    _, _, text = await ask(app, "GET", "/metrics")
    lines = [
        line for line in text.decode().splitlines() if line.startswith("firsttoken_gateway_requests_total")
    ]
    assert sorted(lines) == [
        'firsttoken_gateway_requests_total{endpoint="",route="other",status="404"} 1.0',
        'firsttoken_gateway_requests_total{endpoint="local",route="/v1/models",status="200"} 1.0',
        'firsttoken_gateway_requests_total{endpoint="local",route="/v1/models",status="401"} 1.0',
        'firsttoken_gateway_requests_total{endpoint="local",route="/v1/models/{id}",status="404"} 1.0',
    ]


async def test_streams_are_timed_as_their_client_sees_them() -> None:
    """The first token is the first frame; a comment is none, and begins no gap between tokens."""
    chat = stream(Say(sse.KEEP_ALIVE.decode()), "{}", Say(sse.KEEP_ALIVE.decode()), Pause("next"), "{}")
    scripted = ScriptedApp({"POST /v1/chat/completions": chat})
    app = gateway(scripted)
    async with call_app(app)(Request("POST", f"{BASE}/v1/chat/completions", KEY)) as reply:
        async for _ in reply.frames:
            scripted.gate("next").opened.set()
    _, _, text = await ask(app, "GET", "/metrics")
    counted = [line for line in text.decode().splitlines() if "_count" in line and " 0.0" not in line]
    of = 'endpoint="local"'
    assert f"firsttoken_gateway_time_to_first_token_seconds_count{{{of}}} 1.0" in counted
    assert any(line.startswith("firsttoken_gateway_inter_token_latency_seconds_count") for line in counted)


async def test_upstream_failure_before_the_answer_is_a_502() -> None:
    """An upstream that raises is answered in OpenAI's shape."""

    async def broken(scope: Message, receive: object, send: object) -> None:
        raise UpstreamFailed("The worker went away before it answered.")

    app = gateways.one(call_app(broken), Keys("secret")).app(max_body_bytes=100, cors_origins=())
    status, _, body = await ask(app, "GET", f"{BASE}/v1/models")
    assert (status, error(body)) == (502, ("server_error", None, "upstream_failed"))


@pytest.mark.parametrize(
    ("path", "headers", "body", "expected"),
    [
        ("/v1/completions", (), b"{", (401, "invalid_api_key")),
        ("/v1/nothing", KEY, b"{", (404, "unknown_url")),
        ("/v1/completions", KEY, b"{", (400, "invalid_request")),
        ("/v1/completions", KEY, b'{"model": "other"}', (404, "model_not_found")),
        ("/v1/completions", KEY, b'{"model": "mine"}', (504, "deadline_exceeded")),
        ("/v1/tokenize", KEY, b'{"model": "other"}', (504, "deadline_exceeded")),
    ],
)
async def test_what_is_known_before_a_worker_is_checked_in_order(
    path: str, headers: Headers, body: bytes, expected: tuple[int, str]
) -> None:
    """Key, route, body, name of the model; the rest waits for the worker."""
    admission = Admission(
        ScriptedPool(ScriptedApp({})),
        limit=1,
        queue_timeout_s=0.001,
        keep_alive_s=0,
        check=partial(early.check, model="mine"),
    )
    app = gateways.one(admission.call, Keys("secret")).app(max_body_bytes=100, cors_origins=())
    sent = (*headers, ("content-type", "application/json"))
    status, answered, raw = await ask(app, "POST", f"{BASE}{path}", sent, body)
    assert (status, json.loads(raw)["error"]["code"]) == expected
    assert answered["x-request-id"]
