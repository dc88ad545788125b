"""Who asks when: traces that are generated from a seed, and those that a user has fetched.

A file is CSV with a header, in one of two formats. Ours: `time_s,prompt_tokens,output_tokens`, and `key` if
there are several. Azure's, of its public traces of 2023 and 2024, as they are downloaded from
https://github.com/Azure/AzurePublicDataset (CC-BY): `TIMESTAMP,ContextTokens,GeneratedTokens`.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

DAY_S = 86_400.0
KINDS = ("poisson", "diurnal", "bursty")


class BadTrace(Exception):
    """The file is no trace; the message says where."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, `at_s` after the beginning."""

    at_s: float
    prompt_tokens: float
    output_tokens: float
    key: str = ""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long prompts and answers are: log-normal, by their medians and the deviation of the logarithm."""

    prompt: float = 400.0
    output: float = 150.0
    sigma: float = 1.0
    most: float = 8192.0

    def draw(self, rng: random.Random) -> tuple[float, float]:
        """A prompt's tokens and an answer's, both whole and at least one."""
        return self._one(self.prompt, rng), self._one(self.output, rng)

    def _one(self, median: float, rng: random.Random) -> float:
        return float(max(1, round(min(self.most, median * math.exp(self.sigma * rng.gauss(0, 1))))))


def generated(kind: str, per_s: float, length_s: float, seed: int, sizes: Sizes) -> list[Arrival]:
    """A trace of `length_s` with `per_s` requests a second on average.

    `poisson`: at a steady rate. `diurnal`: the rate swings from a tenth of the mean to 1.9 of it, once a day.
    `bursty`: silence for 10 minutes on average, then one minute on average at eleven times the mean.
    """
    rng = random.Random(seed)  # noqa: S311 - a trace that comes again, no secret
    times = {"poisson": _poisson, "diurnal": _diurnal, "bursty": _bursty}[kind](per_s, length_s, rng)
    return [Arrival(at_s, *sizes.draw(rng)) for at_s in times]


def _poisson(per_s: float, length_s: float, rng: random.Random, start_s: float = 0.0) -> Iterator[float]:
    at_s = start_s + rng.expovariate(per_s)
    while at_s < length_s:
        yield at_s
        at_s += rng.expovariate(per_s)


def _diurnal(per_s: float, length_s: float, rng: random.Random) -> Iterator[float]:
    peak = 1.9
    for at_s in _poisson(peak * per_s, length_s, rng):  # thinned to what the hour wants
        if rng.random() * peak < 1 - 0.9 * math.cos(2 * math.pi * at_s / DAY_S):
            yield at_s


def _bursty(per_s: float, length_s: float, rng: random.Random) -> Iterator[float]:
    silence_s, burst_s = 600.0, 60.0
    within = per_s * (silence_s + burst_s) / burst_s
    at_s = rng.expovariate(1 / silence_s)
    while at_s < length_s:
        end_s = min(length_s, at_s + rng.expovariate(1 / burst_s))
        yield from _poisson(within, end_s, rng, at_s)
        at_s = end_s + rng.expovariate(1 / silence_s)


def read(path: Path) -> list[Arrival]:
    """The trace in a file, from 0 s on and in order. Raises `BadTrace` and `OSError`."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.DictReader(file)
        names = set(lines.fieldnames or ())
        if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= names:
            parse = _azure
        elif {"time_s", "prompt_tokens", "output_tokens"} <= names:
            parse = _ours
        else:
            raise BadTrace(f"{path}: the first line names neither our columns nor Azure's")
        found = []
        for line in lines:
            try:
                found.append(parse(line))
            except (ValueError, TypeError):
                raise BadTrace(f"{path}: line {lines.line_num} is no request") from None
    if not found:
        raise BadTrace(f"{path} has no request")
    return _from_zero(found)


def _ours(line: Mapping[str, str]) -> Arrival:
    at_s, prompt, output = (float(line[name]) for name in ("time_s", "prompt_tokens", "output_tokens"))
    if not all(map(math.isfinite, (at_s, prompt, output))) or min(prompt, output) < 0:
        raise ValueError(line)
    return Arrival(at_s, prompt, output, line.get("key") or "")


def _azure(line: Mapping[str, str]) -> Arrival:
    text = line["TIMESTAMP"].replace("+00:00", "")
    seconds, _, fraction = text.partition(".")  # seven digits, of which Python reads six
    at = datetime.fromisoformat(seconds).replace(tzinfo=UTC).timestamp() + float(f"0.{fraction or 0}")
    return Arrival(at, float(line["ContextTokens"]), float(line["GeneratedTokens"]))


def _from_zero(found: Sequence[Arrival]) -> list[Arrival]:
    first_s = min(one.at_s for one in found)
    moved = (replace(one, at_s=one.at_s - first_s) for one in found)
    return sorted(moved, key=lambda one: one.at_s)


def write(path: Path, trace: Sequence[Arrival]) -> None:
    """Write `trace` down in our format."""
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(("time_s", "prompt_tokens", "output_tokens", "key"))
        lines.writerows((one.at_s, one.prompt_tokens, one.output_tokens, one.key) for one in trace)
