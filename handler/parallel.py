"""How many devices an engine has, known before vLLM is imported."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

_PARALLEL = {
    "tensor_parallel_size": ("--tensor-parallel-size", "-tp"),
    "pipeline_parallel_size": ("--pipeline-parallel-size", "-pp"),
    "data_parallel_size": ("--data-parallel-size", "-dp"),
}
"""vLLM's flags whose product is the number of devices of one engine."""


def devices_per_engine(environ: Mapping[str, str]) -> int:
    """How many devices an engine with the flags of `environ` has, as `handler.flags` reads them.

    A later source wins: VLLM_CONFIG_FILE, then VLLM_EXTRA_ARGS, then a name of the environment. What can't be
    read counts as 1; the worker says what is wrong with it.
    """
    number = 1
    for name, options in _PARALLEL.items():
        found = _in_file(environ.get("VLLM_CONFIG_FILE", ""), name)
        found += _in_words(environ.get("VLLM_EXTRA_ARGS", ""), options)
        found.append(environ.get(name.upper(), ""))
        sizes = [int(text) for text in map(str.strip, found) if text.isdecimal()]
        number *= max(1, sizes[-1]) if sizes else 1
    return number


def _in_file(path: str, name: str) -> list[str]:
    """A flat line of YAML will do: that is how vLLM's flags stand there."""
    with suppress(OSError):
        if path:
            pattern = rf"^\s*{name.replace('_', '[-_]')}\s*:\s*(\d+)"
            return re.findall(pattern, Path(path).read_text(errors="replace"), re.MULTILINE)
    return []


def _in_words(text: str, options: tuple[str, ...]) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError:
        return []
    found = []
    for word, following in pairwise([*words, ""]):
        option, joined, value = word.partition("=")
        if option.replace("_", "-") in options:
            found.append(value if joined else following)
    return found
