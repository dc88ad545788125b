"""How long a cold start will take, in parts, and what each figure is worth.

A part is `measured` where this very model's start was, when it was baked; `cited` where a figure of
another start stands for it; `assumed` where it is a number by a rate that nobody has measured here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MEASURED, CITED, ASSUMED = "measured", "cited", "assumed"

READ_GB_PER_S = 1.0
"""What a disk or a network volume is taken for where nobody says. Mapped from the local disk of our tests,
with a cold page cache, weights took 1.5 (docs/coldstart.md); network volumes give less."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a start."""

    name: str
    seconds: float
    basis: str
    """`measured`, `cited` or `assumed`."""
    why: str


@dataclass(frozen=True, slots=True)
class Start:
    """A start on one kind of machine."""

    on: str
    parts: Sequence[Part]
    overlap: bool
    """Whether the weights are read while Python imports: only the longer of the two counts."""

    @property
    def total_s(self) -> float:
        """From the start of the process to the first token."""
        imports, weights, *rest = (part.seconds for part in self.parts)
        return (max(imports, weights) if self.overlap else imports + weights) + sum(rest)


IMPORTS = Part("process and imports", 2.0, CITED, "docs/coldstart.md, two CPU cores, warm caches")
ON_CPU = Part("engine, first token", 1.9, CITED, "docs/benchmarks.md, SmolLM2 without its imports")
ON_GPU = Part("engine, first token", 34.1, CITED, "vllm-project/vllm#20264; not compiled, 43 s more (#44881)")
"""Of a model of 3.4 GiB, whose compiled form was in the cache."""
AT_BAKE = "when it was baked"


def starts(
    weights_bytes: int, *, at_hand: bool, read_gb_per_s: float | None, baked: Mapping[str, Any]
) -> list[Start]:
    """What a start of a model with `weights_bytes` is expected to take, on a GPU and on a CPU.

    Where a bake has the phases of its own start, `baked`, there is one, on the machine that baked it.
    `at_hand`: the files are on the machine before it starts. `read_gb_per_s` None is the default.
    """
    rate = read_gb_per_s or READ_GB_PER_S
    where = "while Python imports" if at_hand else "after the imports"
    read = Part("weights", weights_bytes / 1e9 / rate, ASSUMED, f"{rate:g} GB/s (--read-gb-per-s), {where}")
    if measured := _measured(baked):
        imports, weights, engine = measured
        again = read if read_gb_per_s else weights
        return [Start(AT_BAKE, [imports, again, engine], overlap=False)]
    return [
        Start("GPU", [IMPORTS, read, ON_GPU], overlap=at_hand),
        Start("CPU", [IMPORTS, read, ON_CPU], overlap=at_hand),
    ]


def _measured(baked: Mapping[str, Any]) -> tuple[Part, Part, Part] | None:
    """The parts of a bake's own start: its manifest has the seconds of each phase, some inside others."""
    phases = baked.get("phases")
    if not isinstance(phases, dict) or "engine" not in phases:
        return None
    weights = phases.get("weights", 0.0)
    engine = sum(phases.get(name, 0.0) for name in ("engine", "application", "first token"))
    return (
        Part(IMPORTS.name, baked["total_s"] - engine, MEASURED, AT_BAKE),
        Part("weights", weights, MEASURED, AT_BAKE),
        Part(ON_CPU.name, engine - weights, MEASURED, AT_BAKE),
    )
