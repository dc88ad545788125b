"""Spans as they are made, in memory: starts that were waited for, the worker's side, and no OpenTelemetry."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gateway.settings import GatewaySettings
from handler import traces
from handler.asgi import call_app
from handler.errors import BadSettings
from handler.messages import Request, read
from handler.otel import Traces
from tests.scripted_app import ScriptedApp, answer

CHAT = "POST /v1/chat/completions"
PHASES = [
    {"name": "engine", "begin_s": 0.2, "end_s": 0.8, "cpu_s": 0.1, "major_faults": 3},
    {"name": "weights", "begin_s": 0.3, "end_s": 0.5},
]


@pytest.fixture
def memory() -> Iterator[tuple[TracerProvider, InMemorySpanExporter]]:
    """A provider that keeps its spans."""
    provider, kept = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    yield provider, kept
    provider.shutdown()


def named(kept: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    """The spans called `name`, in the order in which they ended."""
    return [span for span in kept.get_finished_spans() if span.name == name]


def test_whoever_waited_first_has_the_phases(memory: tuple[TracerProvider, InMemorySpanExporter]) -> None:
    """The others have a link to them; another endpoint's start and one that was over are nobody's."""
    provider, kept = memory
    tracer = provider.get_tracer("t")
    made = Traces(tracer, asks=True)
    made.started({"total_s": 1.0, "phases": PHASES}, of="other")
    made.started({"total_s": 1.0, "phases": PHASES}, of="local")
    since_s = time.monotonic() - 5
    for parent in (tracer.start_span("first"), tracer.start_span("second")):
        made.waited(parent, since_s, "local")
    made.waited(tracer.start_span("third"), time.monotonic() + 5, "local")
    whole, linked = named(kept, "cold start")
    assert [link.context for link in linked.links] == [whole.context]
    assert not whole.links
    (engine,), (weights,) = named(kept, "engine"), named(kept, "weights")
    assert engine.parent == whole.context
    assert weights.parent == engine.context
    assert engine.attributes == {"firsttoken.cpu_s": 0.1, "firsttoken.major_faults": 3}
    assert whole.end_time
    assert whole.start_time
    assert (whole.end_time - whole.start_time) / 1e9 == pytest.approx(1.0, abs=1e-3)


async def test_a_worker_hands_its_span_to_the_engine(
    memory: tuple[TracerProvider, InMemorySpanExporter],
) -> None:
    """What vLLM gets as `traceparent` is the worker's own span; a worker makes no attempts."""
    provider, kept = memory
    scripted = ScriptedApp({CHAT: answer({})})
    made = Traces(provider.get_tracer("t"), asks=False)
    call = made.follow(call_app(scripted), lambda request: (request.path, ""))
    given = (("traceparent", f"00-{'a' * 32}-{'b' * 16}-01"), ("x-other", "1"))
    async with call(Request("POST", "/v1/chat/completions", given, b"{}")) as reply:
        await read(reply)
    (span,) = kept.get_finished_spans()
    assert span.name == CHAT
    assert span.context
    assert span.parent
    assert (span.context.trace_id, span.parent.span_id) == (int("a" * 32, 16), int("b" * 16, 16))
    handed = scripted.seen[0].header("traceparent")
    assert handed == f"00-{'a' * 32}-{span.context.span_id:016x}-01"
    assert scripted.seen[0].header("x-other") == "1"


def test_traces_want_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed, a start says what to install; unset, nothing is imported."""
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.delitem(sys.modules, "handler.otel", raising=False)
    assert traces.open(GatewaySettings.from_environ({})) is None
    wanted = GatewaySettings.from_environ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318/"})
    assert traces.url(wanted) == "http://collector:4318/v1/traces"
    with pytest.raises(BadSettings) as caught:
        traces.open(wanted)
    (fault,) = caught.value.faults
    assert fault.startswith("traces are to go to http://collector:4318/v1/traces, but ")
    assert fault.endswith(" is not installed: pip install 'firsttoken[otel]'")


def test_grpc_is_a_fault_that_says_what_is_there() -> None:
    """It is OpenTelemetry's other protocol."""
    with pytest.raises(BadSettings) as caught:
        GatewaySettings.from_environ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    assert caught.value.faults == (
        "OTEL_EXPORTER_OTLP_PROTOCOL='grpc' is not allowed; allowed: http/protobuf",
    )
