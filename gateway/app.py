"""The gateway's routes: one ASGI application over an upstream that answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gateway.keys import Keys
from gateway.metrics import CONTENT_TYPE, Metrics
from handler import asgi, edge
from handler.errors import MethodNotAllowed, NoSuchEndpoint, NoSuchRoute, RequestError, json_reply
from handler.messages import Call, Reply, Request, once

_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")


@dataclass(frozen=True, slots=True)
class Gateway:
    """What the gateway answers with.

    `endpoint` answers the OpenAI routes under `/v2/{endpoint_id}/openai`; `health` gives
    what `/health` shows to anyone. `/metrics` wants the key unless `open_metrics`, and
    always when a proxy passed the request on.
    """

    endpoint_id: str
    endpoint: Call
    keys: Keys
    metrics: Metrics
    health: Callable[[], Mapping[str, Any]]
    open_metrics: bool = False

    def app(self, *, max_body_bytes: int, cors_origins: Sequence[str]) -> asgi.App:
        """The ASGI application. Whom it refuses, it refuses before reading the body."""

        def front(call: Call) -> Call:
            return self._counted(edge.front(call, cors_origins=cors_origins))

        return asgi.serve(self.call, max_body_bytes=max_body_bytes, check=self.check, front=front)

    def check(self, request: Request) -> None:
        """Raise the `RequestError` that `request` gets whatever its body says."""
        self._route(request)

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """Answer `request`."""
        async with self._route(request)(request) as reply:
            yield reply

    def _route(self, request: Request) -> Call:
        method, path = request.method, request.path
        if path == "/v2" or path.startswith("/v2/"):
            self.keys.ring.check(request)
            inner = self._openai_path(method, path)
            edge.allowed(method, inner)
            return partial(self._ask, inner)
        own = {"/health": self._health, "/metrics": self._metrics}.get(path)
        if own is None:
            raise NoSuchRoute(method, path)
        if method not in {"GET", "HEAD"}:
            raise MethodNotAllowed(method, path, ["GET", "HEAD"])
        if own == self._metrics and not (self.open_metrics and not any(map(request.header, _FORWARDED))):
            self.keys.ring.check(request)
        return own

    def _openai_path(self, method: str, path: str) -> str:
        """The part of `path` that an OpenAI server knows, from `/v1` on."""
        _, _, endpoint_id, *rest = [*path.split("/", 4), ""]
        if endpoint_id != self.endpoint_id:
            raise NoSuchEndpoint(endpoint_id)
        if rest[0] != "openai":
            raise NoSuchRoute(method, path)
        return "/" + rest[1]

    @asynccontextmanager
    async def _ask(self, path: str, request: Request) -> AsyncIterator[Reply]:
        async with self.endpoint(replace(request, path=path)) as reply:
            yield reply

    @asynccontextmanager
    async def _health(self, _: Request) -> AsyncIterator[Reply]:
        yield json_reply(200, self.health())

    @asynccontextmanager
    async def _metrics(self, _: Request) -> AsyncIterator[Reply]:
        text = self.metrics.render()
        yield Reply(200, (("content-type", CONTENT_TYPE), ("content-length", str(len(text)))), once(text))

    def _counted(self, call: Call) -> Call:
        metrics = self.metrics

        @asynccontextmanager
        async def counted(request: Request) -> AsyncIterator[Reply]:
            status = "left"
            metrics.in_flight.inc()
            try:
                async with call(request) as reply:
                    status = str(reply.status)
                    yield reply
            except RequestError:
                metrics.broken_replies.inc()
                raise
            finally:
                metrics.in_flight.dec()
                metrics.requests.labels(_label(request.path), status).inc()

        return counted


def _label(path: str) -> str:
    """One of a bounded number of names for the route of `path`."""
    inner = "/" + "/".join(path.rstrip("/").split("/")[4:])
    if path.startswith("/v2/"):
        return (
            inner
            if inner in edge.ROUTES
            else "/v1/models/{id}"
            if inner.startswith("/v1/models/")
            else "other"
        )
    return path if path in {"/health", "/metrics"} else "other"
