"""What Ray Serve is told of a deployment of workers, made of the settings; it needs no Ray.

The names are Ray's (`ray.serve.deployment`, `ray.serve.config.AutoscalingConfig`, both of 2.60).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from handler.errors import BadSettings
from handler.parallel import devices_per_engine
from handler.settings import TABLE as WORKER_TABLE
from handler.settings import rows
from handler.table import Setting, Table, choice, read, seconds, whole
from handler.unread import UNREAD

SLOTS = 256
"""What vLLM batches on most devices: until an engine says what it can hold, or MAX_CONCURRENCY does."""
BUSY = 0.7
"""The share of its slots that a replica has in use, on average, before another is started."""
UP_AFTER_S = 3.0
LOOK_BACK_S = 12.0
"""Over which Ray averages the load. It measures every 10 s and wants more than that."""
KILL_GRACE_S = 5.0
HEALTH_PERIOD_S = 5.0
HEALTH_TIMEOUT_S = 30.0
"""A long prefill on the replica's one core is no death."""
STARTS_MAX = 3
FULL_RETRY_AFTER_S = 5.0

TABLE: Table = (
    *rows("HOST", "PORT", "MAX_CONCURRENCY", "DRAIN_TIMEOUT_S"),
    Setting("MIN_WORKERS", "min_workers", whole(0, 1000), "0", "How many replicas stay though nobody asks."),
    Setting("MAX_WORKERS", "max_workers", whole(1, 1000), "1", "How many replicas there may be."),
    Setting(
        "IDLE_TIMEOUT_S",
        "idle_timeout_s",
        seconds(0, 86_400),
        "300",
        "How long there must have been one replica too many before it ends.",
    ),
    Setting("START", "start", choice("now", "first_request"), "now", "When the first replica starts."),
    Setting(
        "QUEUE_LIMIT",
        "queue_limit",
        whole(0, 100_000),
        "256",
        "How many requests each of Ray's proxies holds; one more is a 503 with `Retry-After`.",
    ),
)


@dataclass(frozen=True, slots=True)
class RaySettings:
    """The settings of a deployment; those of its workers are `handler.settings.Settings`."""

    host: str
    port: int
    max_concurrency: int | None
    drain_timeout_s: float
    min_workers: int
    max_workers: int
    idle_timeout_s: float
    start: str
    queue_limit: int
    devices: int
    """GPUs of one replica, all on one node."""
    slots: int

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], *, gpus: bool) -> Self:
        """What `environ` says; `gpus`: the cluster has some. Raises `BadSettings`."""
        others = {*UNREAD, *(name for row in WORKER_TABLE for name in row.names)}
        values, faults = read(TABLE, environ, others)
        low, high = values["min_workers"], values["max_workers"]
        if low is not None and high is not None and low > high:
            faults = [*faults, f"MIN_WORKERS={low} is more than MAX_WORKERS={high}"]
        if faults:
            raise BadSettings(faults)
        batched = environ.get("MAX_NUM_SEQS", "")
        slots = values["max_concurrency"] or (int(batched) if batched.isdecimal() and int(batched) else SLOTS)
        return cls(**values, devices=devices_per_engine(environ) if gpus else 0, slots=slots)

    @property
    def first_replicas(self) -> int:
        """How many start before anybody asks."""
        return max(self.min_workers, int(self.start == "now"))

    def deployment(self) -> dict[str, Any]:
        """The options of `ray.serve.deployment`."""
        return {
            "max_ongoing_requests": self.slots,
            "max_queued_requests": self.queue_limit,
            "backpressure_config": {"status_code": 503, "retry_after_s": FULL_RETRY_AFTER_S},
            "autoscaling_config": {
                "min_replicas": self.min_workers,
                "initial_replicas": self.first_replicas,
                "max_replicas": self.max_workers,
                "target_ongoing_requests": max(1.0, BUSY * self.slots),
                "upscale_delay_s": UP_AFTER_S,
                "downscale_delay_s": self.idle_timeout_s,
                "downscale_to_zero_delay_s": self.idle_timeout_s,
                "look_back_period_s": LOOK_BACK_S,
            },
            "ray_actor_options": {"num_cpus": 1, "num_gpus": self.devices},
            "graceful_shutdown_timeout_s": self.drain_timeout_s + KILL_GRACE_S,
            "graceful_shutdown_wait_loop_s": 0.5,
            "health_check_period_s": HEALTH_PERIOD_S,
            "health_check_timeout_s": HEALTH_TIMEOUT_S,
            "max_constructor_retry_count": STARTS_MAX,
        }
