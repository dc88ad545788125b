"""What happens to workers, as data: for the console, the log and the metrics.

`worker` is the id of the worker that it happens to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Starting:
    """A worker is being started, the `number`th of its pool."""

    worker: str
    number: int


@dataclass(frozen=True, slots=True)
class Progress:
    """What the starting worker says it does."""

    worker: str
    text: str


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker takes requests, `took_s` after its start; `cold_start` is what it measured."""

    worker: str
    took_s: float
    cold_start: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StartFailed:
    """A worker could not start. `permanent`: it can't, until a person changes something."""

    worker: str
    reason: str
    exit_code: int
    permanent: bool
    again_in_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker that had been ready ended; `expected` if it was told to."""

    worker: str
    reason: str
    expected: bool


@dataclass(frozen=True, slots=True)
class KeyRefused:
    """An upstream that others run refuses the key that it is asked with."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class KeyTaken:
    """It takes the key again."""

    worker: str


Event = Starting | Progress | Ready | StartFailed | Ended | KeyRefused | KeyTaken
