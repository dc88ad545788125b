"""One trace from a client's request to its last token, as a collector receives it."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from tests import otlp
from tests.gateway_process import CHAT, Program, chunk, completion, gateway, started
from tests.otlp import Received
from tests.scripted_app import Crash, Pause, answer, stream
from tests.scripted_worker import READY
from tests.servers import KEY

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
GIVEN = {
    "traceparent": f"00-{TRACE}-{PARENT}-01",
    "authorization": f"Bearer {KEY}",
    "content-type": "application/json",
}
SERVER, CLIENT = 2, 3
FRONT = "POST /v2/{endpoint_id}/openai/v1/chat/completions"
SECRET = "what was asked"


def tree(spans: Sequence[Received], parent_id: str) -> list[object]:
    """The spans below `parent_id` in the order in which they began: a name, or a name and what is below."""
    found: list[object] = []
    for span in sorted(spans, key=lambda span: (span.begin_ns, -span.end_ns)):
        if span.parent_id == parent_id:
            below = tree(spans, span.span_id)
            found.append([span.name, below] if below else span.name)
    return found


def named(spans: Sequence[Received], name: str) -> Received:
    """The one span called `name`."""
    (span,) = [span for span in spans if span.name == name]
    return span


def body(*, streams: bool = True) -> bytes:
    """A chat request."""
    messages = [{"role": "user", "content": SECRET}]
    return json.dumps(
        {"model": "org/model", "messages": messages, "stream": streams, "max_tokens": 7, "stop": [SECRET]}
    ).encode()


async def ask(program: Program, asked: bytes) -> tuple[int, bytes]:
    """Status and body of a chat in the client's trace."""
    async with (
        aiohttp.ClientSession(headers=GIVEN) as http,
        http.post(f"{program.base_url}/chat/completions", data=asked) as reply,
    ):
        return reply.status, await reply.read()


@asynccontextmanager
async def traced(
    tmp_path: Path, receiver: otlp.Receiver, *plays: tuple[object, object], **environ: str
) -> AsyncIterator[Program]:
    """A gateway whose traces go to `receiver`; told to stop at the end, so that it sends the last ones."""
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, **otlp.QUICK, **environ}
    async with gateway(tmp_path, *plays, environ=given) as program:
        yield program
        assert await program.end(signal.SIGTERM) == 0


async def test_a_stream_is_one_trace_from_wait_to_last_token(tmp_path: Path) -> None:
    """The client's trace goes on: its wait with the start it waited for, the lost attempt, the answer."""
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    last = {
        "id": "c",
        "model": "m",
        "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
        "usage": usage,
    }
    plays = [
        (READY, {CHAT: stream(Pause("go"), Crash())}),
        (READY, {CHAT: stream(chunk("a"), chunk("b"), json.dumps(last))}),
    ]
    with otlp.receiving() as receiver:
        async with traced(tmp_path, receiver, *plays, START="first_request") as program:
            await program.address()
            asking = asyncio.create_task(ask(program, body()))
            worker = await program.director.worker()
            await worker.saw("paused", "go")
            worker.open("go")
            status, said = await asking
            assert (status, said[-14:]) == (200, b"data: [DONE]\n\n")
            spans = await asyncio.to_thread(receiver.wait, FRONT)  # the last to end
    assert {span.trace_id for span in spans} == {TRACE}
    wait = ["wait", [["cold start", ["import vllm", "open engine", "first token"]]]]  # those of COLD_START
    chat, steps = "chat org/model", ["first token", "rest of the stream"]
    assert tree(spans, PARENT) == [[FRONT, [wait, [chat, ["first token"]], wait, [chat, steps]]]]
    assert {span.service for span in spans} == {"firsttoken-gateway"}
    front = named(spans, FRONT)
    assert (front.kind, front.failed) == (SERVER, False)
    assert front.attributes == {
        "http.request.method": "POST",
        "http.route": FRONT.removeprefix("POST "),
        "url.path": "/v2/local/openai/v1/chat/completions",
        "url.scheme": "http",
        "http.response.status_code": 200,
    }
    first, second = sorted((s for s in spans if s.name == chat), key=lambda span: span.begin_ns)
    assert (first.kind, first.failed, first.attributes["error.type"]) == (CLIENT, True, "upstream_failed")
    assert not second.failed
    told = dict(second.attributes)
    assert told.pop("gen_ai.response.time_to_first_chunk") > 0
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "org/model",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 7,
        "http.response.status_code": 200,
        "gen_ai.response.id": "c",
        "gen_ai.response.model": "m",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 2,
    }
    assert SECRET.encode() not in b"".join(receiver.raw)


async def test_a_failure_is_told_and_a_whole_answer_too(tmp_path: Path) -> None:
    """A worker's 500 fails the attempt and the request; an answer in one piece says what it has cost."""
    usage = {"prompt_tokens": 4, "completion_tokens": 1}
    whole = answer({"id": "w", "model": "org/model", "choices": [], "usage": usage})
    plays = [(READY, {CHAT: [answer({"error": "boom"}, 500), whole]})]
    with otlp.receiving() as receiver:
        async with traced(tmp_path, receiver, *plays) as program:
            await started(program)
            assert (await ask(program, body(streams=False)))[0] == 500
            assert (await ask(program, body(streams=False)))[0] == 200
            spans = await asyncio.to_thread(receiver.wait, FRONT, FRONT)
    spans.sort(key=lambda span: span.begin_ns)
    fronts = [span for span in spans if span.name == FRONT]
    attempts = [span for span in spans if span.kind == CLIENT]
    for both in (fronts, attempts):
        told = [(span.failed, span.attributes.get("error.type")) for span in both]
        assert told == [(True, "500"), (False, None)]
    assert attempts[1].attributes["gen_ai.usage.input_tokens"] == 4
    assert attempts[1].attributes["gen_ai.request.stream"] is False


async def test_a_client_that_leaves_fails_nothing(tmp_path: Path) -> None:
    """Its trace ends there and says why."""
    with otlp.receiving() as receiver:
        async with traced(tmp_path, receiver, (READY, {CHAT: stream(chunk("a"), Pause("never"))})) as program:
            worker = await started(program)
            async with (
                aiohttp.ClientSession(headers=GIVEN) as http,
                http.post(f"{program.base_url}/chat/completions", data=body()) as reply,
            ):
                assert await reply.content.readuntil(b"\n\n")
            await worker.saw("disconnected", CHAT)
            spans = await asyncio.to_thread(receiver.wait, FRONT)
    assert (named(spans, FRONT).failed, named(spans, FRONT).attributes["error.type"]) == (False, "left")


async def test_who_is_not_to_be_traced_is_not(tmp_path: Path) -> None:
    """A client's decision counts, and goes on to the worker; probes and metrics have no trace."""
    with otlp.receiving() as receiver:
        async with traced(tmp_path, receiver, (READY, {CHAT: [completion("a"), completion("b")]})) as program:
            await started(program)
            unsampled = {**GIVEN, "traceparent": f"00-{TRACE}-{PARENT}-00"}
            async with aiohttp.ClientSession(headers=unsampled) as http:
                async with http.post(f"{program.base_url}/chat/completions", data=body()) as reply:
                    assert reply.status == 200
                async with http.get(program.base_url.partition("/v2/")[0] + "/health") as reply:
                    assert reply.status == 200
    assert receiver.spans == []


@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "refuses"])
async def test_a_dead_collector_costs_nobody_anything(tmp_path: Path, hangs: bool) -> None:
    """Requests are answered, the log has one line of it, and the gateway ends."""
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        if hangs:
            dead.listen()  # and nobody ever accepts
        script = [completion(str(number)) for number in range(20)]
        environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{dead.getsockname()[1]}",
            "OTEL_BSP_MAX_QUEUE_SIZE": "8",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "4",
        }
        async with gateway(tmp_path, (READY, {CHAT: script}), environ=environ) as program:
            await started(program)
            for _ in range(20):
                assert (await ask(program, body(streams=False)))[0] == 200
            assert await program.end(signal.SIGTERM) == 0
            said = await program.errors()
    assert len([line for line in said.splitlines() if " WARNING opentelemetry" in line]) == 1, said
