"""The worker's Prometheus metrics: every name in one place. vLLM's own stand beside them."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

from handler.messages import Reply, once
from handler.phases import Phases

__all__ = ["CONTENT_TYPE", "exposition", "register"]


def register(
    phases: Phases,
    *,
    running: Callable[[], float],
    in_flight: Callable[[], float],
    registry: CollectorRegistry = REGISTRY,
) -> None:
    """Add the worker's metrics to `registry`, once per process.

    `running` counts what the engine holds, `in_flight` what clients wait for or read.
    """
    total = Gauge(
        "firsttoken_cold_start_seconds", "From the start of the process to its first token", registry=registry
    )
    total.set(phases.total_s or 0.0)
    spans = Gauge(
        "firsttoken_cold_start_phase_seconds", "One phase of the cold start", ["phase"], registry=registry
    )
    for span in phases.spans:
        spans.labels(span.name).set(span.end_s - span.begin_s)
    held = Gauge(
        "firsttoken_engine_requests", "Requests that the engine holds, waiting and running", registry=registry
    )
    held.set_function(running)
    open_ = Gauge(
        "firsttoken_requests_in_flight", "Requests that are not answered to their end", registry=registry
    )
    open_.set_function(in_flight)


def exposition(registry: CollectorRegistry = REGISTRY) -> Reply:
    """The reply to `GET /metrics`."""
    return Reply(200, (("content-type", CONTENT_TYPE),), once(generate_latest(registry)))
