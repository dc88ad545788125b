"""A gateway of one endpoint, in process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.accounts.keys import Keys
from gateway.accounts.limits import Limits
from gateway.app import Gateway
from gateway.endpoints.endpoint import Endpoint
from gateway.metrics import Metrics
from gateway.parts import OpenAI, Operations
from gateway.settings import GatewaySettings
from gateway.upstreams import WorkerView
from handler.messages import Call


@dataclass(frozen=True, slots=True)
class Workers:
    """Workers of whom only the number of their places is known."""

    capacity: int = 8
    views: Sequence[WorkerView] = ()
    askable: Mapping[str, Call] = field(default_factory=dict)

    @property
    def load(self) -> Mapping[str, int]:
        """As if they did nothing."""
        return {"waiting": 0, "in_flight": 0, "capacity": self.capacity}

    def status(self) -> Mapping[str, Any]:
        """No more than that."""
        return self.load


def endpoint(
    ask: Call, endpoint_id: str = "local", *, model: str = "m", capacity: int = 8, call: Call | None = None
) -> Endpoint:
    """The endpoint that is answered by `ask`, clients too unless there is a `call`."""
    settings = GatewaySettings.from_environ({"ENDPOINT_ID": endpoint_id, "MODEL_NAME": model})
    return Endpoint(settings, ask, call or ask, Workers(capacity))


def one(
    call: Call,
    keys: Keys,
    *,
    endpoint_id: str = "local",
    metrics: Metrics | None = None,
    open_metrics: bool = False,
    limits: Limits | None = None,
) -> Gateway:
    """The gateway whose only endpoint is answered by `call`."""
    metrics = metrics or Metrics()
    metrics.endpoint(endpoint_id)
    endpoints = {endpoint_id: endpoint(call, endpoint_id)}
    own = Operations(keys, metrics, endpoints, open_metrics)
    return Gateway([OpenAI(endpoints), own], keys, metrics, limits or Limits())
