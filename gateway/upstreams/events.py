"""What happens to workers, as data: for the console, the log and the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Starting:
    """A worker is being started, for the `number`th time."""

    number: int


@dataclass(frozen=True, slots=True)
class Progress:
    """What the starting worker says it does."""

    text: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker takes requests, `took_s` after its start; `cold_start` is what it measured."""

    took_s: float
    cold_start: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StartFailed:
    """A worker could not start. `permanent`: it can't, until a person changes something."""

    reason: str
    exit_code: int
    permanent: bool
    again_in_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker that had been ready ended; `expected` if it was told to."""

    reason: str
    expected: bool


Event = Starting | Progress | Ready | StartFailed | Ended
