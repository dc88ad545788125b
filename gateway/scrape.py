"""The workers' own metrics beside the gateway's: asked for when somebody asks, and told under one roof."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from handler.errors import RequestError
from handler.messages import Call, Reply, Request

SCRAPE_TIMEOUT_S = 2.0
"""How long all workers together may take; Prometheus itself waits 10 s."""
ANSWER_MAX_BYTES = 4 << 20
AT_ONCE = 4
"""Families that are read or written before the loop has its turn: about 0.5 ms."""


@dataclass(frozen=True, slots=True)
class Target:
    """A ready worker that can be asked for `/metrics`."""

    endpoint: str
    worker: str
    call: Call = field(repr=False)


@dataclass(frozen=True, slots=True)
class Said:
    """What a worker said of itself. `outcome` is `ok`, `late` or `failed`; `families` has its labels."""

    target: Target
    outcome: str
    families: tuple[Metric, ...] = ()


async def scrape(targets: Iterable[Target], timeout_s: float = SCRAPE_TIMEOUT_S) -> list[Said]:
    """Ask every one of `targets`, all at once."""
    return list(await asyncio.gather(*(_ask(target, timeout_s) for target in targets)))


async def _ask(target: Target, timeout_s: float) -> Said:
    try:
        async with asyncio.timeout(timeout_s):
            async with target.call(Request("GET", "/metrics")) as reply:
                text = await _read(reply)
            if reply.status != 200 or len(text) > ANSWER_MAX_BYTES:
                return Said(target, "failed")
            return Said(target, "ok", await _parse(text, target))
    except TimeoutError:
        return Said(target, "late")
    except (RequestError, ValueError):  # it went away, or it says what nobody can read
        return Said(target, "failed")


async def _read(reply: Reply) -> bytes:
    """The body of `reply`; of one that is too long not much more than may be."""
    text = bytearray()
    async for chunk in reply.frames:
        text += chunk
        if len(text) > ANSWER_MAX_BYTES:
            break
    return bytes(text)


async def _parse(text: bytes, target: Target) -> tuple[Metric, ...]:
    """The families of `text`; each of their series says whose it is."""
    own = {"endpoint": target.endpoint, "worker": target.worker}
    found = []
    for family in text_string_to_metric_families(text.decode()):
        if family.name.endswith("_created"):  # when each series began: half of them all, and nobody asks
            continue
        # As Prometheus does where a label of a target is one of a series too.
        family.samples = [
            sample._replace(
                labels={(f"exported_{k}" if k in own else k): v for k, v in sample.labels.items()} | own
            )
            for sample in family.samples
        ]
        found.append(family)
        if len(found) % AT_ONCE == 0:
            await asyncio.sleep(0)
    return tuple(found)


async def render(ours: Iterable[Metric], said: Iterable[Said]) -> bytes:
    """`ours` and what workers said, each family once; one whose type is another's is left out."""
    merged: dict[str, Metric] = {}
    for family in (*ours, *(family for one in said for family in one.families)):
        first = merged.setdefault(family.name, family)
        if first is not family and first.type == family.type:
            first.samples = [*first.samples, *family.samples]
    written = []
    for number, family in enumerate(merged.values(), 1):
        family.samples = [s for s in family.samples if s.name != f"{family.name}_created"]
        written.append(generate_latest(_One(family)))
        if number % AT_ONCE == 0:
            await asyncio.sleep(0)
    return b"".join(written)


class _One(Collector):
    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)
