"""One endpoint: a model, the workers that serve it, and the line of those who wait for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gateway.settings import GatewaySettings
from gateway.upstreams import WorkerView
from handler.messages import Call, Request


class Workers(Protocol):
    """What an endpoint tells of its workers."""

    @property
    def capacity(self) -> int:
        """How many requests the ready ones work on at once, in all; 0 while none is ready."""
        ...

    @property
    def askable(self) -> Mapping[str, Call]:
        """The ready ones that can be asked for more than what clients want, their metrics say, by id."""
        ...

    @property
    def views(self) -> Sequence[WorkerView]:
        """Those that live, and the last few that have ended."""
        ...

    @property
    def load(self) -> Mapping[str, int]:
        """Of requests, how many are `waiting` and `in_flight`, and the `capacity`."""
        ...

    def status(self) -> Mapping[str, Any]:
        """The fields of `/admin/status` that are about them and about who waits for them."""
        ...


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a request under `/v2/{id}` is for.

    `ask` waits for a worker and is answered by it. Whoever calls it has checked the key, and tells usage
    itself. `call` is for clients: their key's models and limits, metering, then `ask`.
    """

    settings: GatewaySettings = field(repr=False)
    ask: Call = field(repr=False)
    call: Call = field(repr=False)
    workers: Workers = field(repr=False)
    refuse: Callable[[Request], None] = field(default=lambda _: None, repr=False)
    """Raises what its workers are sure to answer a request with."""

    @property
    def id(self) -> str:
        """Its name in the URL."""
        return self.settings.endpoint_id

    @property
    def model_id(self) -> str:
        """What clients call its model."""
        return self.settings.model_id

    @property
    def capacity(self) -> int:
        """How many requests its workers work on at once, in all; 0 while none is ready."""
        return self.workers.capacity

    def status(self) -> Mapping[str, Any]:
        """Its entry in `/admin/status`."""
        return {
            "id": self.id,
            "model": self.model_id,
            "upstream": self.settings.upstream,
            **self.workers.status(),
        }
