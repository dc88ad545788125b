"""`/page/session`: whose key it is, and what it may ask. The page signs in with it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from gateway.accounts.keys import Keys
from gateway.endpoints.endpoint import Endpoint
from gateway.methods import by_method
from handler.errors import json_reply
from handler.messages import Call, Reply, Request

PATH = "/page/session"


@dataclass(frozen=True, slots=True)
class Session:
    """The route that is for every key, an admin's or not, and for whatever endpoints it may use."""

    keys: Keys
    endpoints: Mapping[str, Endpoint]

    def find(self, request: Request) -> Call | None:
        """Its call. Raises `MethodNotAllowed` and `Unauthorized`."""
        if request.path != PATH:
            return None
        call: Call = by_method(request, {"GET": self._tell})
        self.keys.check(request)
        return call

    @asynccontextmanager
    async def _tell(self, request: Request) -> AsyncIterator[Reply]:
        """`{"key": {"id", "name", "admin", "models"}, "endpoints": [{"id", "model"}]}`."""
        key = self.keys.check(request)
        view = key.view()
        endpoints = [
            {"id": endpoint.id, "model": endpoint.model_id}
            for endpoint in self.endpoints.values()
            if key.may_use(endpoint.id)
        ]
        own = {name: view[name] for name in ("id", "name", "admin", "models")}
        yield json_reply(200, {"key": own, "endpoints": endpoints}, (("cache-control", "no-store"),))
