"""The gateway as one ASGI application: who may come in, and which part answers."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from sqlalchemy.exc import DataError

from gateway.accounts.keys import Key
from gateway.accounts.limits import Limits
from gateway.bodies import HELD_MAX_BYTES, Bodies
from gateway.database import reason
from gateway.metrics import Metrics
from gateway.store import AWAY
from handler import asgi, edge
from handler.errors import (
    BadRequest,
    Forbidden,
    NoSuchEndpoint,
    NoSuchRoute,
    RequestError,
    StorageDown,
    Unauthorized,
)
from handler.messages import Call, Headers, Reply, Request

if TYPE_CHECKING:
    from handler.otel import Traces

log = logging.getLogger("gateway")

HEALTH = "/health"


class Part(Protocol):
    """Some of the gateway's routes.

    `find` gives the call that answers `request`, or None if the route is another part's. It runs twice, the
    first time before the body is read: what it raises then is the whole answer. On routes that want a key,
    `Visit.caller` is the key's id by then.
    """

    def find(self, request: Request) -> Call | None:
        """The call for `request`. Raises a `RequestError` for what is this part's and can't be had."""


HINT = "The gateway has an endpoint at /v2/{endpoint_id}/openai/v1."


class Doorkeeper(Protocol):
    """Who knows the keys."""

    def check(self, request: Request) -> Key:
        """The key that `request` bears. Raises `Unauthorized` unless it opens."""
        ...

    def known(self, request: Request) -> Key | None:
        """The same, but None where it bears none."""
        ...


@dataclass(frozen=True, slots=True)
class Reads:
    """A call that reads the body of its request by itself (`Request.pieces`), up to `max_bytes`."""

    call: Call
    max_bytes: int

    def __call__(self, request: Request) -> AbstractAsyncContextManager[Reply]:
        """Answer `request`."""
        return self.call(request)


@dataclass(frozen=True, slots=True)
class Gateway:
    """What the gateway answers with: the first of its `parts` that knows the route.

    Everything under `/v2` and `/admin` wants a key, whether there is such a route or not; `/admin` an
    admin's, and `/v2/{endpoint_id}` one for which the endpoint is there. `/health` says more to who has one.
    """

    parts: Sequence[Part]
    keys: Doorkeeper
    metrics: Metrics
    limits: Limits = field(default_factory=Limits)
    traces: Traces | None = None

    def app(self, *, max_body_bytes: int, cors_origins: Sequence[str]) -> asgi.App:
        """The ASGI application. Whom it refuses, it refuses before reading the body."""

        def front(call: Call) -> Call:
            limited = self._limited(edge.front(call, cors_origins=cors_origins))
            return self._counted(self.traces.follow(limited, _route) if self.traces else limited)

        bodies = Bodies(max(HELD_MAX_BYTES, 2 * max_body_bytes))

        def hold(request: Request) -> AbstractContextManager[Callable[[int], None]]:
            return bodies.hold(self._known(request).visit.caller)

        return asgi.serve(self.call, max_body_bytes=max_body_bytes, check=self.check, front=front, hold=hold)

    def check(self, request: Request) -> int | None:
        """Raise the `RequestError` that `request` gets whatever its body says.

        Returns how many bytes its call will read by itself; None: it is given the body.
        """
        found = self._find(self._known(request))
        return found.max_bytes if isinstance(found, Reads) else None

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """Answer `request`. Raises `StorageDown`, and what a part does."""
        request = self._known(request)
        try:
            async with self._find(request)(request) as reply:
                yield reply
        except AWAY as error:  # a full disk, another process that has it, a server that is away
            log.warning("the database failed a request", extra={"reason": reason(error)})
            raise StorageDown from error
        except DataError:  # PostgreSQL's texts have no zero; with SQLite nobody has such a name
            raise BadRequest("Something in the request is no text that could be kept.") from None

    def _known(self, request: Request) -> Request:
        """`request`, and whose it is. Raises what its key is refused with."""
        if not request.path.startswith("/"):  # `OPTIONS *`
            raise NoSuchRoute(request.method, request.path)
        if (key := self._key(request)) is None:
            return request
        top, endpoint_id = _head(request.path)
        if top == "admin" and not key.admin:
            raise Forbidden("This needs an admin key.")
        if top == "v2" and not key.may_use(endpoint_id):
            raise NoSuchEndpoint(endpoint_id)  # what others have, nobody needs to know of
        return replace(request, visit=replace(request.visit, caller=key.id))

    def _key(self, request: Request) -> Key | None:
        """The key that `request` bears; None where none is wanted. Raises `Unauthorized`."""
        top, _ = _head(request.path)
        if top in {"v2", "admin"}:
            return self.keys.check(request)
        return self.keys.known(request) if request.path == HEALTH else None

    def _find(self, request: Request) -> Call:
        for part in self.parts:
            if call := part.find(request):
                return call
        if _head(request.path)[0] == "v1":  # where `vllm serve` has its models
            raise NoSuchRoute(request.method, request.path, HINT)
        raise NoSuchRoute(request.method, request.path)

    def _limited(self, call: Call) -> Call:
        """`call`, whose every answer to a key with limits says how it stands with them."""

        @asynccontextmanager
        async def limited(request: Request) -> AsyncIterator[Reply]:
            async with call(request) as reply:
                yield replace(reply, headers=(*reply.headers, *self._standing(request)))

        return limited

    def _standing(self, request: Request) -> Headers:
        try:
            key = self._key(request)
        except Unauthorized:
            return ()
        return self.limits.headers(key) if key else ()

    def _counted(self, call: Call) -> Call:
        metrics = self.metrics

        @asynccontextmanager
        async def counted(request: Request) -> AsyncIterator[Reply]:
            route, status = _label(request.path), "left"
            of = metrics.known(_endpoint_id(request.path))
            of.in_flight.inc()
            try:
                async with call(request) as reply:
                    status = str(reply.status)
                    yield of.timed(reply, request.visit.arrived_s) if reply.streams else reply
            except RequestError:
                of.broken_replies.inc()
                raise
            finally:
                of.in_flight.dec()
                metrics.requests.labels(of.endpoint_id, route, status).inc()
                took_s = time.monotonic() - request.visit.arrived_s
                metrics.duration_s.labels(of.endpoint_id, route).observe(took_s)

        return counted


def _route(request: Request) -> tuple[str, str] | None:
    """The pattern of a path that has traces, and its endpoint."""
    if not (endpoint_id := _endpoint_id(request.path)):
        return None
    inner = _label(request.path)
    return "/v2/{endpoint_id}" + ("" if inner == "other" else f"/openai{inner}"), endpoint_id


def _head(path: str) -> tuple[str, str]:
    """The first two parts of `path`; of one that has fewer, as `/health` and HTTP's own `*`, empty ones."""
    _, top, below, *_ = [*path.split("/", 3), "", ""]
    return top, below


def _endpoint_id(path: str) -> str:
    top, below = _head(path)
    return below if top == "v2" else ""


def _label(path: str) -> str:
    """One of a bounded number of names for the route of `path`."""
    inner = "/" + "/".join(path.rstrip("/").split("/")[4:])
    if path == "/" or path.startswith("/page/"):
        return "page"
    if not path.startswith("/v2/"):
        return path if path in {HEALTH, "/metrics"} else "other"
    own = _WITH_ID.sub(r"\1/{id}\2", inner)
    return own if own in _LABELS else edge.pattern(inner) or "other"


_WITH_ID = re.compile(r"^(/v1/(?:files|batches))/(?:.+?)(/content|/cancel)?$")
_LABELS = frozenset(
    {
        *("/v1/files", "/v1/files/{id}", "/v1/files/{id}/content"),
        *("/v1/batches", "/v1/batches/{id}", "/v1/batches/{id}/cancel"),
    }
)
