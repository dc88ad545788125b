"""Every setting of the worker, as one table and as one frozen object.

`Settings.from_environ(environ)` reports all faults at once. A setting that is empty
counts as not set. What an environment holds beside the table are flags of vLLM in
UPPER_SNAKE, which `handler.flags` reads against vLLM's own parser, and names of other
programs.

Dataclasses and not pydantic: its import alone takes longer than all that is done here,
and a cold start counts it.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from handler.errors import BadSettings
from handler.levers import LEVERS
from handler.table import (
    AWS_SECRET,
    AWS_TABLE,
    ENDPOINT_ID,
    HOST,
    MODEL,
    NAME,
    NAMES,
    OBJECTS,
    ORIGINS,
    PLACES,
    QUEUE,
    SECRET,
    SIZE,
    SOCKET,
    SWITCH,
    TEXT,
    URL,
    YAML,
    Setting,
    Table,
    choice,
    ours,
    public_name,
    read,
    render_markdown,
    seconds,
    some_of,
    whole,
)
from handler.unread import UNREAD

__all__ = [
    "DEFAULT_MODEL",
    "PLATFORMS",
    "TABLE",
    "Settings",
    "public_name",
    "render_markdown",
    "rest",
    "rows",
]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

PLATFORMS = ("runpod", "aws_lambda", "sqs", "http")
"""Platforms that this version can serve, in the order in which they are detected."""

LAMBDA = "AWS_LAMBDA_RUNTIME_API"
RUNPOD = "RUNPOD_WEBHOOK_GET_JOB"
"""The variables by which AWS Lambda and a RunPod queue are recognised."""

TABLE: Table = (
    Setting(
        "MODEL_NAME", "model_name", MODEL, DEFAULT_MODEL, "The model to serve; also the folder of a bake."
    ),
    Setting(
        "MODEL_REVISION",
        "model_revision",
        NAME,
        None,
        "Branch, tag or commit of the model's repository.",
        ("REVISION",),
    ),
    Setting(
        "SERVED_MODEL_NAME",
        "served_model_name",
        NAME,
        None,
        "What clients call the model. If not set: `MODEL_NAME`; of a folder, its last part; of a bake, "
        "the name that it was baked by.",
        ("OPENAI_SERVED_MODEL_NAME_OVERRIDE",),
    ),
    Setting(
        "TOKENIZER_NAME",
        "tokenizer_name",
        MODEL,
        None,
        "Another tokenizer than the model's own.",
        ("TOKENIZER",),
    ),
    Setting(
        "CUSTOM_CHAT_TEMPLATE",
        "custom_chat_template",
        TEXT,
        None,
        "Another chat template than the model's own: the path of a file, or the Jinja text itself.",
        ("CHAT_TEMPLATE",),
    ),
    Setting(
        "HF_TOKEN",
        "hf_token",
        SECRET,
        None,
        "Token for gated and private models. It never reaches a command line or a log.",
        ("HUGGING_FACE_HUB_TOKEN",),
        secret=True,
    ),
    Setting(
        "VLLM_CONFIG_FILE",
        "vllm_config_file",
        YAML,
        None,
        "Flags of vLLM in a file, as its `--config` takes them.",
    ),
    Setting(
        "VLLM_EXTRA_ARGS",
        "vllm_extra_args",
        TEXT,
        None,
        "Flags of vLLM as words, quoted as in a shell.",
    ),
    Setting(
        "VERIFY_WEIGHTS",
        "verify_weights",
        choice("size", "full"),
        "size",
        "What is compared of the weights of a baked model before they are loaded: the `size` of each file, "
        "or in `full` each byte, about 1 s per GB.",
    ),
    Setting(
        "ENGINE_MODE",
        "engine_mode",
        choice("auto", "thread", "fork", "spawn"),
        "auto",
        "Where the engine core runs: in a thread of the worker, or in a forked or a new process. "
        "`auto`: fork on a GPU, thread on a CPU.",
    ),
    Setting(
        "MAX_CONCURRENCY",
        "max_concurrency",
        whole(1, 100_000),
        None,
        "How many requests one worker runs at once; more wait their turn. If not set: no limit, on RunPod as "
        "many jobs as the engine batches and its KV cache holds, on Lambda what the environment may have.",
    ),
    Setting(
        "PLATFORM",
        "platform",
        choice(*PLATFORMS),
        None,
        "What brings the requests. If not set: found from the environment, else `http`.",
    ),
    Setting(
        "START_FAILURE",
        "start_failure",
        choice("exit", "answer"),
        None,
        "What a worker that can't start does: `exit` with a code, or stay and `answer` every request with "
        "why. If not set: `answer` on RunPod, which starts it again and bills each try, else `exit`.",
    ),
    Setting("HOST", "host", HOST, "127.0.0.1", "Address to listen on."),
    Setting("PORT", "port", whole(0, 65_535), "8000", "Port to listen on; 0 is any that is free."),
    Setting(
        "PORT_HEALTH",
        "port_health",
        whole(0, 65_535),
        None,
        "Another port, on which only the probes `/ping`, `/health` and `/ready` answer; not beside `UDS`. "
        "RunPod sets it.",
    ),
    Setting("UDS", "uds", SOCKET, None, "Listen on this unix socket, and on no address."),
    Setting(
        "API_KEY",
        "api_key",
        SECRET,
        None,
        "The key that clients send as `Authorization: Bearer ...`.",
        secret=True,
    ),
    Setting(
        "AUTH",
        "auth",
        SWITCH,
        "on",
        "`on`: whoever listens beyond this machine needs an `API_KEY`. "
        "`off`: no key is asked for, because something in front does.",
    ),
    Setting(
        "API_KEYS_SECRET",
        "api_keys_secret",
        AWS_SECRET,
        None,
        "On Lambda, the secret in Secrets Manager that holds the hashes of keys: docs/aws.md.",
    ),
    Setting(
        "USAGE_TABLE",
        "usage_table",
        AWS_TABLE,
        None,
        "On Lambda and SQS, the table of DynamoDB to which the tokens of each key are added: docs/aws.md.",
    ),
    Setting(
        "ENDPOINT_ID",
        "endpoint_id",
        ENDPOINT_ID,
        None,
        "On Lambda, the id in the URL `/v2/{ENDPOINT_ID}/openai/v1`. If not set: any.",
    ),
    Setting(
        "LAMBDA_RESPONSE_MODE",
        "lambda_response_mode",
        choice("stream", "buffered"),
        "stream",
        "How the function's URL or REST API is set up: it streams answers, or wants each whole.",
    ),
    Setting(
        "REPLY_TO",
        "reply_to",
        PLACES,
        "",
        "On Lambda and SQS, where the answers to messages may go. If not set: nowhere.",
    ),
    Setting(
        "SQS_QUEUE_URL",
        "sqs_queue_url",
        QUEUE,
        None,
        "The queue that `PLATFORM=sqs` takes messages from. Those that have a batch gone on with go there, "
        "on Lambda too.",
    ),
    Setting(
        "BATCH_INPUT",
        "batch_input",
        OBJECTS,
        None,
        "On Lambda and SQS, where batches are put: each `*.jsonl` under it is one. If not set: none is run. "
        "Together with it: `BATCH_OUTPUT`, `BATCH_TABLE` and `SQS_QUEUE_URL`; docs/aws.md.",
    ),
    Setting(
        "BATCH_OUTPUT",
        "batch_output",
        OBJECTS,
        None,
        "Where results of batches go, each to a folder of its own.",
    ),
    Setting(
        "BATCH_TABLE",
        "batch_table",
        AWS_TABLE,
        None,
        "The table of DynamoDB that says which worker has which batch; `USAGE_TABLE` will do.",
    ),
    Setting(
        "CORS_ORIGINS",
        "cors_origins",
        ORIGINS,
        "",
        "Web pages that may call from a browser. If not set: none.",
        ("ALLOWED_ORIGINS",),
    ),
    Setting("MAX_BODY_BYTES", "max_body_bytes", SIZE, "32MiB", "The largest request body; more is a 413."),
    Setting(
        "KEEP_ALIVE_S",
        "keep_alive_s",
        seconds(0, 600),
        "15",
        "A stream that is silent this long gets a comment, so that nothing on the way closes it; 0 is never.",
    ),
    Setting(
        "DRAIN_TIMEOUT_S",
        "drain_timeout_s",
        seconds(0, 3600),
        "30",
        "After SIGTERM, how long running requests may take to finish.",
    ),
    Setting(
        "LOG_LEVEL",
        "log_level",
        choice("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
        "INFO",
        "How much to log. Prompts, answers and keys are logged at no level.",
    ),
    Setting(
        "LIFELINE_FD",
        "lifeline_fd",
        whole(0, 2**20),
        None,
        "An inherited pipe: when its other end closes, the worker drains and exits. The gateway sets it.",
    ),
    Setting(
        "NOTIFY_SOCKET",
        "notify_socket",
        SOCKET,
        None,
        "Where to say `READY=1`, as sd_notify(3) does. systemd and the gateway set it.",
    ),
    Setting(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "otel_exporter_otlp_endpoint",
        URL,
        None,
        "Where OpenTelemetry's collector is: traces are posted to `/v1/traces` below it. Not set: none.",
    ),
    Setting(
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        "otel_exporter_otlp_traces_endpoint",
        URL,
        None,
        "The whole URL that traces are posted to, if it is another.",
    ),
    Setting(
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        "otel_exporter_otlp_protocol",
        choice("http/protobuf"),
        "http/protobuf",
        "How traces are posted.",
    ),
    Setting(
        "OTEL_SERVICE_NAME",
        "otel_service_name",
        NAME,
        "firsttoken-worker",
        "What traces call this worker.",
    ),
    Setting(
        "SHARED_BY",
        "shared_by",
        whole(1, 1024),
        "1",
        "On a CPU, how many workers share the cores and memory of this machine. The gateway sets it.",
    ),
    Setting(
        "LEVERS_OFF",
        "levers_off",
        some_of(*LEVERS),
        "",
        "For measurements: what a cold start is to do without.",
    ),
    Setting(
        "FOREIGN_NAMES",
        "foreign_names",
        NAMES,
        "",
        "Names that belong to another program here, though they are settings or flags, or look like one.",
    ),
)


ENGINE_FIELDS = (
    "model_name",
    "model_revision",
    "served_model_name",
    "tokenizer_name",
    "custom_chat_template",
    "hf_token",
    "engine_mode",
    "vllm_config_file",
    "vllm_extra_args",
    "otel_exporter_otlp_endpoint",
    "otel_exporter_otlp_traces_endpoint",
    "levers_off",
)
"""The settings that shape an engine, beside vLLM's flags."""

DEVICES = "CUDA_VISIBLE_DEVICES"
"""Which of the machine's GPUs a process sees. For a worker the gateway decides that."""


def rows(*names: str) -> Table:
    """The rows of the worker's table that are called `names`, for a table that shares them."""
    by_name = {row.name: row for row in TABLE}
    return tuple(by_name[name] for name in names)


@dataclass(frozen=True, slots=True)
class Settings:
    """The worker's settings; `TABLE` and `docs/settings.md` say what each means."""

    platform: str | None
    model_name: str
    model_revision: str | None
    served_model_name: str | None
    tokenizer_name: str | None
    custom_chat_template: str | None = field(repr=False)
    hf_token: str | None = field(repr=False)
    max_concurrency: int | None
    verify_weights: str
    engine_mode: str
    host: str
    port: int
    port_health: int | None
    uds: str | None
    api_key: str | None = field(repr=False)
    auth: bool
    api_keys_secret: str | None
    usage_table: str | None
    endpoint_id: str | None
    lambda_response_mode: str
    reply_to: tuple[str, ...]
    sqs_queue_url: str | None
    batch_input: str | None
    batch_output: str | None
    batch_table: str | None
    cors_origins: tuple[str, ...]
    max_body_bytes: int
    drain_timeout_s: float
    keep_alive_s: float
    log_level: str
    lifeline_fd: int | None
    notify_socket: str | None
    shared_by: int
    start_failure: str | None
    vllm_config_file: str | None
    vllm_extra_args: str | None = field(repr=False)
    otel_exporter_otlp_endpoint: str | None
    otel_exporter_otlp_traces_endpoint: str | None
    otel_exporter_otlp_protocol: str
    otel_service_name: str
    levers_off: tuple[str, ...]
    foreign_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """One line for each name that is set, accepted and does nothing."""
    rest: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """The environment without the settings above: flags of vLLM, and what is not ours."""

    @property
    def model_id(self) -> str:
        """The name that clients know the model by, never a path."""
        return self.served_model_name or public_name(self.model_name)

    def same_engine(self, other: Settings) -> bool:
        """Whether an engine configured for `other` serves these settings too, whichever GPUs it is given."""
        ours, theirs = ({**one.rest, DEVICES: ""} for one in (self, other))
        return ours == theirs and all(getattr(self, name) == getattr(other, name) for name in ENGINE_FIELDS)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """The settings that `environ` holds.

        Raises `BadSettings`, which names every fault and not only the first.
        """
        values, faults = read(TABLE, environ, others=UNREAD)
        wrong = (
            _unguarded(environ, **values),
            _no_queue(environ, **values),
            _no_batches(environ, **values),
        )
        faults += filter(None, wrong)
        if faults:
            raise BadSettings(faults)
        return cls(**values, notes=_notes(environ), rest=rest(environ))


def readable(environ: Mapping[str, str]) -> Settings:
    """The settings of `environ`, with the default for each that is wrong: enough to say what is wrong."""
    values, _ = read(TABLE, environ, others=UNREAD)
    defaults, _ = read(TABLE, {})
    usable = {name: defaults[name] if value is None else value for name, value in values.items()}
    if _unguarded(environ, **usable):  # the reason is not for everybody
        usable["api_key"] = secrets.token_urlsafe()
    return Settings(**usable)


def rest(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without the settings of the worker and without what is not ours."""
    taken = {name for row in TABLE for name in row.names}
    taken.add("LC_CTYPE")  # Python sets it, in a process that was given no locale (PEP 538)
    return {name: value.strip() for name, value in ours(environ).items() if name not in taken}


def _unguarded(
    environ: Mapping[str, str],
    *,
    platform: str | None,
    auth: bool | None,
    api_key: str | None,
    api_keys_secret: str | None,
    host: str | None,
    uds: str | None,
    **_: object,
) -> str | None:
    """Why everybody could ask this worker, if that was not said to be wanted."""
    if auth is not True or api_key is not None:
        return None
    if platform == "aws_lambda" or (platform is None and environ.get(LAMBDA)):
        if api_keys_secret is not None:
            return None
        return (
            "there is no key for those who call the function through a URL; set API_KEYS_SECRET or API_KEY, "
            "or AUTH=off if something in front of the function asks for a key"
        )
    if platform == "runpod" or (platform is None and environ.get(RUNPOD)):
        return None  # it asks for its jobs, and listens nowhere
    if host is None or uds is not None or _is_loopback(host):
        return None
    return (
        f"HOST={host} can be reached from other machines and there is no API_KEY; "
        "set API_KEY, or AUTH=off if something in front of the worker asks for a key"
    )


def _no_queue(environ: Mapping[str, str], *, platform: str | None, **_: object) -> str | None:
    """Why there is nothing to take messages from."""
    if platform == "sqs" and "SQS_QUEUE_URL" not in ours(environ):
        return "PLATFORM=sqs takes messages from a queue; set SQS_QUEUE_URL"
    return None


def _no_batches(
    environ: Mapping[str, str], *, batch_input: str | None, batch_output: str | None, **_: object
) -> str | None:
    """Why no batch could be run, though some are wanted, or why one would be made of what another writes."""
    given = ours(environ)
    if not any(name.startswith("BATCH_") and name in given for name in _FOR_BATCHES):
        return None
    if missing := [name for name in _FOR_BATCHES if name not in given]:
        return f"batches need {', '.join(_FOR_BATCHES)}; set {' and '.join(missing)}"
    if batch_input is None or batch_output is None:  # it was said what is wrong with it
        return None
    if batch_input.startswith(batch_output) or batch_output.startswith(batch_input):
        return (
            f"BATCH_INPUT={batch_input} and BATCH_OUTPUT={batch_output} lie in each other: "
            "what is written there would be taken for a batch"
        )
    return None


_FOR_BATCHES = ("BATCH_INPUT", "BATCH_OUTPUT", "BATCH_TABLE", "SQS_QUEUE_URL")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _notes(environ: Mapping[str, str]) -> tuple[str, ...]:
    given = rest(environ)
    notes = [f"{name} does nothing here: {why}" for name, why in UNREAD.items() if name in given]
    if given.get("MAX_NUM_BATCHED_TOKENS") == "0":
        notes.append("MAX_NUM_BATCHED_TOKENS=0 counts as not set")
    return tuple(notes)
