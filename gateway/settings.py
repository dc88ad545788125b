"""Every setting of the gateway, as one table and as one frozen object; rows like the worker's are shared.

Gateway and worker share one environment, so each knows the other's names: none is a
fault to the other. What only the worker knows, the worker checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Self

from gateway.scaling import Scaling
from handler.errors import BadSettings
from handler.settings import TABLE as WORKER_TABLE
from handler.settings import rows
from handler.table import (
    ENDPOINT_ID,
    HOST,
    SECRET,
    SIZE,
    SWITCH,
    Kind,
    Setting,
    Table,
    auto_or,
    choice,
    matching,
    ours,
    public_name,
    read,
    seconds,
    size,
    whole,
)
from handler.unread import UNREAD

UPSTREAMS = ("local", "runpod", "http")
MOST_WORKERS = 64


def _price(value: str) -> int:
    """In billionths, so that sums of it are exact."""
    try:
        number = Decimal(value) * 10**9
    except InvalidOperation:
        raise ValueError(value) from None
    if not (number.is_finite() and 0 <= number <= 10**15 and number == int(number)):
        raise ValueError(value)
    return int(number)


PRICE = Kind("a number from 0 to 1000000, with at most 9 decimals", _price, low=0, high=10**6)
URL = Kind("a URL such as `https://host:8000/v1`", matching(r"https?://[^\s/?#@]+(/[^\s?#]*)?"))
FOLDER = Kind("a folder", Path)
DATABASE = Kind(
    "a URL such as `sqlite:////srv/gateway.db`, an absolute path, or `postgresql://user:password@host/name`",
    matching(r"sqlite(\+[a-z0-9]+)?:////\S+|postgres(ql)?(\+[a-z0-9]+)?://\S*"),
)


def _hosts(value: str) -> tuple[str, ...]:
    hosts = [item.strip() for item in value.split(",") if item.strip()]
    return tuple(str(ip_network(host, strict=False) if "/" in host else HOST.parse(host)) for host in hosts)


HOSTS = Kind("names of hosts, addresses, and networks such as `10.0.0.0/8`, separated by commas", _hosts)

KEPT: Table = (
    Setting(
        "DATA_DIR",
        "data_dir",
        FOLDER,
        None,
        "What the gateway keeps: keys, usage, jobs, files. If not set: `$XDG_DATA_HOME/firsttoken`, else "
        "`~/.local/share/firsttoken`. One gateway per folder; several share only `files/` in it. Refused if "
        "others may write it.",
    ),
    Setting(
        "DATABASE_URL",
        "database_url",
        DATABASE,
        None,
        "The database. If not set: SQLite, in `gateway.db` in `DATA_DIR`. Another folder of a SQLite file "
        "has to be there, is refused if others may write it, and has `gateway.lock` too. `postgresql://...` "
        "for several gateways over one (docs/scaling.md).",
        secret=True,
    ),
)
"""Where the gateway keeps what outlives it: all that a command line beside it needs."""

_SHARED = {row.name: row for row in rows("API_KEY", "DRAIN_TIMEOUT_S", "OTEL_SERVICE_NAME")}

TABLE: Table = (
    *rows("HOST", "PORT"),
    replace(
        _SHARED["API_KEY"],
        help="An admin key, `Authorization: Bearer ...`, beside those of `python -m gateway keys`. If not "
        "set and there is no key yet: one is made, and shown once.",
    ),
    Setting(
        "ENDPOINTS_FILE",
        "endpoints_file",
        Kind("a path that ends in `.toml`", matching(r"(?s).+\.toml")),
        None,
        "Where several endpoints are described (docs/gateway.md). If not set: the environment describes one.",
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
        "own SDK. `http`: it is an OpenAI server that others run, at `UPSTREAM_URL`. "
        "`python -m gateway serve --upstream` wins.",
    ),
    Setting(
        "UPSTREAM_URL",
        "upstream_url",
        URL,
        None,
        "With `UPSTREAM=http`, where `/chat/completions` is: Ray Serve, a Kubernetes service, `vllm serve`.",
    ),
    Setting(
        "UPSTREAM_KEY",
        "upstream_key",
        SECRET,
        None,
        "The key that the server at `UPSTREAM_URL` wants. Clients' keys end at the gateway.",
        secret=True,
    ),
    Setting(
        "UPSTREAM_SLOTS",
        "upstream_slots",
        whole(1, 100_000),
        "1024",
        "How many requests it is given at once; the others wait here, where turns are fair.",
    ),
    Setting(
        "UPSTREAM_METRICS",
        "upstream_metrics",
        SWITCH,
        "off",
        "`on`: the gateway's `/metrics` has those of the server at `UPSTREAM_URL`. Only where one process "
        "answers there: of several, each scrape would have another one's.",
    ),
    Setting(
        "START",
        "start",
        choice("now", "first_request"),
        "now",
        "When the first worker starts. One that was started `now` and dies is replaced at once.",
    ),
    Setting(
        "MIN_WORKERS",
        "min_workers",
        whole(0, MOST_WORKERS),
        "0",
        "How many workers stay though nobody asks.",
    ),
    Setting(
        "MAX_WORKERS",
        "max_workers",
        whole(1, MOST_WORKERS),
        "1",
        "How many workers there are at most; more than one are started as the queue wants them. Each has "
        "GPUs of its own: there are never more than the GPUs hold.",
    ),
    Setting(
        "IDLE_TIMEOUT_S",
        "idle_timeout_s",
        auto_or(seconds(1, 86_400)),
        "auto",
        "How long a worker must not have been needed before it is ended. `auto`: five times what the last "
        "start took, and a minute at least.",
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
        "How many requests may wait for a worker, and as many of batches; one more is a 503 with "
        "`Retry-After`.",
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
        "JOBS_LIMIT",
        "jobs_limit",
        whole(0, 1_000_000),
        "10000",
        "How many jobs may wait at an endpoint; one more is a 429 with `Retry-After`.",
    ),
    Setting(
        "WEBHOOK_HOSTS",
        "webhook_hosts",
        HOSTS,
        "",
        "Where webhooks of jobs may lead besides the internet: on this machine or its network.",
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
    *KEPT,
    Setting(
        "PRICE_INPUT",
        "price_input",
        PRICE,
        "0",
        "What a million tokens of prompts cost, in whichever money: usage shows it.",
    ),
    Setting("PRICE_OUTPUT", "price_output", PRICE, "0", "What a million tokens of answers cost."),
    *rows("KEEP_ALIVE_S"),
    replace(
        _SHARED["DRAIN_TIMEOUT_S"],
        help="After SIGTERM, how long running requests may take to finish, here and in the worker.",
    ),
    Setting(
        "MAX_FILE_BYTES",
        "max_file_bytes",
        SIZE,
        "512MiB",
        "The largest file that `/files` takes; more is a 413. A batch's input may have 200 MB at most.",
    ),
    Setting(
        "MAX_STORED_BYTES",
        "max_stored_bytes",
        size(1 << 20),
        "16GiB",
        "What all files may take together; a file more is a 413 until some are deleted.",
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
    endpoints_file: str | None
    endpoint_id: str
    model_name: str
    served_model_name: str | None
    upstream: str
    upstream_url: str | None
    upstream_key: str | None = field(repr=False)
    upstream_slots: int
    upstream_metrics: bool
    start: str
    min_workers: int
    max_workers: int
    idle_timeout_s: float | None
    warm_parent: bool
    queue_limit: int
    queue_timeout_s: float
    jobs_limit: int
    webhook_hosts: tuple[str, ...]
    start_timeout_s: float
    execution_timeout_s: float
    data_dir: Path
    database_url: str = field(repr=False)
    price_input: int
    price_output: int
    keep_alive_s: float
    drain_timeout_s: float
    max_file_bytes: int
    max_stored_bytes: int
    max_body_bytes: int
    cors_origins: tuple[str, ...]
    log_level: str
    otel_exporter_otlp_endpoint: str | None
    otel_exporter_otlp_traces_endpoint: str | None
    otel_exporter_otlp_protocol: str
    otel_service_name: str
    foreign_names: tuple[str, ...]

    @property
    def scaling(self) -> Scaling:
        """The bounds of the one endpoint."""
        return Scaling(self.min_workers, self.max_workers, self.idle_timeout_s)

    @property
    def model_id(self) -> str:
        """The name that clients know the model by, never a path."""
        return self.served_model_name or public_name(self.model_name)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """The settings that `environ` holds.

        Raises `BadSettings`, which names every fault and not only the first.
        """
        values, faults = _read(TABLE, environ)
        least, most = values["min_workers"], values["max_workers"]
        if least is not None and most is not None and least > most:
            faults.append(f"MIN_WORKERS={least} is more than MAX_WORKERS={most}")
        if values["upstream"] == "http" and "UPSTREAM_URL" not in ours(environ):
            faults.append("UPSTREAM=http asks a server that others run; set UPSTREAM_URL")
        if faults:
            raise BadSettings(faults)
        return cls(**_kept(values, environ))


@dataclass(frozen=True, slots=True)
class KeptSettings:
    """Where things are kept, for a command that needs no more; `KEPT` says what each means."""

    data_dir: Path
    database_url: str = field(repr=False)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """The settings that `environ` holds. Raises `BadSettings`."""
        values, faults = _read(KEPT, environ)
        if faults:
            raise BadSettings(faults)
        return cls(**_kept(values, environ))


def _read(table: Table, environ: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    others = {*UNREAD, *(name for row in (*WORKER_TABLE, *TABLE) for name in row.names)}
    return read(table, environ, others)


def _kept(values: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """`values`, with the folder and the database that hold where none are set."""
    environ = ours(environ)
    folder = values["data_dir"]
    if folder is None:
        share = environ.get("XDG_DATA_HOME") or Path(environ.get("HOME") or Path.home(), ".local/share")
        folder = Path(share, "firsttoken")
    folder = folder.absolute()
    return {
        **values,
        "data_dir": folder,
        "database_url": values["database_url"] or f"sqlite:///{folder / 'gateway.db'}",
    }
