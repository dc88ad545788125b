"""Every setting of the gateway: the same machinery as the worker's, another table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from handler.settings import public_name


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """The gateway's settings; see `TABLE` for what each means, and `docs/settings.md`."""

    host: str
    port: int
    api_key: str | None = field(repr=False)
    endpoint_id: str
    model_name: str
    served_model_name: str | None
    start: str
    queue_limit: int
    queue_timeout_s: float
    start_timeout_s: float
    keep_alive_s: float
    drain_timeout_s: float
    max_body_bytes: int
    cors_origins: tuple[str, ...]
    log_level: str
    notes: tuple[str, ...] = ()

    @property
    def model_id(self) -> str:
        """The name that clients know the model by, never a path."""
        return self.served_model_name or public_name(self.model_name)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """The settings that `environ` holds.

        Raises `BadSettings`, which names every fault and not only the first.
        """
        raise NotImplementedError
