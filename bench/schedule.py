"""Which start comes when, and how long all of them will take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from bench.start import Variant

EXPECTED_S: Mapping[str, float] = {"vllm": 30.0, "worker": 6.0, "fork": 1.0}
"""A start of each kind with warm caches, on two cores; until one was measured."""
FACTORS: Mapping[str, float] = {"warm": 1.0, "dropped": 1.5, "empty": 1.8, "nopyc": 3.0}
"""How much longer it takes in each mode."""
STOP_S = 3.0
"""What the end of a server takes, and what is done between two starts."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One start of `variant` in `mode`. Round 0 fills the caches, and is measured for nothing else."""

    mode: str
    round: int
    variant: Variant


def first_turns(variants: Sequence[Variant]) -> list[Turn]:
    """One start of each, after which the caches are warm. A fork has those of its parent."""
    return [Turn("warm", 0, variant) for variant in variants if variant.kind != "fork"]


def turns(mode: str, variants: Sequence[Variant], rounds: int) -> list[Turn]:
    """Every measured start in `mode`: in each round one of each variant, each next round the other way.

    A fork is made with warm caches only: whatever lacks, its parent has paid for it.
    """
    able = [variant for variant in variants if variant.kind != "fork" or mode == "warm"]
    return [
        Turn(mode, number, variant)
        for number in range(1, rounds + 1)
        for variant in able[:: 1 if number % 2 else -1]
    ]


@dataclass(slots=True)
class Outlook:
    """How long what is left will take, the better known the more was made."""

    _took_s: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def note(self, turn: Turn, took_s: float) -> None:
        """One turn, its end included, took `took_s` seconds."""
        self._took_s.setdefault((turn.mode, turn.variant.name), []).append(took_s)

    def left_s(self, todo: Iterable[Turn]) -> float:
        """What the turns in `todo` will take, by those that were made, else by what is usual."""
        return sum(
            median(took_s)
            if (took_s := self._took_s.get((turn.mode, turn.variant.name)))
            else EXPECTED_S[turn.variant.kind] * FACTORS[turn.mode] + STOP_S
            for turn in todo
        )
