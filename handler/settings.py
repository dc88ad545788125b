"""Every setting of the worker: one table, read from an environment that is passed in.

`Settings.from_environ(environ)` reports all faults at once. A setting that is empty
counts as not set. What is in the environment beside the table are either flags of
vLLM in UPPER_SNAKE (`handler.flags` reads those, against vLLM's own parser) or names
of other programs.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from handler.errors import BadSettings

Table = tuple["Setting", ...]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PLATFORMS = ("http",)
"""Platforms that this version can serve, in the order in which they are detected."""

TRUE = frozenset({"true", "1", "yes", "on"})
FALSE = frozenset({"false", "0", "no", "off"})


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of a table: an environment variable and what it may hold.

    `parse` raises `ValueError` for what `allowed` does not describe. The value of a
    `secret` is never shown. `aliases` are other spellings, most of them worker-vllm's.
    """

    name: str
    field: str
    parse: Callable[[str], object]
    default: object
    help: str
    allowed: str
    aliases: tuple[str, ...] = ()
    secret: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """The worker's settings; see `TABLE` for what each means, and `docs/settings.md`."""

    platform: str | None
    model_name: str
    model_revision: str | None
    served_model_name: str | None
    tokenizer_name: str | None
    custom_chat_template: str | None = field(repr=False)
    hf_token: str | None = field(repr=False)
    max_concurrency: int | None
    engine_mode: str
    host: str
    port: int
    uds: str | None
    api_key: str | None = field(repr=False)
    auth: bool
    cors_origins: tuple[str, ...]
    max_body_bytes: int
    drain_timeout_s: float
    keep_alive_s: float
    log_level: str
    lifeline_fd: int | None
    notify_socket: str | None
    start_failure: str
    vllm_config_file: str | None
    vllm_extra_args: str | None = field(repr=False)
    foreign_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """Warnings worth a line in the log: names that are accepted and do nothing."""
    rest: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """The environment without the settings above: vLLM's flags, and what is not ours."""

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
