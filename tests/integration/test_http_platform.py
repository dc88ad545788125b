"""`handler.platforms.http` on real sockets: who gets in, what the probes say, how it ends."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path

import pytest

from handler import sse
from tests.raw_http import ask, head, read_head
from tests.scripted_app import EVENT_STREAM, Pause, Say, Script, ScriptedApp, answer, stream
from tests.scripted_server import ServedWorker, worker

CHAT = "POST /v1/chat/completions"
KEY = {"API_KEY": "secret-key"}
PATIENCE_S = 60.0
"""What a test waits for something that takes milliseconds, before it fails."""


# --- who gets in --------------------------------------------------------------------------------


async def test_without_a_key_only_the_probes_answer() -> None:
    """They say yes or no; everything else asks for the key, also what does not exist."""
    async with worker(ScriptedApp({}), KEY) as served:
        for path in ("/health", "/ready", "/ping"):
            status, _, body = await ask(served, "GET", path)
            assert (status, json.loads(body)) == (200, {"status": "ready"})
        for method, path in [
            ("GET", "/metrics"),
            ("GET", "/v1/models"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/invocations"),
            ("GET", "/health/"),
            ("GET", "//health"),
            ("GET", "/health/../metrics"),
            ("OPTIONS", "/v1/models"),
            ("GET", "/"),
        ]:
            status, headers, body = await ask(served, method, path)
            assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key"), path
            assert headers["www-authenticate"] == "Bearer"
            assert headers["x-request-id"].startswith("req_")


async def test_with_the_key_the_routes_answer() -> None:
    """And what is no route is a 404, not a 401."""
    app = ScriptedApp({"GET /v1/models": answer({"object": "list", "data": []})})
    key = {"authorization": "Bearer secret-key"}
    async with worker(app, KEY) as served:
        assert (await ask(served, "GET", "/v1/models", key))[0] == 200
        assert (await ask(served, "POST", "/invocations", key))[0] == 404
        status, headers, body = await ask(served, "GET", "/metrics", key)
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert b"firsttoken_engine_requests 0.0\n" in body


@pytest.mark.parametrize("environ", [{}, {**KEY, "AUTH": "off"}], ids=["no key", "AUTH=off"])
async def test_a_worker_may_be_open(environ: dict[str, str]) -> None:
    """On the loopback, or with something in front that asks for a key."""
    app = ScriptedApp({"GET /v1/models": answer({"object": "list", "data": []})})
    async with worker(app, environ) as served:
        assert (await ask(served, "GET", "/v1/models"))[0] == 200


async def test_a_unix_socket_needs_no_key_and_has_an_owner(tmp_path: Path) -> None:
    """Whoever may open the file may ask: it is this user alone."""
    app = ScriptedApp({"GET /v1/models": answer({"object": "list", "data": []})})
    path = tmp_path / "worker.sock"
    async with worker(app, {**KEY, "UDS": str(path)}) as served:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert (await ask(served, "GET", "/v1/models"))[0] == 200


@pytest.mark.parametrize(
    "target",
    [
        "/v1/../invocations",
        "/v1/%2e%2e/invocations",
        "/v1/..%2finvocations",
        "//invocations",
        "/v1%2finvocations",
    ],
)
async def test_no_spelling_of_a_path_gets_around_the_list(target: str) -> None:
    """Whatever the server makes of a target, vLLM is not asked."""
    app = ScriptedApp({})
    async with worker(app) as served:
        status, _, body = await ask(served, "POST", target)
    assert (status, json.loads(body)["error"]["code"]) == (404, "unknown_url")
    assert app.seen == []


async def test_a_dead_engine_is_not_ready() -> None:
    """The probe says so and a request is told so, until the process has gone."""
    app = ScriptedApp({CHAT: answer({"error": {"message": "m", "code": 500}}, 500)})
    async with worker(app) as served:
        served.engine.dead.set_result(None)
        status, _, body = await ask(served, "GET", "/ready")
        assert (status, json.loads(body)) == (503, {"status": "dead"})
        status, _, body = await ask(served, "POST", "/v1/chat/completions")
        assert (status, json.loads(body)["error"]["code"]) == (500, "engine_dead")


async def test_metrics_count_what_is_held() -> None:
    """By the engine, and by clients that wait or read."""
    app = ScriptedApp({CHAT: stream("1", Pause("decode"))})
    async with worker(app) as served:
        asking = asyncio.create_task(ask(served, "POST", "/v1/chat/completions"))
        await app.gate("decode").reached.wait()
        _, _, held = await ask(served, "GET", "/metrics")
        app.gate("decode").opened.set()
        await asking
        _, _, over = await ask(served, "GET", "/metrics")
    names = ("firsttoken_engine_requests", "firsttoken_requests_in_flight")
    assert [f"{name} 1.0\n".encode() in held for name in names] == [True, True]
    assert [f"{name} 0.0\n".encode() in over for name in names] == [True, True]


# --- how it ends --------------------------------------------------------------------------------


async def ended(served: ServedWorker) -> None:
    """Return once the server has ended, or fail."""
    await asyncio.wait_for(asyncio.shield(served.serving), PATIENCE_S)


async def test_a_drain_finishes_what_runs_and_refuses_what_comes() -> None:
    """A new connection is still heard, so that its client knows to ask elsewhere."""
    app = ScriptedApp({CHAT: stream("1", Pause("decode"), "2")})
    async with worker(app, {"DRAIN_TIMEOUT_S": "60"}) as served:
        asking = asyncio.create_task(ask(served, "POST", "/v1/chat/completions"))
        await app.gate("decode").reached.wait()
        served.server.stop()
        status, headers, body = await refused(served)
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(body)["error"]["code"] == "worker_stopping"
        app.gate("decode").opened.set()
        status, _, body = await asking
        assert (status, body) == (200, b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n")
        await ended(served)


async def refused(served: ServedWorker) -> tuple[int, dict[str, str], bytes]:
    """The first answer after the stop was seen; the application has a script for one call only."""
    return await ask(served, "POST", "/v1/chat/completions")


async def test_the_deadline_ends_a_stream_with_an_error_frame() -> None:
    """And its connection properly: the client sees a whole answer that failed."""
    app = ScriptedApp({CHAT: stream("1", Pause("never"))})
    async with worker(app) as served:
        asking = asyncio.create_task(ask(served, "POST", "/v1/chat/completions"))
        await app.gate("never").reached.wait()
        served.server.stop()
        status, _, body = await asking
        await ended(served)
    first, last = sse.split(body)
    assert (status, first) == (200, b"data: 1\n\n")
    assert sse.data(last)["error"]["code"] == "worker_stopping"


async def test_an_idle_connection_does_not_hold_the_end() -> None:
    """Clients keep connections for minutes."""
    app = ScriptedApp({})
    async with worker(app, {"DRAIN_TIMEOUT_S": "60"}) as served:
        reader, writer = await served.connect()
        writer.write(head("GET", "/health", {}))
        await read_head(reader)
        served.server.stop()
        await ended(served)
        writer.close()


async def test_a_connection_that_never_asked_does_not_hold_the_end() -> None:
    """A load balancer may open one ahead of time."""
    async with worker(ScriptedApp({}), {"DRAIN_TIMEOUT_S": "60"}) as served:
        _, writer = await served.connect()
        await ask(served, "GET", "/health")
        served.server.stop()
        await ended(served)
        writer.close()


async def test_half_a_body_does_not_hold_the_end_beyond_the_deadline() -> None:
    """A client that went silent while it sent is no request that could be finished."""
    async with worker(ScriptedApp({})) as served:
        _, writer = await served.connect()
        writer.write(head("POST", "/v1/chat/completions", {"content-length": "100"}) + b"half")
        await writer.drain()
        await ask(served, "GET", "/health")  # the server has read the above by now
        served.server.stop()
        await ended(served)
        writer.close()


async def test_a_client_that_reads_no_more_does_not_hold_the_end_beyond_the_deadline() -> None:
    """Its stream is full, so not even the error can be sent."""
    large = Say("data: " + "x" * 16_000_000 + "\n\n")
    app = ScriptedApp({CHAT: Script((large, Pause("never")), 200, EVENT_STREAM)})
    async with worker(app) as served:
        _, writer = await served.connect()
        writer.write(head("POST", "/v1/chat/completions", {"content-length": "0"}))
        while not app.seen:
            await ask(served, "GET", "/health")
        served.server.stop()
        await ended(served)
        writer.close()
    assert app.seen[0].ended == "disconnected"


async def test_a_second_signal_does_no_harm() -> None:
    """While it drains, and after all is over."""
    async with worker(ScriptedApp({})) as served:
        served.server.stop()
        served.server.stop()
        await ended(served)


def test_a_signal_after_the_loop_has_closed_does_no_harm() -> None:
    """The process is about to exit 0, and stays with that."""

    async def run() -> ServedWorker:
        async with worker(ScriptedApp({})) as served:
            return served

    asyncio.run(run()).server.stop()
