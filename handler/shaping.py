"""What of a start decides which caches it makes and finds."""

from __future__ import annotations

import hashlib
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping

from handler import loader

NOT_SHAPING = frozenset(
    {
        *("api_key", "chat_template", "config", "hf_token", "host", "model", "model_tag", "port", "revision"),
        *("served_model_name", "subparser", "tokenizer", "uds"),
        *(flag.replace("-", "_") for flag in loader.FLAGS),
    }
)
"""Flags (by `dest`) that no cache depends on, and secrets."""


def shaping(parser: ArgumentParser, args: Namespace, mode: str, environ: Mapping[str, str]) -> dict[str, str]:
    """What of a start decides which caches it makes and finds: flags that are not vLLM's default, as text.

    A value that is no plain word may hold a password: its digest stands for it. The C++ compiler that
    the environment names is in it too, because torch's keys have it even where nothing is compiled.
    """
    found = {
        name: _word(str(value))
        for name, value in vars(args).items()
        if name not in NOT_SHAPING and value != parser.get_default(name)
    }
    compiler = {name: environ[name] for name in ("CXX",) if environ.get(name)}
    return {**found, "engine_mode": mode, **compiler}


def _word(text: str) -> str:
    if re.fullmatch(r"[\w.-]{1,64}", text):
        return text
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
