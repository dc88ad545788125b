"""How many workers there should be, on a clock of the test's own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from hypothesis import given
from hypothesis import strategies as st

from gateway.scaling import IDLE_COLD_STARTS, IDLE_MIN_S, PATIENCE, Decision, Scaler, Scaling, Seen

COLD_S = 40.0
NOTHING = Seen(
    waiting=0, oldest_wait_s=0.0, in_flight=0, ready=0, starting=0, capacity=0, slots=8, cold_start_s=COLD_S
)
IDLE_S = IDLE_COLD_STARTS * COLD_S


def ready(workers: int, **more: float) -> Seen:
    """So many ready workers of eight slots each."""
    return replace(NOTHING, ready=workers, capacity=8 * workers, **more)  # type: ignore[arg-type]


def test_nothing_is_started_for_nobody() -> None:
    """Nor is it asked again."""
    assert Scaler(Scaling()).decide(0.0, NOTHING) == Decision(0)


def test_the_first_request_has_a_worker_started_at_once() -> None:
    """One, however many wait: what they need more is seen while it starts."""
    scaler = Scaler(Scaling(max_workers=4))
    assert scaler.decide(0.0, replace(NOTHING, waiting=100)).workers == 1


def test_what_the_starting_worker_will_take_has_no_other_started() -> None:
    """However long it waits."""
    scaler = Scaler(Scaling(max_workers=4))
    assert scaler.decide(0.0, replace(NOTHING, waiting=8, oldest_wait_s=99, starting=1)) == Decision(1)


def test_more_than_that_has_others_started_after_a_share_of_a_cold_start() -> None:
    """As many as the rest fills, and it is said when."""
    scaler = Scaler(Scaling(max_workers=9))
    seen = replace(NOTHING, waiting=8 + 17, oldest_wait_s=1.0, starting=1)
    early = scaler.decide(1.0, seen)
    assert early == Decision(1, PATIENCE * COLD_S - 1.0)
    assert scaler.decide(PATIENCE * COLD_S, replace(seen, oldest_wait_s=PATIENCE * COLD_S)).workers == 1 + 3


def test_a_queue_that_moves_has_nothing_started() -> None:
    """Nobody waits for as long as it would be worth a start."""
    scaler = Scaler(Scaling(max_workers=9))
    for second in range(1000):
        seen = ready(1, waiting=20, oldest_wait_s=3.0, in_flight=8)
        assert scaler.decide(float(second), seen).workers == 1


def test_there_are_never_more_than_the_most() -> None:
    """And those beyond go once the most is lowered."""
    scaler = Scaler(Scaling(max_workers=2))
    assert scaler.decide(0.0, ready(1, waiting=500, oldest_wait_s=500.0, in_flight=8)).workers == 2
    scaler.scaling = Scaling(max_workers=1)
    assert scaler.decide(1.0, ready(2, waiting=500, oldest_wait_s=500.0, in_flight=16)).workers == 1


def test_what_is_wanted_though_nobody_asks() -> None:
    """The least, and the first of START=now; not after starts have failed again and again."""
    scaler = Scaler(Scaling(min_workers=2, max_workers=3))
    assert scaler.decide(0.0, NOTHING).workers == 2
    assert scaler.decide(0.0, replace(NOTHING, given_up=True)).workers == 0
    assert scaler.decide(0.0, replace(NOTHING, given_up=True, waiting=1)).workers == 1
    assert Scaler(Scaling()).decide(0.0, replace(NOTHING, asked_for=1)).workers == 1


def test_an_idle_worker_goes_after_a_multiple_of_its_cold_start() -> None:
    """Counted from when it was needed last; the policy says when to ask."""
    scaler = Scaler(Scaling())
    scaler.decide(0.0, ready(1, in_flight=1))
    idle = scaler.decide(100.0, ready(1))
    assert idle == Decision(1, IDLE_S)
    assert scaler.decide(100.0 + IDLE_S - 0.1, ready(1)).workers == 1
    assert scaler.decide(100.0 + IDLE_S, ready(1)).workers == 0


def test_a_worker_that_nobody_asks_has_its_time_too() -> None:
    """From when it was ready: whoever wanted it may have left meanwhile."""
    scaler = Scaler(Scaling())
    scaler.decide(0.0, replace(NOTHING, starting=1))
    assert scaler.decide(1000.0, ready(1, newest_s=0.0)) == Decision(1, IDLE_S)
    assert scaler.decide(1000.0 + IDLE_S, ready(1, newest_s=IDLE_S)).workers == 0


def test_the_idle_timeout_is_a_setting() -> None:
    """Else it has a floor, for starts that are quick."""
    assert Scaling(idle_timeout_s=7).idle_after_s(COLD_S) == 7
    assert Scaling().idle_after_s(1.0) == IDLE_MIN_S
    assert Scaling().idle_after_s(COLD_S) == IDLE_COLD_STARTS * COLD_S


def test_workers_that_are_all_a_little_busy_become_fewer() -> None:
    """What counts is what the highest load of the timeout needs, not whether one is idle."""
    scaler = Scaler(Scaling(max_workers=4))
    scaler.decide(0.0, ready(4, in_flight=30))
    scaler.decide(10.0, ready(4, in_flight=8))
    assert scaler.decide(10.0 + IDLE_S - 1, ready(4, in_flight=8)).workers == 4
    assert scaler.decide(10.0 + IDLE_S, ready(4, in_flight=8)).workers == 1


def test_a_load_that_comes_and_goes_changes_nothing() -> None:
    """A wave that is shorter than the timeout neither starts nor stops a worker."""
    scaler = Scaler(Scaling(max_workers=4))
    for second in range(2000):
        load = 12 if second % 100 < 20 else 0
        assert scaler.decide(float(second), ready(2, in_flight=load)).workers == 2


def test_nothing_goes_while_somebody_waits_or_a_worker_starts() -> None:
    """A start has a reason, and who waits needs whoever there is."""
    scaler = Scaler(Scaling(max_workers=4))
    scaler.decide(0.0, ready(2))
    assert scaler.decide(9999.0, ready(2, waiting=1)).workers == 2
    assert scaler.decide(99999.0, ready(2, starting=1)).workers == 3


def test_another_endpoint_that_waits_for_the_devices_has_them_sooner() -> None:
    """After one cold start: less, and two endpoints would do nothing but start."""
    scaler = Scaler(Scaling())
    scaler.decide(0.0, ready(1, in_flight=1))
    scaler.decide(10.0, ready(1))
    assert scaler.decide(10.0 + COLD_S - 0.1, ready(1, pressed=True)).workers == 1
    assert scaler.decide(10.0 + COLD_S, ready(1, pressed=True)).workers == 0


@dataclass
class World:
    """Workers and requests that obey the policy: each worker starts in `cold_s` and has `slots`."""

    scaler: Scaler
    cold_s: float
    slots: int
    now_s: float = 0.0
    ready: int = 0
    newest_at_s: float = -math.inf
    starts_s: list[float] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    ends_s: list[float] = field(default_factory=list)
    changes: list[tuple[float, int]] = field(default_factory=list)

    def seen(self) -> Seen:
        """What the policy is told."""
        return Seen(
            waiting=len(self.arrivals_s),
            oldest_wait_s=self.now_s - self.arrivals_s[0] if self.arrivals_s else 0.0,
            in_flight=len(self.ends_s),
            ready=self.ready,
            starting=len(self.starts_s),
            capacity=self.ready * self.slots,
            slots=self.slots,
            cold_start_s=self.cold_s,
            newest_s=self.now_s - self.newest_at_s,
        )

    def step(self, lasts_s: float) -> float:
        """Let what is due happen, ask the policy and obey; returns when something is due next."""
        if come := sum(at_s <= self.now_s for at_s in self.starts_s):
            self.ready, self.newest_at_s = self.ready + come, self.now_s
        self.starts_s = [at_s for at_s in self.starts_s if at_s > self.now_s]
        self.ends_s = [at_s for at_s in self.ends_s if at_s > self.now_s]
        while self.arrivals_s and len(self.ends_s) < self.ready * self.slots:
            self.arrivals_s.pop(0)
            self.ends_s.append(self.now_s + lasts_s)
        seen = self.seen()
        decision = self.scaler.decide(self.now_s, seen)
        more = decision.workers - seen.ready - seen.starting
        if more:
            self.changes.append((self.now_s, more))
        self.starts_s += [self.now_s + self.cold_s] * max(0, more)
        self.ready += min(0, more)
        again_s = math.inf if decision.again_in_s is None else self.now_s + decision.again_in_s
        return min([again_s, *self.starts_s, *self.ends_s], default=math.inf)


@given(
    gaps_s=st.lists(st.floats(0.0, 400.0), min_size=1, max_size=40),
    lasts_s=st.floats(0.1, 60.0),
    cold_s=st.floats(0.5, 90.0),
    slots=st.integers(1, 8),
    most=st.integers(1, 5),
    least=st.integers(0, 2),
    timeout_s=st.none() | st.floats(1.0, 300.0),
)
def test_whatever_comes(
    gaps_s: list[float],
    lasts_s: float,
    cold_s: float,
    slots: int,
    most: int,
    least: int,
    timeout_s: float | None,
) -> None:
    """All is served, the bounds hold, no worker goes before its time, in the end the least is left."""
    scaling = Scaling(min(least, most), most, timeout_s)
    world = World(Scaler(scaling), cold_s, slots)
    arrivals_s = [sum(gaps_s[: end + 1]) for end in range(len(gaps_s))]
    served = 0
    for _ in range(20_000):
        due_s = world.step(lasts_s)
        served = len(arrivals_s)
        assert scaling.min_workers <= world.ready + len(world.starts_s) <= most
        next_s = min(due_s, arrivals_s[0] if arrivals_s else math.inf)
        if next_s == math.inf:
            break
        world.now_s = max(world.now_s, next_s)
        while arrivals_s and arrivals_s[0] <= world.now_s:
            world.arrivals_s.append(arrivals_s.pop(0))
    else:
        raise AssertionError("it never comes to rest")
    assert (served, world.arrivals_s, world.ends_s) == (0, [], [])
    assert world.ready == scaling.min_workers
    window_s = scaling.idle_after_s(cold_s)
    grown = [at_s + cold_s for at_s, more in world.changes if more > 0]
    for at_s, more in world.changes:
        if more < 0:
            assert all(at_s > ready_s + window_s - 1e-6 or ready_s > at_s for ready_s in grown)
