"""A worker on a port while its model loads: what is said, what waits, and how the engine takes over."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from handler import sse
from handler.errors import EngineFailed, NoResources
from handler.listener import listen
from handler.platforms import http
from handler.platforms.lobby import Lobby
from handler.settings import Settings
from judge.servers import free_port
from tests.raw_http import ask, head, read_head
from tests.scripted_app import Pause, ScriptedApp, answer, stream
from tests.scripted_server import HOST, StartingWorker, starting

CHAT = "POST /v1/chat/completions"
JSON = {"content-type": "application/json"}
MODEL = {"SERVED_MODEL_NAME": "mine"}
PATIENCE_S = 60.0
"""What a test waits for something that takes milliseconds, before it fails."""

Answer = tuple[int, dict[str, str], bytes]


async def chat(served: Any, body: Mapping[str, Any] | None = None) -> Answer:
    """The answer to a chat request of `mine`."""
    raw = json.dumps({"model": "mine", "messages": [], **(body or {})}).encode()
    return await asyncio.wait_for(ask(served, "POST", "/v1/chat/completions", JSON, raw), PATIENCE_S)


def code(body: bytes) -> str | None:
    """The code of an error."""
    found: str | None = json.loads(body)["error"]["code"]
    return found


class At:
    """What listens on a port."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to it."""
        return await asyncio.open_connection(HOST, self.port)


# --- while it starts ----------------------------------------------------------------------------


async def probed(served: Any) -> list[tuple[int, bytes]]:
    """What the probes say: `/ping`, `/health`, `/ready`."""
    answers = [await ask(served, "GET", path) for path in ("/ping", "/health", "/ready")]
    return [(status, body) for status, _, body in answers]


STARTING = [(204, b""), (503, b'{"status":"starting"}'), (503, b'{"status":"starting"}')]
READY = [(200, b'{"status":"ready"}')] * 3
DEAD = [(503, b'{"status":"dead"}')] * 3
DRAINING = [(503, b'{"status":"draining"}')] * 3
FAILED = [(503, b'{"status":"failed"}')] * 3


async def test_the_probes_tell_a_start_from_a_fault() -> None:
    """RunPod's load balancer takes 204 for a start; whoever asks for readiness hears no."""
    async with starting(ScriptedApp({}), {"API_KEY": "secret"}) as worker:
        assert await probed(worker) == STARTING
        worker.become_ready()
        while (said := await probed(worker)) != READY:
            assert {status for status, _ in said} <= {204, 503, 200}
        assert worker.engine is not None
        worker.engine.dead.set_result(None)
        assert await probed(worker) == DEAD


async def test_another_port_has_the_probes_and_nothing_else() -> None:
    """From the first moment to the last, whatever the engine's loop does."""
    port = free_port()
    app = ScriptedApp({CHAT: stream("1", Pause("decode"))})
    async with starting(app, {"PORT_HEALTH": str(port), "DRAIN_TIMEOUT_S": "60", **MODEL}) as worker:
        health = At(port)
        assert await probed(health) == STARTING
        asking = asyncio.create_task(chat(worker))
        await worker.held(1)
        worker.become_ready()
        await app.gate("decode").reached.wait()
        assert await probed(health) == READY
        for method, path in (("GET", "/metrics"), ("GET", "/v1/models"), ("POST", "/ping"), ("GET", "/")):
            status, headers, body = await ask(health, method, path)
            assert (status, code(body)) == (404, "unknown_url"), path
            assert headers["x-request-id"].startswith("req_")
        assert worker.server is not None
        worker.server.stop()  # what runs is finished, and until then this port says that no more is taken
        while (said := await probed(health)) != DRAINING:
            assert said == READY
        app.gate("decode").opened.set()
        await asking
    with pytest.raises(ConnectionRefusedError):
        await health.connect()


async def test_the_same_port_twice_is_one_port() -> None:
    """Which is what RunPod sets by default."""
    port = str(free_port())
    async with starting(ScriptedApp({}), {"PORT": port, "PORT_HEALTH": port}) as worker:
        assert await probed(worker) == STARTING


@pytest.mark.parametrize("setting", ["PORT", "PORT_HEALTH"])
def test_a_port_that_is_taken_is_named_before_anything_loads(setting: str) -> None:
    """With the setting that would change it."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        environ = {"PORT": "0", setting: str(port)}
        with pytest.raises(NoResources, match=f"port {port} of .* choose another with {setting}$"):
            http.open(Settings.from_environ(environ))


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "expected"),
    [
        ("POST", "/v1/chat/completions", {}, b"", (401, "invalid_api_key")),
        ("GET", "/metrics", {}, b"", (401, "invalid_api_key")),
        ("POST", "/invocations", {"authorization": "Bearer secret"}, b"", (404, "unknown_url")),
        ("GET", "/v1/completions", {"authorization": "Bearer secret"}, b"", (405, "method_not_allowed")),
        (
            "POST",
            "/v1/chat/completions",
            {"authorization": "Bearer secret", **JSON},
            b"{",
            (400, "invalid_request"),
        ),
        (
            "POST",
            "/v1/chat/completions",
            {"authorization": "Bearer secret", **JSON},
            b'{"model": "other"}',
            (404, "model_not_found"),
        ),
        (
            "POST",
            "/v1/chat/completions",
            {"authorization": "Bearer secret", **JSON},
            b" " * 2000,
            (413, "request_too_large"),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
async def test_what_is_known_already_is_said_at_once(
    method: str, path: str, headers: dict[str, str], body: bytes, expected: tuple[int, str]
) -> None:
    """Nobody waits for a refusal, and nothing that is refused takes a place."""
    environ = {"API_KEY": "secret", "MAX_BODY_BYTES": "1KiB", **MODEL}
    async with starting(ScriptedApp({}), environ) as worker:
        status, got, said = await ask(worker, method, path, headers, body)
        assert (status, code(said)) == expected
        assert got["connection"] == "close"
        assert got["x-request-id"].startswith("req_")
        assert worker.lobby.waiting == 0


async def test_where_adapters_may_have_names_every_model_waits() -> None:
    """Also where a flag of vLLM among many says so."""
    app = ScriptedApp({CHAT: answer({"id": "a"})})
    async with starting(app, {"VLLM_EXTRA_ARGS": "--enable-lora", **MODEL}) as worker:
        asking = asyncio.create_task(chat(worker, {"model": "other"}))
        await worker.held(1)
        worker.become_ready()
        assert (await asking)[0] == 200


async def test_metrics_are_there_from_the_start() -> None:
    """Those of the process."""
    async with starting(ScriptedApp({})) as worker:
        status, _, body = await ask(worker, "GET", "/metrics")
    assert status == 200
    assert b"process_resident_memory_bytes" in body


# --- who waits ----------------------------------------------------------------------------------


async def test_what_came_early_is_answered_by_the_engine() -> None:
    """Plain or streamed; it says for how long the worker started, and that the connection is over."""
    app = ScriptedApp({CHAT: [answer({"id": "a"}), stream("1", "2")]})
    async with starting(app, MODEL) as worker:
        plain = asyncio.create_task(chat(worker))
        await worker.held(1)
        streamed = asyncio.create_task(chat(worker, {"stream": True}))
        await worker.held(2)
        assert app.seen == []
        worker.become_ready()
        answers = [await plain, await streamed]
    assert [status for status, _, _ in answers] == [200, 200]
    assert [body for _, _, body in answers] == [b'{"id": "a"}', b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"]
    for _, headers, _ in answers:
        assert (headers["x-cold-start"], headers["connection"]) == ("4.250", "close")
    app.finish()


async def test_a_token_is_sent_as_it_is_made() -> None:
    """Also to who waited."""
    app = ScriptedApp({CHAT: stream("1", Pause("decode"), "2")})
    async with starting(app, MODEL) as worker, stream_asked(worker) as reader:
        await worker.held(1)
        worker.become_ready()
        assert (await read_head(reader))[0] == 200
        assert await reader.readuntil(b"data: 1\n\n")
        app.gate("decode").opened.set()
        assert (await reader.read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@asynccontextmanager
async def stream_asked(served: Any) -> AsyncIterator[asyncio.StreamReader]:
    """A connection on which a stream was asked for."""
    reader, writer = await served.connect()
    body = json.dumps({"model": "mine", "messages": [], "stream": True}).encode()
    writer.write(head("POST", "/v1/chat/completions", {**JSON, "content-length": str(len(body))}) + body)
    try:
        yield reader
    finally:
        writer.close()


async def test_a_stream_that_waits_long_is_kept_alive() -> None:
    """It gets its status early and comments, then what the engine says."""
    app = ScriptedApp({CHAT: stream("1")})
    environ = {"KEEP_ALIVE_S": "0.01", **MODEL}
    async with starting(app, environ) as worker, stream_asked(worker) as reader:
        status, headers = await read_head(reader)
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        for _ in range(3):
            await reader.readuntil(sse.KEEP_ALIVE)
        worker.become_ready()
        await reader.readuntil(b"data: 1\n\n")
        assert b"data: [DONE]" in await reader.read()


async def test_a_client_that_leaves_waits_no_more() -> None:
    """The engine never hears of it."""
    app = ScriptedApp({})
    async with starting(app, MODEL) as worker:
        async with stream_asked(worker):
            await worker.held(1)
        await worker.held(0)
        worker.become_ready()
    assert app.seen == []


async def test_a_client_that_leaves_what_it_waited_for_stops_the_engine() -> None:
    """Across both loops."""
    app = ScriptedApp({CHAT: stream("1", Pause("never"))})
    async with starting(app, MODEL) as worker:
        async with stream_asked(worker) as reader:
            await worker.held(1)
            worker.become_ready()
            await reader.readuntil(b"data: 1\n\n")
        await asyncio.wait_for(app.seen[0].over.wait(), PATIENCE_S)
    assert app.seen[0].ended == "disconnected"


async def test_no_more_wait_than_may() -> None:
    """A full lobby is a 503 with a time to come back."""
    settings = Settings.from_environ(MODEL)
    with listen(HOST, 0) as listener:
        lobby = Lobby(settings, listener, held_max=1)
        lobby.open()
        served = At(listener.getsockname()[1])
        first = asyncio.create_task(chat(served))
        while lobby.waiting != 1:
            await ask(served, "GET", "/health")
        status, headers, body = await chat(served)
        assert (status, code(body)) == (503, "not_admitted")
        assert 1 <= int(headers["retry-after"]) <= 30
        first.cancel()
        await asyncio.to_thread(lobby.close, 0.0)


async def test_nobody_waits_too_long() -> None:
    """A start that takes too long is a 504."""
    with listen(HOST, 0) as listener:
        lobby = Lobby(Settings.from_environ(MODEL), listener, held_s=0.01)
        lobby.open()
        status, _, body = await chat(At(listener.getsockname()[1]))
        assert (status, code(body)) == (504, "deadline_exceeded")
        await asyncio.to_thread(lobby.close, 0.0)


async def test_no_more_bytes_wait_than_may() -> None:
    """Beside a model that loads there is no room for a thousand images."""
    settings = Settings.from_environ(MODEL)
    with listen(HOST, 0) as listener:
        lobby = Lobby(settings, listener, held_max_bytes=1000)
        lobby.open()
        served = At(listener.getsockname()[1])
        first = asyncio.create_task(chat(served, {"user": "x" * 900}))
        while lobby.waiting != 1:
            await ask(served, "GET", "/health")
        status, headers, body = await chat(served, {"user": "x" * 100})
        assert (status, code(body), "retry-after" in headers) == (503, "not_admitted", True)
        first.cancel()
        await asyncio.to_thread(lobby.close, 0.0)


# --- the engine takes over ----------------------------------------------------------------------


async def test_no_connection_is_lost_while_the_engine_takes_over() -> None:
    """Clients that connect all the time, before, while and after, are all answered, and rightly."""
    app = ScriptedApp({CHAT: answer({"id": "a"})}, repeat=True)
    async with starting(app, MODEL) as worker:
        enough = asyncio.Event()
        answers: list[Answer] = []
        by_engine = 0

        async def ask_again_and_again() -> None:
            nonlocal by_engine
            while not enough.is_set():
                answers.append(await one(worker))
                by_engine += "connection" not in answers[-1][1]
                if by_engine > 200:
                    enough.set()

        clients = [asyncio.create_task(ask_again_and_again()) for _ in range(50)]
        await worker.held(50)
        worker.become_ready()
        await asyncio.wait_for(asyncio.gather(*clients), PATIENCE_S)
    assert {(status, body) for status, _, body in answers} == {(200, b'{"id": "a"}')}
    assert sum("x-cold-start" in headers for _, headers, _ in answers) == 50
    assert len(app.seen) == len(answers)


async def one(served: Any) -> Answer:
    """An answer on a connection of its own that the client would use again."""
    reader, writer = await served.connect()
    body = b'{"model": "mine", "messages": []}'
    writer.write(head("POST", "/v1/chat/completions", {**JSON, "content-length": str(len(body))}) + body)
    status, headers = await read_head(reader)
    raw = await reader.readuntil(b"0\r\n\r\n")
    writer.close()
    return status, headers, raw.split(b"\r\n")[1]


async def test_who_has_connected_early_may_ask_late() -> None:
    """A client or a load balancer opens connections ahead of time; each of them is answered once."""
    app = ScriptedApp({CHAT: answer({"id": "a"})}, repeat=True)
    async with starting(app, MODEL) as worker:
        opened = [await worker.connect() for _ in range(20)]
        assert await probed(worker) == STARTING  # by now all of them are accepted
        worker.become_ready()
        while "connection" in (await one(worker))[1]:
            pass
        for reader, writer in opened:
            body = b'{"model": "mine", "messages": []}'
            writer.write(
                head("POST", "/v1/chat/completions", {**JSON, "content-length": str(len(body))}) + body
            )
            status, headers = await read_head(reader)
            assert (status, headers["connection"]) == (200, "close")
            assert "x-cold-start" not in headers  # it has not waited
            assert await reader.read()
            writer.close()


async def test_connections_that_never_ask_do_not_hold_the_end() -> None:
    """They are let go when the worker stops."""
    async with starting(ScriptedApp({}), {"DRAIN_TIMEOUT_S": "60"}) as worker:
        reader, writer = await worker.connect()
        assert await probed(worker) == STARTING
        worker.become_ready()
        assert worker.serving is not None
        assert worker.server is not None
        worker.server.stop()
        await asyncio.wait_for(asyncio.shield(worker.serving), PATIENCE_S)
        assert await reader.read() == b""
        writer.close()


@asynccontextmanager
async def streaming(app: ScriptedApp, worker: StartingWorker) -> AsyncIterator[asyncio.StreamReader]:
    """The client's side of a stream that came early and has begun, when the worker is told to stop."""
    async with stream_asked(worker) as reader:
        await worker.held(1)
        worker.become_ready()
        await reader.readuntil(b"data: 1\n\n")
        await app.gate("decode").reached.wait()
        assert worker.server is not None
        worker.server.stop()
        yield reader


async def test_a_drain_finishes_what_came_early() -> None:
    """As what came late."""
    app = ScriptedApp({CHAT: stream("1", Pause("decode"), "2")})
    environ = {"DRAIN_TIMEOUT_S": "60", **MODEL}
    async with starting(app, environ) as worker, streaming(app, worker) as reader:
        app.gate("decode").opened.set()
        assert (await reader.read()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_the_deadline_ends_what_came_early_with_an_error_frame() -> None:
    """And properly: the client sees a whole answer that failed."""
    app = ScriptedApp({CHAT: stream("1", Pause("decode"))})
    async with starting(app, MODEL) as worker, streaming(app, worker) as reader:
        rest = await reader.read()
    assert b'"code":"worker_stopping"' in rest
    assert rest.endswith(b"\n\n\r\n0\r\n\r\n")
    assert app.seen[0].ended == "disconnected"


# --- no engine comes ----------------------------------------------------------------------------

FAILURE = EngineFailed("the engine failed to start: no kernel\nfor this machine")


async def test_a_failed_start_is_told_to_who_waits_and_to_who_comes() -> None:
    """With the reason; also in a stream that was answered early, and whatever model is asked for."""
    environ = {"KEEP_ALIVE_S": "0.01", **MODEL}
    async with starting(ScriptedApp({}), environ) as worker, stream_asked(worker) as reader:
        plain = asyncio.create_task(chat(worker))
        await worker.held(2)
        await reader.readuntil(sse.KEEP_ALIVE)
        worker.platform.refuse(FAILURE)
        rest = await reader.read()
        answers = [await plain, await chat(worker), await chat(worker, {"model": "other"})]
        assert await probed(worker) == FAILED
        assert (await ask(worker, "POST", "/invocations"))[0] == 404
    message = "The worker could not start: the engine failed to start: no kernel for this machine."
    error = {"message": message, "type": "server_error", "param": None, "code": "worker_start_failed"}
    assert [(status, json.loads(body)) for status, _, body in answers] == [(503, {"error": error})] * 3
    assert {headers["retry-after"] for _, headers, _ in answers} == {"60"}
    assert sse.event({"error": error}) in rest


async def test_a_worker_that_is_stopped_while_it_starts_says_so() -> None:
    """And has said it by the time that it may end."""
    async with starting(ScriptedApp({}), MODEL) as worker:
        asking = asyncio.create_task(chat(worker))
        await worker.held(1)
        await asyncio.to_thread(partial(worker.platform.refuse, None))
        status, headers, body = await asking
    assert (status, code(body), headers["retry-after"]) == (503, "worker_stopping", "1")


def test_refusing_before_anything_was_opened_does_no_harm() -> None:
    """A signal may come at any moment."""
    platform = http.open(Settings.from_environ({"PORT": "0"}))
    platform.refuse(None)
    assert platform._listener is not None
    platform._listener.close()


# --- how many run at once -----------------------------------------------------------------------


async def test_no_more_run_at_once_than_may() -> None:
    """The others wait their turn, wherever they came in, and are counted all the same."""
    app = ScriptedApp({CHAT: [stream("1", Pause("decode")), answer(2), answer(3)]})
    async with starting(app, {"MAX_CONCURRENCY": "1", **MODEL}) as worker:
        first = asyncio.create_task(chat(worker))
        await worker.held(1)
        second = asyncio.create_task(chat(worker))
        await worker.held(2)
        worker.become_ready()
        await app.gate("decode").reached.wait()
        third = asyncio.create_task(chat(worker))
        assert worker.server is not None
        while worker.server._drain.in_flight != 3:
            await ask(worker, "GET", "/health")
        assert len(app.seen) == 1
        assert (await ask(worker, "POST", "/invocations"))[0] == 404  # what is no work waits for none
        app.gate("decode").opened.set()
        assert [(await asking)[0] for asking in (first, second, third)] == [200, 200, 200]
    app.finish()


async def test_a_stream_that_waits_for_its_turn_is_kept_alive() -> None:
    """It gets its status early and comments, then what the engine says."""
    app = ScriptedApp({CHAT: [stream("1", Pause("decode")), stream("2")]})
    async with starting(app, {"MAX_CONCURRENCY": "1", "KEEP_ALIVE_S": "0.01", **MODEL}) as worker:
        worker.become_ready()
        async with stream_asked(worker) as running:
            await running.readuntil(b"data: 1\n\n")
            async with stream_asked(worker) as waiting:
                assert (await read_head(waiting))[0] == 200
                for _ in range(3):
                    await waiting.readuntil(sse.KEEP_ALIVE)
                app.gate("decode").opened.set()
                await waiting.readuntil(b"data: 2\n\n")
                assert b"data: [DONE]" in await waiting.readuntil(b"0\r\n\r\n")
