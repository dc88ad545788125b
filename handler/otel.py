"""Spans of a request, as OpenTelemetry's conventions for HTTP and for generative AI want them.

A trace follows its request in `Visit.trace`: who lets it wait and who asks a worker tell it so. From
process to process it goes on in the header `traceparent` (https://www.w3.org/TR/trace-context/). No
span holds a word of a prompt or of an answer.

Spans are kept in a bounded queue and exported by a thread; the oldest are dropped when it is full.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    Link,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    get_tracer,
    set_span_in_context,
    set_tracer_provider,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from handler import logs, sse
from handler.errors import RequestError
from handler.messages import Call, Headers, Reply, Request, without

CLOSE_S = 2.0
"""How long the last spans may take on their way out; a collector that is dead costs no more."""
COMPLAINTS_S = 60.0
"""How often it is said at most that spans can't be sent."""
STARTS_KEPT = 16
ANSWER_MAX_BYTES = 1 << 20
"""Of an answer that is longer it is not told what it has cost."""

_HEADERS = ("traceparent", "tracestate")
_W3C = TraceContextTextMapPropagator()
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_ASKED = {
    "model": "gen_ai.request.model",
    "stream": "gen_ai.request.stream",
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "max_output_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "seed": "gen_ai.request.seed",
    "n": "gen_ai.request.choice.count",
}
"""What of a request's body is told: how it asks, never what."""
_TELLING = (b'"usage"', b'"finish_reason":"')

Route = Callable[[Request], tuple[str, str] | None]
"""The pattern of a request's path, and for whose workers it waits; None for what has no trace."""


@dataclass(frozen=True, slots=True)
class _Start:
    of: str
    report: Mapping[str, Any]
    began_s: float
    ended_s: float
    whole: list[Span]
    """The span that has its phases below it, once there is one."""


class Traces:
    """Makes the spans of this process. `close` sends what is left.

    `asks`: it asks others, so each attempt has a span; else it is the one that is asked.
    """

    def __init__(self, tracer: Tracer, close: Callable[[], None] = lambda: None, *, asks: bool) -> None:
        self.tracer = tracer
        self.close = close
        self.asks = asks
        self._starts: deque[_Start] = deque(maxlen=STARTS_KEPT)

    @classmethod
    def open(cls, url: str, service: str) -> Self:
        """Traces that are posted to `url`. To be called once in a process: vLLM's spans join them."""
        # The SDK reads the rest of the environment itself: headers, sampler, resource, the queue's size.
        logs.to_stderr("opentelemetry", "WARNING")
        for handler in logging.getLogger("opentelemetry").handlers:
            handler.addFilter(_Rarely())
        provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        set_tracer_provider(provider)

        def close() -> None:
            # Waits for a dead collector as long as the exporter does; not so we.
            closing = threading.Thread(target=provider.shutdown, name="traces-close", daemon=True)
            closing.start()
            closing.join(CLOSE_S)

        return cls(provider.get_tracer("firsttoken"), close, asks=True)

    @classmethod
    def here(cls) -> Self:
        """A worker's, once the process has opened them."""
        return cls(get_tracer("firsttoken"), asks=False)

    def started(self, report: Mapping[str, Any], *, of: str = "") -> None:
        """A worker of `of` is ready from now on; `report` is what it says of its cold start."""
        now_s = time.monotonic()
        self._starts.append(_Start(of, report, now_s - float(report.get("total_s") or 0.0), now_s, []))

    def follow(self, call: Call, route: Route) -> Call:
        """`call`, each of whose requests with a `route` has a trace: its client's, or a new one."""

        @asynccontextmanager
        async def followed(request: Request) -> AsyncIterator[Reply]:
            if (found := route(request)) is None:
                async with call(request) as reply:
                    yield reply
                return
            with self._served(request, *found) as trace:
                visit = replace(request.visit, trace=trace)
                inner = replace(request, headers=_handed(request.headers, trace.span), visit=visit)
                async with call(inner) as reply:
                    trace.answered(reply.status)
                    yield replace(reply, frames=trace.watched(reply.frames)) if reply.streams else reply

        return followed

    @contextmanager
    def _served(self, request: Request, pattern: str, of: str) -> Iterator[Trace]:
        span = self.tracer.start_span(
            f"{request.method} {pattern}",
            context=_W3C.extract(dict(request.headers)),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": request.method,
                "http.route": pattern,
                "url.path": request.path,
                "url.scheme": "http",
            },
            start_time=_epoch_ns(request.visit.arrived_s),
        )
        with _ended(span):
            yield Trace(self, span, of)

    def waited(self, parent: Span, since_s: float, of: str) -> None:
        """Who waited for `of` since `since_s` does no more: a span, with the starts meanwhile below it."""
        context = set_span_in_context(parent)
        span = self.tracer.start_span("wait", context=context, start_time=_epoch_ns(since_s))
        for start in self._starts:
            if start.of == of and start.ended_s >= since_s and span.is_recording():
                self._tell(start, span)
        span.end()

    def _tell(self, start: _Start, wait: Span) -> None:
        """Whoever waited for a start first has its phases; the others have a link there."""
        first = next(iter(start.whole), None)
        span = self.tracer.start_span(
            "cold start",
            context=set_span_in_context(wait),
            start_time=_epoch_ns(start.began_s),
            links=[Link(first.get_span_context())] if first else None,
        )
        if first is None:
            start.whole.append(span)
            self._tell_phases(start, span)
        span.end(_epoch_ns(start.ended_s))

    def _tell_phases(self, start: _Start, whole: Span) -> None:
        outer: list[tuple[float, Span]] = []  # those that hold the next one, with their ends
        for phase in start.report.get("phases", ()):
            while outer and outer[-1][0] < phase["end_s"]:
                outer.pop()
            span = self.tracer.start_span(
                phase["name"],
                context=set_span_in_context(outer[-1][1] if outer else whole),
                start_time=_epoch_ns(start.began_s + phase["begin_s"]),
                attributes={
                    "firsttoken.cpu_s": phase.get("cpu_s", 0.0),
                    "firsttoken.major_faults": phase.get("major_faults", 0),
                },
            )
            span.end(_epoch_ns(start.began_s + phase["end_s"]))
            outer.append((phase["end_s"], span))


class Trace:
    """What one request's trace is told here (`handler.messages.Trace`)."""

    def __init__(self, traces: Traces, span: Span, of: str) -> None:
        self._traces = traces
        self._of = of
        self.span = span

    def answered(self, status: int) -> None:
        """The answer has begun."""
        self.span.set_attribute("http.response.status_code", status)
        if status >= 500:
            _fail(self.span, str(status))

    def waited(self, since_s: float) -> None:
        """It has waited since `since_s`, a time of `time.monotonic`, and does no more."""
        self._traces.waited(self.span, since_s, self._of)

    def attempted(self, call: Call) -> Call:
        """`call`, each time it is asked a span: the attempt to have a model answer, as its client."""
        if not self._traces.asks:
            return call

        @asynccontextmanager
        async def tried(request: Request) -> AsyncIterator[Reply]:
            attempt = _Attempt(self._traces.tracer, self.span, request)
            with _ended(attempt.span):
                try:
                    handed = replace(request, headers=_handed(request.headers, attempt.span))
                    async with call(handed) as reply:
                        attempt.answered(reply)
                        yield replace(reply, frames=attempt.read(reply))
                finally:
                    attempt.end()

        return tried

    async def watched(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The frames of a stream; an error among them is the request's."""
        async for chunk in chunks:
            if sse.ERROR_FRAME in chunk:
                _fail(self.span, "stream_error")
            yield chunk


class _Attempt:
    """One request to a worker, from its head to its last frame."""

    def __init__(self, tracer: Tracer, parent: Span, request: Request) -> None:
        operation = _OPERATIONS.get(request.path, request.path.removeprefix("/v1/"))
        asked = _asked(request) if parent.is_recording() else {}
        model = asked.get("gen_ai.request.model")
        self._tracer = tracer
        self.span = tracer.start_span(
            f"{operation} {model}" if model else operation,
            context=set_span_in_context(parent),
            kind=SpanKind.CLIENT,
            attributes={"gen_ai.operation.name": operation, "gen_ai.provider.name": "vllm", **asked},
        )
        self._began_s = time.monotonic()
        self._step = self._begin("first token")
        self._first = False
        self._told: list[bytes] = []
        self._told_bytes = 0

    def _begin(self, name: str) -> Span:
        return self._tracer.start_span(name, context=set_span_in_context(self.span))

    def answered(self, reply: Reply) -> None:
        """The worker has begun to answer."""
        self.span.set_attribute("http.response.status_code", reply.status)
        if reply.status >= 500:
            _fail(self.span, str(reply.status))

    async def read(self, reply: Reply) -> AsyncIterator[bytes]:
        """The frames of `reply`, read along."""
        streams = reply.streams
        async for chunk in reply.frames:
            if not self._first and chunk != sse.KEEP_ALIVE:
                self._first = True
                self._step.end()
                since_s = time.monotonic() - self._began_s
                self.span.set_attribute("gen_ai.response.time_to_first_chunk", since_s)
                self._step = self._begin("rest of the stream" if streams else "rest of the answer")
            if not streams or any(word in chunk for word in _TELLING):
                self._keep(chunk)
            yield chunk

    def _keep(self, chunk: bytes) -> None:
        self._told_bytes += len(chunk)
        if self._told_bytes <= ANSWER_MAX_BYTES:
            self._told.append(chunk)

    def end(self) -> None:
        """No more is read."""
        self._step.end()
        if self.span.is_recording() and self._told_bytes <= ANSWER_MAX_BYTES:
            self.span.set_attributes(_answered(b"".join(self._told)))


def _handed(headers: Headers, span: Span) -> Headers:
    """`headers` for whoever goes on with the trace below `span`."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, set_span_in_context(span))
    return (*without(headers, _HEADERS), *carrier.items())


@contextmanager
def _ended(span: Span) -> Iterator[None]:
    """`span` ends with the block, and says how that failed."""
    try:
        yield
    except RequestError as error:
        _fail(span, error.code or type(error).__name__, str(error))
        raise
    except (asyncio.CancelledError, GeneratorExit):
        span.set_attribute("error.type", "left")  # by its client: nobody's fault
        raise
    except BaseException as error:
        _fail(span, type(error).__qualname__)
        raise
    finally:
        span.end()


def _fail(span: Span, kind: str, message: str | None = None) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, message))


def _asked(request: Request) -> dict[str, str | int | float | bool]:
    """How a request asks."""
    body: Any
    try:
        body = json.loads(request.body) if request.members is None else request.members.values
    except (ValueError, RecursionError):
        return {}
    if not isinstance(body, Mapping):
        return {}
    found = {name: body.get(field) for field, name in _ASKED.items() if body.get(field) is not None}
    return {name: value for name, value in found.items() if isinstance(value, (str, int, float, bool))}


def _answered(told: bytes) -> dict[str, Any]:
    """What an answer says of itself, whole or in frames."""
    found: dict[str, Any] = {}
    framed = told.startswith((b"data:", b"event:", b":"))
    for value in map(sse.data, sse.split(told)) if framed else [_json(told)]:
        if not isinstance(value, dict):
            continue
        for place in (value, value.get("response"), value.get("message")):
            if isinstance(place, dict):
                found |= _said(place)
    return found


def _said(place: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for field, name in (("id", "gen_ai.response.id"), ("model", "gen_ai.response.model")):
        if isinstance(value := place.get(field), str):
            yield name, value
    usage = place.get("usage")
    for fields, name in (
        (("prompt_tokens", "input_tokens"), "gen_ai.usage.input_tokens"),
        (("completion_tokens", "output_tokens"), "gen_ai.usage.output_tokens"),
    ):
        for field in fields:
            if isinstance(usage, dict) and isinstance(count := usage.get(field), int):
                yield name, count
    choices = place.get("choices")
    reasons = [
        choice["finish_reason"]
        for choice in (choices if isinstance(choices, list) else ())
        if isinstance(choice, dict) and isinstance(choice.get("finish_reason"), str)
    ]
    if reasons:
        yield "gen_ai.response.finish_reasons", reasons


def _json(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _epoch_ns(at_s: float) -> int:
    """When it was `at_s` of `time.monotonic`, as OpenTelemetry counts."""
    return time.time_ns() - int((time.monotonic() - at_s) * 1e9)


class _Rarely(logging.Filter):
    """A line now and then: a dead collector gives a reason for several with each batch."""

    def __init__(self) -> None:
        super().__init__()
        self._next_s = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        now_s = time.monotonic()
        # Not that a process has one provider: vLLM sets one of its own, which is not taken.
        if now_s < self._next_s or "Overriding of current TracerProvider" in record.getMessage():
            return False
        self._next_s = now_s + COMPLAINTS_S
        return True
