"""vLLM's own spans as phases, through OpenTelemetry and not by patching.

vLLM marks the steps of its start (loading, KV cache, warm-up, compile, graph capture) with
OpenTelemetry spans and drops them unless somebody provides a tracer. Here we do, for as long
as the start takes. A forked engine core inherits the tracer, and tells its steps through a pipe.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from typing import TYPE_CHECKING

from handler.phases import Phases
from handler.phases import Span as Phase

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, Span, TracerProvider

NAMES = {
    "Executor init": "executor",
    "Worker init": "worker",
    "Init device": "device",
    "Loading (CPU)": "weights",
    "Loading (GPU)": "weights",
    "Prepare model": "kv cache and warm-up",
    "Allocate KV cache": "kv cache",
    "Warmup (CPU)": "warm-up",
    "Warmup (GPU)": "warm-up",
    "Capture model": "cuda graphs",
    "Compile graph": "compile",
    "Inductor compilation": "inductor",
    "Download weights - HF": "download",
}
"""vLLM's names of the steps that a reader wants to see, and ours."""


PIPE_BYTES = 64 * 1024
"""What a pipe holds on Linux: hundreds of spans, and a start has a dozen in each process."""


def listen(phases: Phases) -> Callable[[], None]:
    """Have vLLM's spans become phases, until what is returned is called: the start is over.

    Does nothing without OpenTelemetry. Not to be called where vLLM is to set a provider of its own, for
    a process has one: that of `handler.otel`, where there is one, is listened to.
    """
    try:
        from opentelemetry.sdk.trace import SpanProcessor  # noqa: PLC0415 - comes with vLLM, if that is there
    except ImportError:
        return lambda: None

    here = os.getpid()
    heard, told = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    class Listener(SpanProcessor):
        def __init__(self) -> None:
            self._ends: dict[int, Callable[[], Phase]] = {}

        def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002
            context = span.get_span_context()
            if phases.total_s is None and span.name in NAMES and context is not None:
                self._ends[context.span_id] = phases.begin(NAMES[span.name])

        def on_end(self, span: ReadableSpan) -> None:
            context = span.get_span_context()
            if context is None or (end := self._ends.pop(context.span_id, None)) is None:
                return
            phase = end()
            if os.getpid() != here:
                with suppress(OSError):  # who should hear it has gone on
                    os.write(told, json.dumps(astuple(phase)).encode() + b"\n")

    _provider().add_span_processor(Listener())

    def end() -> None:
        with suppress(BlockingIOError):
            for line in os.read(heard, PIPE_BYTES).splitlines():
                phases.spans.append(Phase(*json.loads(line)))
        os.close(heard)
        os.close(told)

    return end


def _provider() -> TracerProvider:
    """That of this process, from now on if it had none."""
    from opentelemetry import trace  # noqa: PLC0415 - as above
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415

    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())
    found = trace.get_tracer_provider()
    assert isinstance(found, TracerProvider), "it was set"
    return found
