"""All endpoints of a gateway, by id; they come and go while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from gateway.endpoint import Endpoint


class Endpoints(Mapping[str, Endpoint]):
    """The endpoints that take requests now, in the order in which they were described.

    Look an endpoint up anew for each request: after a reload another one may have its id.
    """

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self._endpoints = {endpoint.id: endpoint for endpoint in endpoints}

    def __getitem__(self, endpoint_id: str) -> Endpoint:
        return self._endpoints[endpoint_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._endpoints)

    def __len__(self) -> int:
        return len(self._endpoints)
