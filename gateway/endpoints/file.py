"""`endpoints.toml`: the endpoints of one gateway.

    [[endpoint]]
    id = "chat"
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    max_workers = 2

    [endpoint.settings]
    MAX_MODEL_LEN = 4096
    HF_TOKEN = { env = "HF_TOKEN" }

A key is a setting of the gateway in lower case, and the environment has its default. `settings` are settings
of the endpoint's workers and flags of vLLM, by their names in an environment. Nothing in the file is optional
to get right: every fault is told at once, and where it is.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gateway.settings import TABLE, GatewaySettings
from handler import baked
from handler.errors import BadSettings
from handler.settings import TABLE as WORKER_TABLE
from handler.table import SWITCH, Setting, nearest, ours, read, shown
from handler.unread import UNREAD

NAMED = {"id": "ENDPOINT_ID", "model": "MODEL_NAME"}
"""Keys that are not called as their settings."""
KEPT = (
    *("SERVED_MODEL_NAME", "UPSTREAM", "UPSTREAM_URL", "UPSTREAM_KEY", "UPSTREAM_SLOTS", "UPSTREAM_METRICS"),
    *("START", "START_TIMEOUT_S", "WARM_PARENT"),
    *("MIN_WORKERS", "MAX_WORKERS", "IDLE_TIMEOUT_S"),
    *("QUEUE_LIMIT", "QUEUE_TIMEOUT_S", "EXECUTION_TIMEOUT_S", "KEEP_ALIVE_S"),
    *("PRICE_INPUT", "PRICE_OUTPUT"),
)
"""Settings that each endpoint may have its own of, beside those of `NAMED`."""
ROWS: Mapping[str, Setting] = {
    **{key: row for key, name in NAMED.items() for row in TABLE if row.name == name},
    **{row.name.lower(): row for row in TABLE if row.name in KEPT},
}
"""The keys of an endpoint, beside `settings`."""

OF_ONE_MODEL = frozenset(
    {
        *("ENDPOINT_ID", "MODEL_NAME", "MODEL_REVISION", "SERVED_MODEL_NAME"),
        *("TOKENIZER_NAME", "CUSTOM_CHAT_TEMPLATE"),
    }
)
"""What an environment says of its one model. Several have none of it in common."""
OF_THE_GATEWAY = frozenset(
    {
        *("HOST", "PORT", "PORT_HEALTH", "UDS", "API_KEY", "AUTH", "PLATFORM", "START_FAILURE"),
        *("LIFELINE_FD", "NOTIFY_SOCKET", "SHARED_BY"),
    }
)
"""Settings of a worker that a worker behind a gateway has from the gateway, or has no use for."""

NEAR = 0.6
"""How alike an unknown key and a known one are for it to be named. Every unknown key is a fault."""
SECRETS = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|CREDENTIALS?|(API|ACCESS|PRIVATE)_KEY)(_|$)")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Described:
    """An endpoint as it was described: the gateway's settings with its own, and its workers' environment."""

    settings: GatewaySettings
    environ: Mapping[str, str] = field(repr=False)
    shared_by: int | None = field(default=None, compare=False)
    """How many workers of all endpoints may share the machine; None if there is no other endpoint."""

    @property
    def id(self) -> str:
        """Its name in the URL."""
        return self.settings.endpoint_id


@dataclass(frozen=True, slots=True)
class Description:
    """All endpoints, and what a person should know of the file they stand in."""

    endpoints: tuple[Described, ...]
    notes: tuple[str, ...] = ()


def describe(environ: Mapping[str, str]) -> tuple[GatewaySettings, Description]:
    """The gateway that `environ` describes, and its endpoints: those of `ENDPOINTS_FILE`, if it is set.

    Raises `BadSettings`, which names every fault of both. A model in an object store is looked up there.
    """
    path = ours(environ).get("ENDPOINTS_FILE", "").strip()
    settings, faults = _read(environ, named=bool(path))
    description = Description(())
    try:
        if path:
            description = load(Path(path), environ)
        elif settings is not None:
            description = Description((Described(settings, environ),))
    except BadSettings as error:
        faults += error.faults
    if settings is None or faults:
        raise BadSettings(faults)
    return settings, description


def load(path: Path, environ: Mapping[str, str]) -> Description:
    """The endpoints that the file at `path` describes, for a gateway in `environ`.

    Raises `BadSettings`, which names every fault of the file and none of the environment.
    """
    try:
        tables = tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # as an editor of Windows writes it
    except OSError as error:
        why = f"{error.strerror}; it has to be a TOML file that this user may read"
        raise BadSettings([f"ENDPOINTS_FILE={path}: {why}"]) from None
    except (ValueError, RecursionError) as error:  # of numbers without end and brackets in brackets too
        raise BadSettings([f"{path}: no TOML: {error}"]) from None
    faults: list[str] = [
        f"{path}: {_unknown(key, ['endpoint'])}; every endpoint is a table [[endpoint]]"
        for key in tables.keys() - {"endpoint"}
    ]
    found = tables.get("endpoint", [])
    if not (isinstance(found, list) and all(isinstance(table, dict) for table in found)):
        faults.append(f"{path}: endpoint is no list of tables; write [[endpoint]] above each")
        found = []
    elif not found:
        faults.append(f"{path}: there is no endpoint; write at least one table [[endpoint]]")
    entries = [
        _Entry(f"{path}: {_place(number, table)}", table, environ) for number, table in enumerate(found)
    ]
    described = [entry.described() for entry in entries]
    faults += [fault for entry in entries for fault in entry.faults]
    faults += _twice(entries)
    if faults:
        raise BadSettings(faults)
    ignored = [
        f"{name} of the environment counts for nothing beside {path}"
        for name in sorted(ours(environ).keys() & _SPELLINGS_OF_ONE_MODEL)
    ]
    endpoints = [one for one in described if one is not None]
    total = sum(one.settings.max_workers for one in endpoints)
    return Description(
        tuple(replace(one, shared_by=total if len(endpoints) > 1 else None) for one in endpoints),
        (*ignored, *_open_secrets(path, entries)),
    )


def _read(environ: Mapping[str, str], *, named: bool = False) -> tuple[GatewaySettings | None, list[str]]:
    """The settings in `environ`, those included that a baked model means unless it is `named` elsewhere."""
    try:
        return GatewaySettings.from_environ(environ if named else {**environ, **baked.names(environ)}), []
    except BadSettings as error:
        return None, list(error.faults)


def _place(number: int, table: Mapping[str, Any]) -> str:
    named = f" {shown(table['id'])}" if isinstance(table.get("id"), str) else ""
    return f"endpoint {number + 1}{named}"


class _Entry:
    """One `[[endpoint]]`, and what is wrong with it."""

    def __init__(self, place: str, table: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self.place = place
        self.table = table
        self.faults: list[str] = []
        self.plain_secrets: list[str] = []
        self._environ = environ

    def described(self) -> Described | None:
        """The endpoint, or None if there are `faults`."""
        own = dict(self._own())
        for key in ("id", "model"):
            if key not in self.table:
                self._fault(f"{key} is missing; allowed: {_allowed(ROWS[key])}")
        settings = self.table.get("settings", {})
        if not isinstance(settings, dict):
            self._fault("settings is no table; write [endpoint.settings] above them")
            settings = {}
        workers = dict(self._of_workers(settings))
        if self.faults:
            return None
        return self._build(own, workers)

    def _build(self, own: Mapping[str, str], workers: Mapping[str, str]) -> Described | None:
        given = {**own, **workers}
        replaced = {
            name for row in (*TABLE, *WORKER_TABLE) if given.keys() & set(row.names) for name in row.names
        }
        common = {
            name: value
            for name, value in self._environ.items()
            if name not in replaced and name not in _SPELLINGS_OF_ONE_MODEL
        }
        environ = {**common, **given}
        settings, faults = _read(environ)
        if settings is None:
            common_faults = _read(self._environ, named=True)[1]
            self.faults += [f"{self.place}: {fault}" for fault in faults if fault not in common_faults]
            return None
        shared = {name for row in WORKER_TABLE for name in row.names}
        of_gateway = {row.name for row in ROWS.values()} - shared
        return Described(settings, {n: value for n, value in environ.items() if n not in of_gateway})

    def _own(self) -> Iterator[tuple[str, str]]:
        """The settings of the gateway that this endpoint has its own of."""
        for key, value in self.table.items():
            if key == "settings":
                continue
            if (row := ROWS.get(key)) is None:
                self._fault(_unknown(key, [*ROWS, "settings"]))
                continue
            text = self._value(row.name, value) if row.secret else _text(row, value)
            if row.secret and text is None:
                continue  # it was told why
            try:
                if text is None:
                    raise ValueError(value)
                row.kind.parse(text)
            except ValueError:
                given = key if row.secret else f"{key} = {_toml(value)}"
                self._fault(f"{given} is not allowed; allowed: {_allowed(row)}")
                continue
            yield row.name, text

    def _of_workers(self, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """The environment of its workers, as far as `settings` say."""
        values: dict[str, str] = {}
        for name, value in settings.items():
            if fault := _misplaced(name):
                self._fault(f"settings: {name} {fault}")
            elif (text := self._value(name, value)) is not None:
                values[name] = text
        known = {*UNREAD, *(name for row in TABLE for name in row.names)}
        _, faults = read(WORKER_TABLE, values, known)
        for fault in faults:
            self._fault(f"settings: {fault}")
        yield from values.items()

    def _value(self, name: str, value: object) -> str | None:
        if isinstance(value, dict) and value.keys() == {"env"} and isinstance(value["env"], str):
            if not (text := self._environ.get(value["env"])):
                self._fault(f'settings: {name} = {{ env = "{value["env"]}" }}, and {value["env"]} is not set')
            return text or None
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, str | int | float):
            if isinstance(value, str) and value and _is_secret(name):
                self.plain_secrets.append(name)
            return str(value)
        self._fault(
            f"settings: {name} is not allowed; allowed: a string, a number, true or false, "
            'or { env = "NAME" } for what the gateway\'s environment has under a name'
        )
        return None

    def _fault(self, fault: str) -> None:
        self.faults.append(f"{self.place}: {fault}")


_SPELLINGS_OF_ONE_MODEL = frozenset(
    name for row in (*TABLE, *WORKER_TABLE) if row.name in OF_ONE_MODEL for name in row.names
)


def _misplaced(name: str) -> str | None:
    """Why `name` is no setting of an endpoint's workers; None if it may be one."""
    if not _VARIABLE.fullmatch(name):
        return "is no name of a setting; allowed: capital letters, digits and _"
    for row in TABLE:
        if name in row.names:
            key = next((key for key, known in ROWS.items() if known.name == row.name), None)
            if key is not None:
                return f"is a key of its own; write {key} = ... in [[endpoint]]"
            if row.name not in {"FOREIGN_NAMES", "LOG_LEVEL"}:
                return "is the whole gateway's; set it in the gateway's environment"
    if name in OF_THE_GATEWAY:
        return "is not for a worker behind a gateway"
    return None


def _text(row: Setting, value: object) -> str | None:
    """`value` as the environment would have it, None if its type is wrong."""
    if isinstance(value, bool):
        return ("true" if value else "false") if row.kind is SWITCH else None
    if row.kind.low is not None and value not in row.kind.names:
        return str(value) if isinstance(value, int | float) else None
    return value if isinstance(value, str) and value.strip() else None


def _toml(value: object) -> str:
    """`value` as a person wrote it, more or less."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return shown(value) if isinstance(value, str) else str(value)[:120]


def _allowed(row: Setting) -> str:
    return "true, false" if row.kind is SWITCH else row.kind.allowed.replace("`", "")


def _unknown(key: str, known: Iterable[str]) -> str:
    near = nearest(key, known, NEAR)
    return f"{key} is no key" + (f"; the nearest is {near}" if near else f"; allowed: {', '.join(known)}")


def _twice(entries: Iterable[_Entry]) -> Iterator[str]:
    seen: set[str] = set()
    for entry in entries:
        name = entry.table.get("id")
        if isinstance(name, str):
            if name in seen:
                yield f"{entry.place}: id = {shown(name)} is another endpoint's too"
            seen.add(name)


def _is_secret(name: str) -> bool:
    return any(row.secret for row in (*TABLE, *WORKER_TABLE) if name in row.names) or bool(
        SECRETS.search(name)
    )


def _open_secrets(path: Path, entries: Iterable[_Entry]) -> Iterator[str]:
    """A warning for each secret that stands in a file which others can read."""
    if not path.stat().st_mode & 0o044:
        return
    for entry in entries:
        for name in entry.plain_secrets:
            yield (
                f"{entry.place}: settings: {name} stands in a file that others can read; "
                f'write {{ env = "{name}" }}, or chmod 600 {path}'
            )
