"""A gateway of one endpoint, in process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gateway.app import Gateway
from gateway.keys import Keys
from gateway.limits import Limits
from gateway.metrics import Metrics
from gateway.parts import OpenAI, Operations
from handler.messages import Call


def one(
    endpoint: Call,
    keys: Keys,
    *,
    endpoint_id: str = "local",
    metrics: Metrics | None = None,
    health: Callable[[], Mapping[str, Any]] = dict,
    open_metrics: bool = False,
    limits: Limits | None = None,
) -> Gateway:
    """The gateway whose only endpoint is `endpoint`."""
    metrics = metrics or Metrics()
    own = Operations(keys, metrics, health, open_metrics)
    return Gateway([OpenAI({endpoint_id: endpoint}), own], keys, metrics, limits or Limits())
