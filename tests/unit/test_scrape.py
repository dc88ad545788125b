"""Workers' metrics beside the gateway's: one exposition, every family once, whatever a worker says."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from gateway.accounts.usage import Entry
from gateway.metrics import Metrics, Statuses
from gateway.scrape import ANSWER_MAX_BYTES, Target, render, scrape
from gateway.upstreams.events import Ended, Ready, StartFailed
from handler.errors import UpstreamFailed
from handler.messages import Call, Reply, Request, once

WORKER = b"""\
# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
# HELP vllm:prompt_tokens_total Prompt tokens.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="quote\\"d"} 7.0
# HELP vllm:prompt_tokens_created Prompt tokens.
# TYPE vllm:prompt_tokens_created gauge
vllm:prompt_tokens_created{engine="0",model_name="quote\\"d"} 1.79e+09
# HELP vllm:ttft_seconds Time.
# TYPE vllm:ttft_seconds histogram
vllm:ttft_seconds_bucket{le="0.1"} 1.0
vllm:ttft_seconds_bucket{le="+Inf"} 2.0
vllm:ttft_seconds_count 2.0
vllm:ttft_seconds_sum 0.5
# HELP odd One that has our labels already.
# TYPE odd gauge
odd{worker="3"} 1.0
# HELP process_open_fds Number of open file descriptors.
# TYPE process_open_fds gauge
process_open_fds 9.0
"""


def saying(text: bytes, status: int = 200) -> Call:
    """A worker that says `text`."""

    @asynccontextmanager
    async def call(request: Request) -> AsyncIterator[Reply]:
        assert (request.method, request.path) == ("GET", "/metrics")
        yield Reply(status, (), once(text))

    return call


@asynccontextmanager
async def hanging(_: Request) -> AsyncIterator[Reply]:
    """A worker that never answers."""
    await asyncio.Event().wait()
    yield Reply(200, (), once(b""))


@asynccontextmanager
async def gone(_: Request) -> AsyncIterator[Reply]:
    """A worker that has just ended."""

    async def broken() -> AsyncIterator[bytes]:
        raise UpstreamFailed("gone")
        yield b""  # type: ignore[unreachable] # what makes it a generator

    yield Reply(200, (), broken())


def saying_of(statuses: Sequence[Mapping[str, Any]] = ()) -> Statuses:
    """Whoever knows `statuses`."""

    async def known() -> Sequence[Mapping[str, Any]]:
        return statuses

    return known


def series(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every series of an exposition by name and labels; fails if one, or a family, is there twice."""
    families = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(families) == len(set(families)), families
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        assert family.type != "unknown", family.name
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def of(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    """The key of a series."""
    return name, frozenset(labels.items())


async def test_two_workers_stand_beside_the_gateway() -> None:
    """Each family once, each series with whose it is; the gateway's own has neither label."""
    metrics = Metrics()
    metrics.watch(saying_of(), lambda: [Target("a", "w1", saying(WORKER)), Target("b", "w1", saying(WORKER))])
    found = series((await metrics.exposition()).decode())
    for endpoint in ("a", "b"):
        labels = {"endpoint": endpoint, "worker": "w1"}
        assert found[of("vllm:num_requests_running", engine="0", model_name="m", **labels)] == 2
        assert found[of("vllm:prompt_tokens_total", engine="0", model_name='quote"d', **labels)] == 7
        assert found[of("vllm:ttft_seconds_bucket", le="+Inf", **labels)] == 2
        assert found[of("odd", exported_worker="3", **labels)] == 1
        assert found[of("process_open_fds", **labels)] == 9
        assert found[of("firsttoken_gateway_worker_scrapes_total", endpoint=endpoint, outcome="ok")] == 1
    assert found[of("process_open_fds")] > 0
    assert not [name for name, _ in found if name.endswith("_created")]


@pytest.mark.parametrize(
    ("call", "outcome"),
    [
        (hanging, "late"),
        (gone, "failed"),
        (saying(b"nothing of the kind", 500), "failed"),
        (saying(b"", 404), "failed"),
        (saying(b"a{ 1"), "failed"),
        (saying(b"\xff 1"), "failed"),
    ],
)
async def test_a_worker_that_says_nothing_useful_is_left_out(call: Call, outcome: str) -> None:
    """The others are there, and it is known which it was."""
    ill, well = await scrape([Target("a", "w1", call), Target("a", "w2", saying(WORKER))], timeout_s=0.5)
    assert (ill.outcome, ill.families) == (outcome, ())
    assert well.outcome == "ok"


async def test_an_answer_that_is_too_long_is_not_read_to_its_end() -> None:
    """An upstream is another's: it may say anything."""
    taken = 0

    async def lines() -> AsyncIterator[bytes]:
        nonlocal taken
        while taken < 8:
            taken += 1
            yield b"#" * (ANSWER_MAX_BYTES // 2)

    @asynccontextmanager
    async def long(_: Request) -> AsyncIterator[Reply]:
        yield Reply(200, (), lines())

    (said,) = await scrape([Target("a", "w1", long)])
    assert (said.outcome, taken) == ("failed", 3)


async def test_a_family_of_another_type_is_left_out() -> None:
    """The first to have a name decides what it is."""
    theirs = await scrape([Target("a", "w1", saying(b"# TYPE n gauge\nn 1\n"))])
    ours: list[Metric] = [CounterMetricFamily("n", "Ours.", value=2), GaugeMetricFamily("m", "m", value=1)]
    text = (await render(ours, theirs)).decode()
    assert series(text) == {of("n_total"): 2, of("m"): 1}


async def test_the_loop_has_its_turn_while_a_long_answer_is_read() -> None:
    """Streams are passed on meanwhile: no more than a few families at once."""
    many = "".join(f"# TYPE f{n} gauge\nf{n} 1\n" for n in range(400)).encode()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await render((), await scrape([Target("a", "w1", saying(many))]))
    counting.cancel()
    assert turns >= 200


async def test_state_is_what_the_endpoints_say_now() -> None:
    """States that nobody is in are told as 0; an endpoint that went away is not told."""
    metrics = Metrics()
    status = {
        "id": "a",
        "waiting": 3,
        "in_flight": 4,
        "capacity": 16,
        "workers": [{"state": state} for state in ("ready", "ready", "starting", "ended", "failed")],
        "jobs": {"IN_QUEUE": 5},
    }
    statuses = [status]
    metrics.watch(saying_of(statuses))
    found = series((await metrics.exposition()).decode())
    assert found[of("firsttoken_gateway_queue_depth", endpoint="a")] == 3
    assert found[of("firsttoken_gateway_outstanding", endpoint="a")] == 7
    assert found[of("firsttoken_gateway_capacity", endpoint="a")] == 16
    assert found[of("firsttoken_gateway_jobs", endpoint="a", state="IN_QUEUE")] == 5
    states = {
        dict(labels)["state"]: count for (name, labels), count in found.items() if name.endswith("_workers")
    }
    assert states == {"ready": 2, "starting": 1, "retiring": 0, "leaving": 0}
    statuses.clear()
    assert of("firsttoken_gateway_queue_depth", endpoint="a") not in series(
        (await metrics.exposition()).decode()
    )


async def test_what_happens_to_workers_is_counted() -> None:
    """Starts by outcome, ends by whether they were asked for, phases so that they add up."""
    metrics = Metrics()
    own = metrics.endpoint("a")
    phases = [
        {"name": "engine", "begin_s": 1.0, "end_s": 4.0},
        {"name": "weights", "begin_s": 2.0, "end_s": 3.5},
    ]
    own.tell(Ready("w", 9.0, {"total_s": 5.0, "phases": phases}))
    own.tell(StartFailed("w", "no", 70, permanent=False, again_in_s=1))
    own.tell(Ended("w", "killed", expected=False))
    found = series((await metrics.exposition()).decode())
    name = "firsttoken_gateway_cold_start_phase_seconds_total"
    spent = {dict(labels)["phase"]: value for (key, labels), value in found.items() if key == name}
    assert spent == {"other": 2.0, "engine": 1.5, "weights": 1.5}
    assert found[of("firsttoken_gateway_cold_start_seconds_sum", endpoint="a")] == 5
    starts = "firsttoken_gateway_worker_starts_total"
    assert found[of(starts, endpoint="a", outcome="ready")] == 1
    assert found[of(starts, endpoint="a", outcome="failed")] == 1
    assert found[of("firsttoken_gateway_worker_ends_total", endpoint="a", outcome="crashed")] == 1


async def test_names_of_phases_are_bounded() -> None:
    """A worker that makes names up does not make series without end."""
    metrics = Metrics()
    for number in range(200):
        phases = [{"name": f"made up {number}", "begin_s": 0.0, "end_s": 1.0}]
        metrics.endpoint("a").tell(Ready("w", 1.0, {"total_s": 1.0, "phases": phases}))
    found = series((await metrics.exposition()).decode())
    name = "firsttoken_gateway_cold_start_phase_seconds_total"
    spent = {dict(labels)["phase"]: value for (key, labels), value in found.items() if key == name}
    assert len(spent) == 65
    assert spent["other"] == 136


async def test_tokens_and_admissions_are_counted_by_endpoint() -> None:
    """By the answers' own word."""
    metrics = Metrics()
    own = metrics.endpoint("a")
    metrics.used(Entry("key_1", "a", "m", 10, 5, cost_nano=2_500_000_000))
    own.admitted("at_once")
    own.admitted("waited", 2.0)
    found = series((await metrics.exposition()).decode())
    assert found[of("firsttoken_gateway_prompt_tokens_total", endpoint="a", model="m")] == 10
    assert found[of("firsttoken_gateway_completion_tokens_total", endpoint="a", model="m")] == 5
    assert found[of("firsttoken_gateway_cost_total", endpoint="a", model="m")] == 2.5
    assert found[of("firsttoken_gateway_admissions_total", endpoint="a", outcome="full")] == 0
    assert found[of("firsttoken_gateway_held_seconds_count", endpoint="a")] == 1
    assert found[of("firsttoken_gateway_admissions_total", endpoint="a", outcome="at_once")] == 1
