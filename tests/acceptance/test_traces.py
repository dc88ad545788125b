"""One trace from a client's request to its last token, as a collector receives it."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from tests import otlp
from tests.acceptance.test_gateway_process import CHAT, KEY, Program, chunk, gateway
from tests.otlp import Received
from tests.scripted_app import Crash, Pause, stream
from tests.scripted_worker import READY

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
GIVEN = {
    "traceparent": f"00-{TRACE}-{PARENT}-01",
    "authorization": f"Bearer {KEY}",
    "content-type": "application/json",
}
SERVER, CLIENT, INTERNAL = 2, 3, 1
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
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, **otlp.QUICK}
        async with gateway(tmp_path, *plays, environ={**environ, "START": "first_request"}) as program:
            await program.address()
            asking = asyncio.create_task(ask(program, body()))
            worker = await program.director.worker()
            await worker.saw("paused", "go")
            worker.open("go")
            status, said = await asking
            assert (status, said[-14:]) == (200, b"data: [DONE]\n\n")
            assert await program.end(signal.SIGTERM) == 0
    spans = receiver.wait(FRONT)
    assert {span.trace_id for span in spans} == {TRACE}
    wait = ["wait", ["cold start"]]
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
