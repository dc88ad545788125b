"""Which caches a start will miss, found out before it does, and what that costs.

A start without them works; it says so, because the next one, or an image that holds them, is
faster. Figures: docs/coldstart.md.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Missing:
    """A cache that is not there: `name`, where it will be, and what this start pays."""

    name: str
    place: str
    cost: str

    def __str__(self) -> str:
        return f"no {self.name} in {self.place}: {self.cost}"


def missing(environ: Mapping[str, str], *, inspects: bool, compiles: bool, files: Path) -> Iterator[Missing]:
    """The caches that a start in `environ` lacks.

    `inspects`: vLLM looks at the model's class in a process of its own. `compiles`: the model is
    compiled. `files` is the list for read-ahead.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is not None and spec.origin:
        compiled = Path(importlib.util.cache_from_source(spec.origin))
        if not compiled.is_file():
            yield Missing(
                "compiled modules (.pyc)",
                str(compiled.parent),
                "Python compiles 5,000 modules, 10 to 20 s; `python -m compileall` makes them",
            )
    root = vllm_root(environ)
    if inspects and not any((root / "modelinfos").glob("*.json")):
        yield Missing(
            "model information", str(root / "modelinfos"), "vLLM imports itself once more, 8 to 17 s"
        )
    if compiles and not (root / "torch_compile_cache").is_dir():
        yield Missing(
            "compiled model", str(root / "torch_compile_cache"), "torch compiles it, 20 s to minutes"
        )
    if not files.is_file():
        yield Missing("list of files to read ahead", str(files), "3 to 4 s if the disk is cold")


def vllm_root(environ: Mapping[str, str]) -> Path:
    """Where vLLM keeps its caches."""
    home = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environ.get("VLLM_CACHE_ROOT") or Path(home) / "vllm").expanduser()
