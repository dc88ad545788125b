"""Tables of settings: what a row is, what a value may be, how an environment is read.

The worker's table is in `handler.settings`, the gateway's in `gateway.settings`.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

NEAR = 0.92
"""How alike (`difflib`) an unknown name and a setting are before it is taken for a slip.

DRAIN_TIMEOUT for DRAIN_TIMEOUT_S is above it, gunicorn's KEEP_ALIVE is not KEEP_ALIVE_S.
"""

ORDINARY = frozenset(
    {"DEVICE_ID", "LOGLEVEL", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "SSL_CERT_FILE", "WORKER_CLASS"}
)
"""Names of other programs that are nearly one of ours: Ascend, torch, OpenTelemetry, OpenSSL, gunicorn."""

SOCKET_PATH_BYTES = 107
"""The longest path of a unix socket: `sun_path` in unix(7), less its closing zero."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value may be: in words, and as a function that raises `ValueError` otherwise.

    `names` are all there are of a choice, `low` and `high` the ends of a range: for forms.
    """

    allowed: str
    parse: Callable[[str], object]
    names: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """One row: an environment variable, the field it fills, what it may hold.

    `default` is written as it would be in the environment; None is "not set". `aliases`
    are other spellings, most of them worker-vllm's. A `secret` is never shown.
    """

    name: str
    field: str
    kind: Kind
    default: str | None
    help: str
    aliases: tuple[str, ...] = ()
    secret: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Every spelling, the one to use first."""
        return (self.name, *self.aliases)


Table = tuple[Setting, ...]


def read(
    table: Table, environ: Mapping[str, str], others: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The value of each field of `table`, and one line for each fault.

    A value that is at fault, or not set and without default, is None. `others` are names
    that are known though they are not in `table`: a name that is neither, and nearly one
    of `table`, is a fault.
    """
    environ = ours(environ)
    values: dict[str, Any] = {}
    faults: list[str] = []
    for row in table:
        # A template's own line ends are part of it; around anything else white space is a slip.
        strip = str if row.kind is TEXT else str.strip
        given = {name: strip(environ[name]) for name in row.names if name in environ}
        if len(set(given.values())) > 1:
            both = " and ".join(
                given if row.secret else (f"{name}={shown(text)}" for name, text in given.items())
            )
            faults.append(f"{both} are one setting with different values; keep {row.name}")
        name, text = next(iter(given.items()), (row.name, row.default))
        try:
            values[row.field] = None if text is None else row.kind.parse(text)
        except ValueError:
            values[row.field] = None
            what = f"{name} (not shown)" if row.secret or text is None else f"{name}={shown(text)}"
            faults.append(f"{what} is not allowed; allowed: {row.kind.allowed.replace('`', '')}")
    spellings = [name for row in table for name in row.names]
    faults += [
        f"{name} is not a setting; the nearest is {near}"
        for name in sorted(environ.keys() - {*spellings, *others, *ORDINARY})
        # Shorter names are a letter away from too many of other programs (PORT and POST).
        if len(name) >= 6 and (near := nearest(name, spellings, NEAR))
    ]
    return values, faults


def ours(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` less what is empty, and less what `FOREIGN_NAMES` says is not ours."""
    try:
        foreign = _names(environ.get("FOREIGN_NAMES", ""))
    except ValueError:
        foreign = ()
    return {name: value for name, value in environ.items() if name not in foreign and value.strip()}


def nearest(name: str, known: Iterable[str], alike: float) -> str | None:
    """The one of `known` that `name` is a slip of, or None.

    Slips are hardly ever in the first letter, and names of other programs often are ours
    with something in front (CONFIG_PATH, HF_CONFIG_PATH).
    """
    same_start = [other for other in known if other[:1] == name[:1]]
    return next(iter(difflib.get_close_matches(name, same_start, n=1, cutoff=alike)), None)


def shown(value: str) -> str:
    """`value` as a fault shows it: quoted, on one line, not endless."""
    return repr(value if len(value) <= 120 else f"{value[:117]}...")


def render_markdown(table: Table) -> str:
    """`table` as the table of a Markdown page."""
    lines = [
        "| Name | Default | Allowed | What it does | Other spellings |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in table:
        default = f"`{row.default}`" if row.default else "not set"
        aliases = ", ".join(f"`{alias}`" for alias in row.aliases)
        lines.append(f"| `{row.name}` | {default} | {row.kind.allowed} | {row.help} | {aliases} |")
    return "\n".join(lines) + "\n"


def public_name(model: str) -> str:
    """What to call `model` (an id, a folder or s3://bucket/prefix) in answers: never a path.

    A folder of Hugging Face's cache is called by its repository, another by its last part.
    """
    if not is_path(model) and not in_store(model):
        return model
    path = PurePosixPath(model.partition("://")[2] if in_store(model) else model)
    for part in path.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return path.name.strip(".") or "model"


def is_path(model: str) -> bool:
    """Whether `model` can only be a folder, as far as its spelling says."""
    return not in_store(model) and (model.startswith(("/", ".", "~")) or model.count("/") > 1)


STORES: Mapping[str, str] = {"s3://": "s3", "gs://": "gcs", "az://": "azure"}
"""Object stores that vLLM reads models from, and what Run:ai's streamer calls each."""


def in_store(model: str) -> bool:
    """Whether `model` is a prefix in an object store."""
    return model.startswith(tuple(STORES))


def matching(pattern: str, flags: int = re.ASCII) -> Callable[[str], str]:
    """A parser of what `pattern` matches as a whole."""
    compiled = re.compile(pattern, flags)

    def parse(value: str) -> str:
        if compiled.fullmatch(value) is None:
            raise ValueError(value)
        return value

    return parse


def choice(*names: str) -> Kind:
    """One of `names`, in upper or lower case."""

    def parse(value: str) -> str:
        return names[[name.lower() for name in names].index(value.lower())]

    return Kind(", ".join(f"`{name}`" for name in names), parse, names)


def some_of(*names: str) -> Kind:
    """Any of `names`, separated by commas."""
    one = choice(*names)

    def parse(value: str) -> tuple[object, ...]:
        return tuple(one.parse(item) for item in _list(value))

    return Kind(f"{one.allowed}; several separated by commas", parse)


def whole(low: int, high: int) -> Kind:
    """A whole number from `low` to `high`."""

    def parse(value: str) -> int:
        number = int(value)
        if not low <= number <= high:
            raise ValueError(value)
        return number

    return Kind(f"a whole number from {low} to {high}", parse, low=low, high=high)


def seconds(low: float, high: float) -> Kind:
    """Seconds from `low` to `high`, fractions too."""

    def parse(value: str) -> float:
        number = float(value)
        if not low <= number <= high:
            raise ValueError(value)
        return number

    return Kind(f"seconds from {low:g} to {high:g}", parse, low=low, high=high)


def auto_or(kind: Kind) -> Kind:
    """What `kind` allows, and `auto`, which is None."""

    def parse(value: str) -> object:
        return None if value.lower() == "auto" else kind.parse(value)

    return Kind(f"`auto`, or {kind.allowed}", parse, names=("auto",), low=kind.low, high=kind.high)


TRUE = frozenset({"true", "1", "yes", "on"})
FALSE = frozenset({"false", "0", "no", "off"})


def _switch(value: str) -> bool:
    if value.lower() not in TRUE | FALSE:
        raise ValueError(value)
    return value.lower() in TRUE


_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def size(high_gib: int) -> Kind:
    """A number of bytes from 1 KiB to `high_gib` GiB."""

    def parse(value: str) -> int:
        match = re.fullmatch(r"(\d+) ?([a-z]*)", value.lower(), re.ASCII)
        if match is None or match[2] not in _UNITS:
            raise ValueError(value)
        size_bytes = int(match[1]) * _UNITS[match[2]]
        if not 2**10 <= size_bytes <= high_gib * 2**30:
            raise ValueError(value)
        return size_bytes

    return Kind(f"from 1KiB to {high_gib}GiB: bytes, or with `KiB`, `MiB`, `GiB`, `KB`, `MB`, `GB`", parse)


_host_name = matching(r"(?=.{1,253}$)(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*")


def _host(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        return _host_name(value)


_repository = matching(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")
_bucket = matching(r"[a-z0-9]+://[a-z0-9][a-z0-9._-]+(/[^\x00-\x1f]*)?")
_folder = matching(r"(?![-~])(?!.*://)[^\x00-\x1f]+", 0)


def _model(value: str) -> str:
    if in_store(value):
        return _bucket(value)
    return _folder(value) if is_path(value) else _repository(value)


def _list(value: str) -> list[str]:
    items = json.loads(value) if value.startswith("[") else value.split(",")
    if not all(isinstance(item, str) for item in items):
        raise ValueError(value)
    return [item.strip() for item in items if item.strip()]


_origin = matching(r"\*|[a-z][a-z0-9+.-]*://[^/\s,*]+")
_variable = matching(r"[A-Za-z_][A-Za-z0-9_]*")


def _origins(value: str) -> tuple[str, ...]:
    return tuple(_origin(item.rstrip("/").lower()) for item in _list(value))


def _names(value: str) -> tuple[str, ...]:
    return tuple(_variable(item) for item in _list(value))


_queue = matching(r"https?://[^/\s,]+(/[^/\s,]+)+")


def _places(value: str) -> tuple[str, ...]:
    return tuple(_bucket(item) if item.startswith("s3://") else _queue(item) for item in _list(value))


def _objects(value: str) -> str:
    if not value.startswith("s3://"):
        raise ValueError(value)
    return _bucket(value).rstrip("/") + "/"


def _socket(value: str) -> str:
    if len(value.encode()) > SOCKET_PATH_BYTES:
        raise ValueError(value)
    return value


MODEL = Kind(
    "a Hugging Face id, a folder (`~` is not expanded), or `s3://bucket/prefix`, `gs://...`, `az://...`",
    _model,
)
NAME = Kind("at most 256 printable characters without spaces", matching(r"[\x21-\x7e]{1,256}"))
SECRET = Kind("printable characters without spaces", matching(r"[\x21-\x7e]+"))
TEXT = Kind("text", str)
SWITCH = Kind("`true`, `false`, `on`, `off`, `yes`, `no`, `1`, `0`", _switch)
SIZE = size(1)
HOST = Kind("an IP address or a host name", _host)
ORIGINS = Kind("`*`, or origins such as `https://app.example`, separated by commas", _origins)
ENDPOINT_ID = Kind(
    "at most 64 letters, digits, `-` and `_`, the first a letter or a digit",
    matching(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"),
)
AWS_SECRET = Kind("a name or an ARN", matching(r"[A-Za-z0-9/_+=.@:-]{1,2048}"))
AWS_TABLE = Kind("a name or an ARN", matching(r"[A-Za-z0-9_.:/-]{3,1024}"))
PLACES = Kind("URLs of queues, and `s3://bucket` or `s3://bucket/prefix`, separated by commas", _places)
OBJECTS = Kind("`s3://bucket/prefix/`", _objects)
QUEUE = Kind("the URL of a queue", _queue)
NAMES = Kind("names of environment variables, separated by commas", _names)
SOCKET = Kind(f"a path of at most {SOCKET_PATH_BYTES} bytes", _socket)
URL = Kind("a URL that begins with `http://` or `https://`", matching(r"https?://[^\s/]+\S*"))
YAML = Kind("a path that ends in `.yaml` or `.yml`", matching(r"(?s).+\.ya?ml"))
