"""The capacity simulator against what queueing theory knows, and against itself."""

from __future__ import annotations

import json
import math
import random
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import simulate, traces
from bench.policies import Concurrency, Fixed, Policy, QueueDelay, ranked
from bench.simulator import Door, Outcome, Replica, Simulation
from bench.traces import Arrival, BadTrace, Sizes
from gateway.scaling import Scaler, Scaling, Seen

PATIENT = Door(queue_limit=10**6, queue_timeout_s=1e9)


def exponential(rate_per_s: float, number: int, seed: int, tokens: float | None) -> Iterator[Arrival]:
    """Requests at random times; their answers take a second on average, or `tokens` exactly."""
    rng = random.Random(seed)
    at_s = 1.0  # workers that start in no time are there
    for _ in range(number):
        at_s += rng.expovariate(rate_per_s)
        yield Arrival(at_s, 0.0, rng.expovariate(1.0) if tokens is None else tokens)


def queue(servers: int, load: float, tokens: float | None) -> float:
    """The mean wait of a queue before `servers` of one slot each, that make a token a second."""
    trace = list(exponential(load * servers, 60_000, 7, tokens))
    replica = Replica(cold_start_s=0.0, slots=1, token_s=1.0, token_more_s=0.0)
    out = Simulation(trace, Fixed(servers), replica, most=servers, door=PATIENT).run()
    assert len(out.waits_s) == len(trace)
    return mean(out.waits_s)


def erlang_c(servers: int, load: float) -> float:
    """The mean wait of M/M/c, in service times."""
    offered = load * servers
    busy = offered**servers / math.factorial(servers) / (1 - load)
    some = sum(offered**n / math.factorial(n) for n in range(servers))
    return busy / (some + busy) / (servers * (1 - load))


@pytest.mark.parametrize(("servers", "load"), [(1, 0.5), (1, 0.7), (4, 0.7)])
def test_random_answers_wait_as_erlang_says(servers: int, load: float) -> None:
    """M/M/1 and M/M/c."""
    assert queue(servers, load, None) == pytest.approx(erlang_c(servers, load), rel=0.08)


def test_equal_answers_wait_half_as_long() -> None:
    """M/D/1, by Pollaczek and Khinchin."""
    assert queue(1, 0.7, 1.0) == pytest.approx(0.7 / (2 * (1 - 0.7)), rel=0.05)


def test_slots_of_one_worker_are_as_many_workers_if_they_do_not_slow_each_other() -> None:
    """M/M/c again, this time in one worker."""
    trace = list(exponential(2.8, 60_000, 7, None))
    replica = Replica(cold_start_s=0.0, slots=4, token_s=1.0, token_more_s=0.0)
    out = Simulation(trace, Fixed(1), replica, most=1, door=PATIENT).run()
    assert mean(out.waits_s) == pytest.approx(erlang_c(4, 0.7), rel=0.08)


def test_a_worker_that_is_shared_is_slower() -> None:
    """Two answers of ten tokens: 1 s for a token alone, 1.5 s beside another."""
    replica = Replica(cold_start_s=0.0, slots=2, prefill_per_s=10.0, token_s=1.0, token_more_s=0.5)
    trace = [Arrival(1.0, 0.0, 10.0), Arrival(1.0, 0.0, 10.0)]
    assert Simulation(trace, Fixed(1), replica, most=1).run().length_s == pytest.approx(16.0)
    trace = [Arrival(1.0, 0.0, 10.0), Arrival(7.0, 0.0, 10.0)]  # 6 alone, 4 beside: at 13 s; then 6 alone
    assert Simulation(trace, Fixed(1), replica, most=1).run().length_s == pytest.approx(19.0)
    trace = [Arrival(1.0, 20.0, 1.0), Arrival(1.0, 30.0, 1.0)]  # prompts one after the other
    assert Simulation(trace, Fixed(1), replica, most=1).run().ttft_s == pytest.approx([2.0, 5.0])


def policies(most: int) -> dict[str, Policy]:
    """One of each."""
    return {name: make() for name, make in ranked(most, 4, 2).items()}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 40), st.integers(1, 400), st.integers(1, 400), st.sampled_from("abc")),
        min_size=1,
        max_size=80,
    ),
    st.sampled_from(sorted(policies(3))),
    st.integers(1, 20),
    st.sampled_from([0.5, 5.0, 40.0]),
)
def test_something_comes_of_every_request_once(
    gaps: list[tuple[float, int, int, str]], name: str, limit: int, cold_start_s: float
) -> None:
    """Whatever the trace and the policy: answered, refused or too late; never more workers than allowed."""
    trace, at_s = [], 0.0
    for gap_s, prompt, output, key in gaps:
        at_s += gap_s
        trace.append(Arrival(at_s, prompt, output, key))
    replica = Replica(cold_start_s=cold_start_s, slots=4, prefill_per_s=200.0, token_s=0.1)

    def run() -> Outcome:
        return Simulation(
            trace, policies(3)[name], replica, most=3, door=Door(limit, queue_timeout_s=30.0)
        ).run()

    out = run()
    assert len(out.waits_s) + out.refused + out.late == len(trace)
    assert out.left == 0
    assert out.most_workers <= 3
    assert all(0 <= wait_s <= 30.0 + 1e-6 for wait_s in out.waits_s)
    assert all(wait_s <= ttft_s for wait_s, ttft_s in zip(out.waits_s, out.ttft_s, strict=True))
    assert 0 < out.worker_s <= 3 * out.length_s + 1e-6
    assert out == run()


def test_a_cold_start_is_waited_for_and_paid() -> None:
    """The first request of all starts the first worker."""
    replica = Replica(cold_start_s=30.0, slots=1, prefill_per_s=1.0, token_s=1.0)
    out = Simulation([Arrival(10.0, 2.0, 3.0)], Scaler(Scaling(0, 1)), replica, most=1).run()
    assert (out.waits_s, out.ttft_s, out.cold_starts) == ([30.0], [32.0], 1)
    assert out.worker_s == pytest.approx(35.0)


def seen(waiting: int = 0, oldest_wait_s: float = 0.0, in_flight: int = 0, ready: int = 0) -> Seen:
    """What a policy sees."""
    return Seen(waiting, oldest_wait_s, in_flight, ready, 0, 4 * ready, 4, 60.0)


def test_the_others_decide_by_their_rules() -> None:
    """As they are described."""
    delay = QueueDelay(3)
    assert delay.decide(0, seen(waiting=1)).workers == 1
    assert delay.decide(10, seen(waiting=9, oldest_wait_s=3.9, ready=1)).workers == 1
    assert delay.decide(10.2, seen(waiting=9, oldest_wait_s=4.1, ready=1)).workers == 2
    assert delay.decide(12, seen(waiting=9, oldest_wait_s=5.9, ready=2)).workers == 2
    assert delay.decide(15, seen(waiting=9, oldest_wait_s=8.9, ready=2)).workers == 3
    assert delay.decide(16, seen(ready=3)).workers == 3
    assert delay.decide(22, seen(ready=3)).workers == 0
    target = Concurrency(2.0, most=5, window_s=4.0, down_s=10.0)
    assert target.decide(0, seen(waiting=1)).workers == 1
    assert target.decide(2, seen(in_flight=6, ready=1)).workers == 3
    assert target.decide(4, seen(in_flight=0, ready=3)).workers == 3, "two would do, for how long?"
    assert target.decide(14, seen(in_flight=0, ready=3)).workers == 0


@pytest.mark.parametrize("kind", traces.KINDS)
def test_a_generated_trace_has_its_rate_and_comes_again(kind: str) -> None:
    """And another seed is another one."""
    made = traces.generated(kind, 2.0, traces.DAY_S, 3, Sizes())
    assert made == traces.generated(kind, 2.0, traces.DAY_S, 3, Sizes())
    assert made != traces.generated(kind, 2.0, traces.DAY_S, 4, Sizes())
    assert len(made) / traces.DAY_S == pytest.approx(2.0, rel=0.02 if kind != "bursty" else 0.3)
    assert all(a.at_s <= b.at_s for a, b in pairwise(made))
    middle = sorted(one.prompt_tokens for one in made)[len(made) // 2]
    assert middle == pytest.approx(400, rel=0.05)


def test_traces_that_are_fetched(tmp_path: Path) -> None:
    """Azure's as it is downloaded, and ours, there and back."""
    file = tmp_path / "azure.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,110,27\n"
    )
    trace = traces.read(file)
    assert [(round(one.at_s, 6), one.prompt_tokens, one.output_tokens) for one in trace] == [
        (0.0, 4808, 10),
        (0.052, 110, 27),
    ]
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n"
        "2024-05-10 00:00:00+00:00,2162,5\n"
    )
    assert [one.at_s for one in traces.read(file)] == pytest.approx([0.0, 0.00993], abs=1e-5)
    made = traces.generated("poisson", 1.0, 60.0, 1, Sizes())
    traces.write(tmp_path / "ours.csv", made)
    first_s = made[0].at_s
    assert [one.at_s + first_s for one in traces.read(tmp_path / "ours.csv")] == pytest.approx(
        [one.at_s for one in made]
    )
    ours = "time_s,prompt_tokens,output_tokens\n"
    for wrong in ("a,b\n1,2\n", ours, f"{ours}x,1,1\n", f"{ours}1,nan,1\n"):
        file.write_text(wrong)
        with pytest.raises(BadTrace):
            traces.read(file)


def test_the_command_ranks_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table, a picture, and one line of JSON with the same."""
    svg = tmp_path / "ranking.svg"
    assert simulate.main(["--hours", "1", "--rate", "0.5", "--svg", str(svg)]) == 0
    out = capsys.readouterr().out
    told = json.loads(out.splitlines()[-1])
    assert told["requests"] > 0
    assert len(told["policies"]) == len(policies(3))
    for name, one in told["policies"].items():
        assert f"| {name} |" in out
        assert one["gpu_hours"] > 0
        assert one["wait_p50_s"] <= one["wait_p99_s"] <= one["ttft_p99_s"]
    texts = {one.text for one in ET.parse(svg).iter("{http://www.w3.org/2000/svg}text")}
    assert set(told["policies"]) <= texts
    assert simulate.main(["--trace", str(tmp_path / "none.csv")]) == 65


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trace", "diurnall"], "diurnall is none of poisson, diurnal, bursty, and no file: No such file"),
        (["--policy", "best"], "--policy best is in no name of ours, idle auto, "),
        (["--slots", "0"], "argument --slots: 0 is not above 0"),
        (["--max-workers", "-1"], "argument --max-workers: -1 is not above 0"),
        (["--svg", "/nowhere/ranking.svg"], "argument --svg: /nowhere is no folder"),
    ],
)
def test_a_slip_is_told_before_anything_is_simulated(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a line that names it, with a code of its own."""
    with pytest.raises(SystemExit) as ended:
        sys.exit(simulate.main(arguments))
    assert ended.value.code in {2, 64, 65}
    assert said in capsys.readouterr().err


def test_percentiles_are_of_values() -> None:
    """Nearest rank."""
    assert simulate.percentile([], 50) is None
    assert simulate.percentile([3, 1, 2], 50) == 2
    assert simulate.percentile(list(range(1, 101)), 99) == 99


def test_a_full_queue_has_workers_started_however_short_its_waits_are() -> None:
    """Who is turned away waits for ever: else a bound on the queue would keep its own workers away."""
    trace = [Arrival(100 + n / 10, 0.0, 10.0) for n in range(6000)]
    replica = Replica(cold_start_s=60.0, slots=4, token_s=0.1, token_more_s=0.0)
    out = Simulation(trace, Scaler(Scaling(1, 4)), replica, most=4, door=Door(queue_limit=8)).run()
    assert out.most_workers >= 3
    assert out.refused < 600, "those of one cold start"
