"""The real engine's spans in the trace of its request, and the start that it waited for."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import tempfile
from pathlib import Path

import httpx

from judge.servers import free_port
from tests import otlp, servers
from tests.otlp import Received
from tests.until import until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ASKED = "an unheard-of question"
FRONT, SERVED = "POST /v2/{endpoint_id}/openai/v1/chat/completions", "POST /v1/chat/completions"


def above(spans: list[Received], span: Received) -> list[str]:
    """The names of `span` and of those it is in, from the inside out."""
    by_id = {one.span_id: one for one in spans}
    names = [span.name]
    while parent := by_id.get(span.parent_id):
        span = parent
        names.append(span.name)
    return names


async def test_vllms_spans_join_the_trace_that_came_with_the_request(tiny_model: Path) -> None:
    """From the client over gateway and worker into vLLM, with the phases of the start that it waited for."""
    with otlp.receiving() as receiver, tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as folder:
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, **otlp.QUICK, "START": "first_request"}
        with servers.gateway(tiny_model, Path(folder), **environ) as (server, process):
            async with server.client() as client:
                stream = await client.chat.completions.create(
                    model=servers.MODEL,
                    messages=[{"role": "user", "content": ASKED}],
                    max_tokens=4,
                    stream=True,
                    extra_headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
                )
                assert [chunk async for chunk in stream]
            await asyncio.to_thread(receiver.wait, FRONT, SERVED, "llm_request")
            process.terminate()
            assert await asyncio.to_thread(process.wait, servers.STOP_TIMEOUT_S) == 0
    spans = [span for span in receiver.spans if span.trace_id == TRACE]
    named = {span.name: span for span in spans}
    chat = f"chat {servers.MODEL}"
    assert above(spans, named["llm_request"]) == ["llm_request", SERVED, chat, FRONT]
    assert named[FRONT].parent_id == PARENT
    services = {name: named[name].service for name in (FRONT, chat, SERVED, "llm_request")}
    assert services == {
        FRONT: "firsttoken-gateway",
        chat: "firsttoken-gateway",
        SERVED: "firsttoken-worker",
        "llm_request": "firsttoken-worker",
    }
    tokens = named[chat].attributes
    assert tokens["gen_ai.usage.output_tokens"] == 4
    assert named["llm_request"].attributes["gen_ai.usage.completion_tokens"] == 4
    # vLLM's own spans are still heard as phases of the start.
    assert above(spans, named["weights"])[-3:] == ["cold start", "wait", FRONT]
    assert ASKED.encode() not in b"".join(receiver.raw)


async def test_a_worker_on_a_port_tells_the_start_that_its_first_request_waited_for(tiny_model: Path) -> None:
    """Without a gateway the trace begins at the worker, whose lobby held the request."""
    with otlp.receiving() as receiver, tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as folder:
        port = free_port()
        own = {"PORT": str(port), "PLATFORM": "http", "VLLM_CACHE_ROOT": f"{folder}/cache"}
        environ = {**servers.engine_environ(tiny_model), **own, **otlp.QUICK}
        environ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] = f"{receiver.url}/v1/traces"
        with servers.program("handler", environ, Path(folder)) as (process, errors):
            until(lambda: listens(port, process))
            body = {"model": servers.MODEL, "messages": [{"role": "user", "content": ASKED}], "max_tokens": 2}
            async with httpx.AsyncClient(timeout=servers.START_TIMEOUT_S) as http:
                answer = await http.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body)
            assert answer.status_code == 200, errors.read_text()[-2000:]
            await asyncio.to_thread(receiver.wait, SERVED, "llm_request")
    (served,) = [span for span in receiver.spans if span.name == SERVED]
    spans = [span for span in receiver.spans if span.trace_id == served.trace_id]
    named = {span.name: span for span in spans}
    assert above(spans, named["llm_request"]) == ["llm_request", SERVED]
    assert above(spans, named["weights"])[-3:] == ["cold start", "wait", SERVED]
    assert {span.service for span in spans} == {"firsttoken-worker"}


def listens(port: int, process: subprocess.Popen[str]) -> bool:
    """Whether something accepts connections; fails if `process` has ended."""
    assert process.poll() is None
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
