"""The gateway as one ASGI application: who may come in, and which part answers."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from gateway.keys import Keys
from gateway.metrics import Metrics
from handler import asgi, edge
from handler.errors import Forbidden, NoSuchEndpoint, NoSuchRoute, RequestError
from handler.messages import Call, Reply, Request


class Part(Protocol):
    """Some of the gateway's routes.

    `find` gives the call that answers `request`, or None if the route is another part's. It runs twice, and
    first before the body is read: what it raises is then all that the client hears. Who asks is known by then
    where a key is needed (`Visit.caller`).
    """

    def find(self, request: Request) -> Call | None:
        """The call for `request`. Raises a `RequestError` for what is this part's and can't be had."""


@dataclass(frozen=True, slots=True)
class Reads:
    """A call that reads the body of its request by itself (`Request.pieces`), at most `max_bytes` of it."""

    call: Call
    max_bytes: int

    def __call__(self, request: Request) -> AbstractAsyncContextManager[Reply]:
        """Answer `request`."""
        return self.call(request)


@dataclass(frozen=True, slots=True)
class Gateway:
    """What the gateway answers with: the first of its `parts` that knows the route.

    Everything under `/v2` and `/admin` wants a key, whether there is such a route or not; `/admin` an
    admin's, and `/v2/{endpoint_id}` one for which the endpoint is there.
    """

    parts: Sequence[Part]
    keys: Keys
    metrics: Metrics

    def app(self, *, max_body_bytes: int, cors_origins: Sequence[str]) -> asgi.App:
        """The ASGI application. Whom it refuses, it refuses before reading the body."""

        def front(call: Call) -> Call:
            return self._counted(edge.front(call, cors_origins=cors_origins))

        return asgi.serve(self.call, max_body_bytes=max_body_bytes, check=self.check, front=front)

    def check(self, request: Request) -> int | None:
        """Raise the `RequestError` that `request` gets whatever its body says.

        Returns how many bytes its call will read by itself; None: it is given the body.
        """
        found = self._find(self._known(request))
        return found.max_bytes if isinstance(found, Reads) else None

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """Answer `request`."""
        request = self._known(request)
        async with self._find(request)(request) as reply:
            yield reply

    def _known(self, request: Request) -> Request:
        """`request`, and whose it is. Raises what its key is refused with."""
        _, top, endpoint_id, *_ = [*request.path.split("/", 3), "", ""]
        if top not in {"v2", "admin"}:
            return request
        key = self.keys.check(request)
        if top == "admin" and not key.admin:
            raise Forbidden("This needs an admin key.")
        if top == "v2" and not key.may_use(endpoint_id):
            raise NoSuchEndpoint(endpoint_id)  # what others have, nobody needs to know of
        return replace(request, visit=replace(request.visit, caller=key.id))

    def _find(self, request: Request) -> Call:
        for part in self.parts:
            if call := part.find(request):
                return call
        raise NoSuchRoute(request.method, request.path)

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
    if not path.startswith("/v2/"):
        return path if path in {"/health", "/metrics"} else "other"
    inner = _WITH_ID.sub(r"\1/{id}\2", inner)
    return inner if inner in edge.ROUTES or inner in _LABELS else "other"


_WITH_ID = re.compile(r"^(/v1/(?:models|files|batches))/(?:.+?)(/content|/cancel)?$")
_LABELS = frozenset(
    {
        *("/v1/models/{id}", "/v1/files", "/v1/files/{id}", "/v1/files/{id}/content"),
        *("/v1/batches", "/v1/batches/{id}", "/v1/batches/{id}/cancel"),
    }
)
