"""Every setting of the gateway: the worker's machinery and shared rows, another table.

Gateway and worker share one environment, so each knows the other's names: none is a
fault to the other. What only the worker knows, the worker checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from handler.errors import BadSettings
from handler.settings import TABLE as WORKER_TABLE
from handler.settings import rows
from handler.table import ENDPOINT_ID, SWITCH, Setting, Table, choice, public_name, read, seconds, whole
from handler.unread import UNREAD

UPSTREAMS = ("local", "runpod")

_SHARED = {row.name: row for row in rows("API_KEY", "DRAIN_TIMEOUT_S", "OTEL_SERVICE_NAME")}

TABLE: Table = (
    *rows("HOST", "PORT"),
    replace(
        _SHARED["API_KEY"],
        help="The key that clients send as `Authorization: Bearer ...`. If not set: one is made and shown.",
    ),
    Setting(
        "ENDPOINT_ID",
        "endpoint_id",
        ENDPOINT_ID,
        "local",
        "The id in the URL, `/v2/{ENDPOINT_ID}/openai/v1`.",
    ),
    *rows("MODEL_NAME", "SERVED_MODEL_NAME"),
    Setting(
        "UPSTREAM",
        "upstream",
        choice(*UPSTREAMS),
        "local",
        "How the worker is asked. `local`: through a socket. `runpod`: as RunPod does, through jobs and its "
        "own SDK. `python -m gateway serve --upstream` wins.",
    ),
    Setting(
        "START",
        "start",
        choice("now", "first_request"),
        "now",
        "When the worker starts.",
    ),
    Setting(
        "WARM_PARENT",
        "warm_parent",
        SWITCH,
        "on",
        "`on`: workers are forked by a process that has imported vLLM, so that the next one starts in a "
        "second. It holds 0.6 GB, which its workers share. `off`: each starts from nothing.",
    ),
    Setting(
        "START_TIMEOUT_S",
        "start_timeout_s",
        seconds(1, 7200),
        "600",
        "How long a worker may take until its first token; then it is stopped.",
    ),
    Setting(
        "QUEUE_LIMIT",
        "queue_limit",
        whole(0, 100_000),
        "256",
        "How many requests may wait for a worker; one more is a 503 with `Retry-After`.",
    ),
    Setting(
        "QUEUE_TIMEOUT_S",
        "queue_timeout_s",
        seconds(1, 599),
        "300",
        "How long a request may wait in all, for a worker to start and then to take it: a 504 after that. "
        "Below 600, where OpenAI's clients give up.",
    ),
    Setting(
        "EXECUTION_TIMEOUT_S",
        "execution_timeout_s",
        seconds(1, 86_400),
        "590",
        "With `UPSTREAM=runpod`, how long a job may run. Until its client hears something, be it a comment, "
        "its waits count too: it is a 504 this long after it came, or 590 s if that is longer. Below 600, "
        "where OpenAI's clients give up.",
    ),
    *rows("KEEP_ALIVE_S"),
    replace(
        _SHARED["DRAIN_TIMEOUT_S"],
        help="After SIGTERM, how long running requests may take to finish, here and in the worker.",
    ),
    *rows("MAX_BODY_BYTES", "CORS_ORIGINS", "LOG_LEVEL"),
    *rows("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL"),
    replace(
        _SHARED["OTEL_SERVICE_NAME"],
        default="firsttoken-gateway",
        help="What traces call this gateway. Set, it is the name of its workers too.",
    ),
    *rows("FOREIGN_NAMES"),
)


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """The gateway's settings; `TABLE` and `docs/settings.md` say what each means."""

    host: str
    port: int
    api_key: str | None = field(repr=False)
    endpoint_id: str
    model_name: str
    served_model_name: str | None
    upstream: str
    start: str
    warm_parent: bool
    queue_limit: int
    queue_timeout_s: float
    start_timeout_s: float
    execution_timeout_s: float
    keep_alive_s: float
    drain_timeout_s: float
    max_body_bytes: int
    cors_origins: tuple[str, ...]
    log_level: str
    otel_exporter_otlp_endpoint: str | None
    otel_exporter_otlp_traces_endpoint: str | None
    otel_exporter_otlp_protocol: str
    otel_service_name: str
    foreign_names: tuple[str, ...]

    @property
    def model_id(self) -> str:
        """The name that clients know the model by, never a path."""
        return self.served_model_name or public_name(self.model_name)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """The settings that `environ` holds.

        Raises `BadSettings`, which names every fault and not only the first.
        """
        others = {*UNREAD, *(name for row in WORKER_TABLE for name in row.names)}
        values, faults = read(TABLE, environ, others)
        if faults:
            raise BadSettings(faults)
        return cls(**values)
