"""Where the traces of requests go, and whether there are any: off unless an address is set.

What makes spans is in `handler.otel`, which is imported only where traces are on. (`handler.tracing` is
about a start: it listens to vLLM's own spans.)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from handler.errors import BadSettings

if TYPE_CHECKING:
    from handler.otel import Traces


class Wanted(Protocol):
    """The settings that say so."""

    @property
    def otel_exporter_otlp_endpoint(self) -> str | None:
        """`OTEL_EXPORTER_OTLP_ENDPOINT`: of all signals."""
        ...

    @property
    def otel_exporter_otlp_traces_endpoint(self) -> str | None:
        """`OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`: of traces alone, and whole."""
        ...

    @property
    def otel_service_name(self) -> str:
        """`OTEL_SERVICE_NAME`: who speaks."""
        ...


def url(settings: Wanted) -> str | None:
    """Where spans are posted to; None if traces are off.

    Source: https://opentelemetry.io/docs/specs/otel/protocol/exporter/#endpoint-urls-for-otlphttp
    """
    if settings.otel_exporter_otlp_traces_endpoint:
        return settings.otel_exporter_otlp_traces_endpoint
    if settings.otel_exporter_otlp_endpoint:
        return settings.otel_exporter_otlp_endpoint.rstrip("/") + "/v1/traces"
    return None


def here(settings: Wanted) -> Traces | None:
    """Those that this process has opened, for `settings` that want some."""
    if url(settings) is None:
        return None
    found: Traces = import_module("handler.otel").Traces.here()
    return found


def open(settings: Wanted) -> Traces | None:  # noqa: A001 - as every part of a program has one
    """The traces that `settings` want, on their way from now on; None if they want none.

    Raises `BadSettings` where OpenTelemetry is wanted and not installed.
    """
    if (to := url(settings)) is None:
        return None
    try:
        opened: Traces = import_module("handler.otel").Traces.open(to, settings.otel_service_name)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(("opentelemetry", "requests")):
            raise
        raise BadSettings(
            [f"traces are to go to {to}, but OpenTelemetry is not installed: pip install 'firsttoken[otel]'"]
        ) from None
    return opened
