"""A receiver of traces, as a collector is: OTLP over HTTP, in protobuf."""

from __future__ import annotations

import gzip
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

QUICK = {"OTEL_BSP_SCHEDULE_DELAY": "50"}
"""So that a test need not wait 5 s for its spans."""


@dataclass(frozen=True, slots=True)
class Received:
    """One span. Ids are hex; `parent_id` is empty for a root."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    failed: bool
    attributes: Mapping[str, Any]
    begin_ns: int
    end_ns: int
    links: tuple[str, ...] = ()


@dataclass(slots=True)
class Receiver:
    """What was posted to `url` so far."""

    url: str = ""
    spans: list[Received] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    _news: threading.Condition = field(default_factory=threading.Condition)

    def wait(self, *names: str, timeout_s: float = 60) -> list[Received]:
        """All spans, once there are as many called so as are in `names`; fails if they do not come."""

        def missing() -> Counter[str]:
            return Counter(names) - Counter(span.name for span in self.spans)

        with self._news:
            assert self._news.wait_for(lambda: not missing(), timeout_s), f"{missing()} did not come"
            return list(self.spans)

    def take(self, raw: bytes) -> None:
        """Keep the spans of one export."""
        with self._news:
            self.raw.append(raw)
            self.spans += _spans(ExportTraceServiceRequest.FromString(raw))
            self._news.notify_all()


def _spans(request: ExportTraceServiceRequest) -> Iterator[Received]:
    for resource in request.resource_spans:
        of = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Received(
                    of["service.name"],
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.kind,
                    span.status.code == 2,
                    {pair.key: _value(pair.value) for pair in span.attributes},
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    tuple(link.span_id.hex() for link in span.links),
                )


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, str(kind))


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver on loopback."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces", self.path
            assert self.headers["content-type"] == "application/x-protobuf"
            receiver.take(gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
