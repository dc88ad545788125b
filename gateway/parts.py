"""The routes that every gateway has: the endpoints' OpenAI routes, `/health` and `/metrics`."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from gateway.accounts.keys import Keys
from gateway.app import HEALTH
from gateway.endpoints.endpoint import Endpoint
from gateway.methods import by_method, read_only
from gateway.metrics import CONTENT_TYPE, Metrics
from handler import edge
from handler.errors import Forbidden, NoSuchEndpoint, json_reply
from handler.messages import Call, Reply, Request, once

_FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")


@dataclass(frozen=True, slots=True)
class OpenAI:
    """`/v2/{endpoint_id}/openai/v1/...`, answered by the endpoint of that id as `/v1/...`."""

    endpoints: Mapping[str, Endpoint]

    def find(self, request: Request) -> Call | None:
        """The endpoint's call. Raises `NoSuchEndpoint`, and what `edge.allowed` does."""
        _, top, endpoint_id, *rest = [*request.path.split("/", 4), "", ""]
        if top != "v2":
            return None
        if (endpoint := self.endpoints.get(endpoint_id)) is None:
            raise NoSuchEndpoint(endpoint_id)
        if rest[0] != "openai":
            return None
        path = "/" + rest[1]
        edge.allowed(request.method, path)
        return lambda asked: endpoint.call(replace(asked, path=path))


@dataclass(frozen=True, slots=True)
class Operations:
    """`/health` and `/metrics`.

    Anyone may hear that the gateway answers, which is what probes ask; who has a key, also how the endpoints
    are that it may use.

    `/metrics` wants a key unless `open_metrics`, and always when a proxy passed the request on, or a name led
    here that is not this machine's: any site may have one that leads to 127.0.0.1. It is of all endpoints:
    nothing for a key that is bound to some.
    """

    keys: Keys
    metrics: Metrics
    endpoints: Mapping[str, Endpoint]
    open_metrics: bool = False

    def find(self, request: Request) -> Call | None:
        """The call for one of the two. Raises `MethodNotAllowed`, `Unauthorized` and `Forbidden`."""
        call = {HEALTH: self._health, "/metrics": self._metrics}.get(request.path)
        if call is None:
            return None
        by_method(request, read_only(call))
        if request.path == "/metrics" and not (self.open_metrics and _is_local(request)):
            key = self.keys.check(request)
            if not key.admin and (key.endpoints is not None or key.models is not None):
                raise Forbidden("This needs a key that is not bound to endpoints or models.")
        return call

    @asynccontextmanager
    async def _health(self, request: Request) -> AsyncIterator[Reply]:
        health: dict[str, Any] = {"status": "ok"}
        if request.visit.caller:
            key = self.keys.of(request.visit.caller)
            mine = (endpoint for endpoint in self.endpoints.values() if key.may_use(endpoint.id))
            health["endpoints"] = [_health(endpoint) for endpoint in mine]
        yield json_reply(200, health)

    @asynccontextmanager
    async def _metrics(self, _: Request) -> AsyncIterator[Reply]:
        text = await self.metrics.exposition()
        yield Reply(200, (("content-type", CONTENT_TYPE), ("content-length", str(len(text)))), once(text))


def _is_local(request: Request) -> bool:
    try:
        host = urlsplit(f"//{request.header('host') or 'localhost'}").hostname
    except ValueError:
        return False
    return is_loopback(host or "") and not any(map(request.header, _FORWARDED))


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`, an address or a name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _health(endpoint: Endpoint) -> Mapping[str, Any]:
    """What every key that may use it may see: numbers."""
    workers = endpoint.workers
    return {"id": endpoint.id, **workers.load, "workers": Counter(view.state for view in workers.views)}
