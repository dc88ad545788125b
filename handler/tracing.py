"""vLLM's own spans as phases, through OpenTelemetry and not by patching.

vLLM marks the steps of its start (loading, KV cache, warm-up, compile, graph capture) with
OpenTelemetry spans and drops them unless somebody provides a tracer. Here we do, for as long
as the start takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from handler.phases import Phases

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, Span

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


def listen(phases: Phases) -> bool:
    """Have vLLM's spans become phases. Returns whether OpenTelemetry is there to do it.

    Not to be called where the user sends traces somewhere: a process has one provider.
    """
    try:
        from opentelemetry import trace  # noqa: PLC0415 - comes with vLLM, which may not be there
        from opentelemetry.sdk.trace import SpanProcessor, TracerProvider  # noqa: PLC0415
    except ImportError:
        return False

    class Listener(SpanProcessor):
        def __init__(self) -> None:
            self._ends: dict[int, Callable[[], None]] = {}

        def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002
            context = span.get_span_context()
            if phases.total_s is None and span.name in NAMES and context is not None:
                self._ends[context.span_id] = phases.begin(NAMES[span.name])

        def on_end(self, span: ReadableSpan) -> None:
            context = span.get_span_context()
            if context is not None and (end := self._ends.pop(context.span_id, None)):
                end()

    provider = TracerProvider()
    provider.add_span_processor(Listener())
    trace.set_tracer_provider(provider)
    return True
