"""Buckets of several gateways (`gateway.accounts.limits`), on clocks that tests set, over rows in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.accounts.keys import Key
from gateway.accounts.levels import KEPT_S
from gateway.accounts.limits import MINUTE_S, TELL_S, Bucket, BucketId, Level, Limits
from handler.errors import RateLimited

NAME: BucketId = ("key_a", "tokens")
EPSILON = 1e-6


@dataclass
class World:
    """The time, the database, and the one bucket that a single gateway would have."""

    per_minute: int
    now_s: float = 0.0
    rows: dict[BucketId, Level] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)
    """The numbers of what was taken, as far as the database knows of it."""
    taken: list[tuple[float, int]] = field(default_factory=list)
    gateways: list[Gateway] = field(default_factory=list)
    heard_after_s: float = 0.0
    """How long it has taken at most until somebody heard of something."""

    def __post_init__(self) -> None:
        self.truth = Bucket(self.per_minute, self.now_s)

    def database_s(self) -> float:
        """What the database's clock shows: nobody else's time."""
        return self.now_s + 1e6


class Gateway:
    """One of several, whose exchange with the database can be stopped anywhere."""

    def __init__(self, world: World, ahead_s: float) -> None:
        self.world = world
        self.clock: Callable[[], float] = lambda: world.now_s + ahead_s
        self.key = Key("key_a", "a", b"", tokens_per_minute=world.per_minute)
        self.hurried = False
        self.unheard = 0
        """What was taken, and it does not know of."""
        world.gateways.append(self)
        self._going: tuple[dict[BucketId, Bucket], set[int]] | None = None
        self._done: tuple[Mapping[BucketId, Level], dict[BucketId, int], set[int]] | None = None
        self.restart()

    def restart(self) -> None:
        """Be killed and come back: what was not told is lost, and what the database knows is read."""
        self.limits = Limits(self.clock)
        self.limits.hurry = lambda: setattr(self, "hurried", True)
        self.knows: set[int] = set()
        self.unheard = sum(tokens for _, tokens in self.world.taken)
        self._mine: set[int] = set()
        self._going = self._done = None
        self.exchange()

    def ask(self, tokens: int) -> bool:
        """Let one request in, which uses so many, or not."""
        try:
            self.limits.take(self.key)
        except RateLimited:
            return False
        self.spend(tokens)
        return True

    def spend(self, tokens: int) -> None:
        """Take so many, of a request that was let in."""
        self.limits.spend(self.key, tokens)
        self.world.truth.take(tokens, self.world.now_s)
        number = len(self.world.taken)
        self.world.taken.append((self.world.now_s, tokens))
        self.knows.add(number)
        self._mine.add(number)
        for other in self.world.gateways:
            other.unheard += tokens if other is not self else 0

    def begin(self) -> None:
        """Look what is to be told; a begun exchange that was not done has failed."""
        self._going, self._done = (self.limits.untold(), set(self._mine)), None

    def commit(self) -> None:
        """Have it done in the database."""
        if self._going is None:
            return
        (taken, mine), self._going = self._going, None
        told = {name: bucket.untold for name, bucket in taken.items()}
        now_s, database_s = self.clock(), self.world.database_s()
        rows = self.world.rows
        levels = {n: Level(r.since_s, r.taken, r.full_s - database_s + now_s) for n, r in rows.items()}
        for name, bucket in taken.items():
            levels[name] = bucket.tell(levels.get(name), now_s, database_s)
        if taken:
            self.world.rows = {
                n: Level(one.since_s, one.taken, one.full_s - now_s + database_s)
                for n, one in levels.items()
                if one.full_s >= now_s - KEPT_S
            }
        self.world.told |= mine
        self._mine -= mine
        self._done = levels, told, set(self.world.told)

    def hear(self) -> None:
        """Learn that it was done, and what it said."""
        if self._done is None:
            return
        (levels, told, said), self._done = self._done, None
        self.limits.hear(levels, told)
        for number in said - self.knows:
            taken_s, tokens = self.world.taken[number]
            after_s = self.world.now_s - taken_s
            self.unheard -= tokens
            self.world.heard_after_s = max(self.world.heard_after_s, after_s)
        self.knows |= said
        self.hurried = False

    def exchange(self) -> None:
        """All of it at once."""
        self.begin()
        self.commit()
        self.hear()

    def level(self) -> float:
        """What its clients are told they have."""
        bucket = self.limits._bucket(*NAME, self.world.per_minute, self.clock())
        assert bucket is not None
        return bucket.level(self.clock())


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "spend", "exchange", "begin", "commit", "hear", "restart"]),
        st.integers(0, 2),
        st.sampled_from([0.0, 0.01, 0.3, 1.0, 7.0]) | st.floats(0, 200),
        st.integers(0, 60),
    ),
    max_size=60,
)
TELLING = STEPS.map(lambda steps: [step for step in steps if step[0] != "restart"])


@given(st.integers(1, 100), STEPS)
def test_no_gateway_gives_more_than_one_alone_but_for_what_it_has_not_heard(
    per_minute: int, steps: list[tuple[str, int, float, int]]
) -> None:
    """However late, in whatever order and however often anything is told, or not told at all."""
    world = World(per_minute)
    gateways = [Gateway(world, ahead_s) for ahead_s in (0.0, 500.0, 12345.6)]
    for what, number, pause_s, tokens in steps:
        world.now_s += pause_s
        one = gateways[number]
        match what:
            case "ask":
                before = world.truth.level(world.now_s)
                if one.ask(tokens):
                    assert before + one.unheard >= 1 - EPSILON
            case "spend":
                one.spend(tokens)
            case _:
                getattr(one, what)()
        for each in gateways:
            assert each.level() <= world.truth.level(world.now_s) + each.unheard + EPSILON


@given(st.integers(1, 100), TELLING, st.sampled_from([0.0, 1.0, 30.0]))
def test_once_all_is_told_each_has_what_one_alone_would_have(
    per_minute: int, steps: list[tuple[str, int, float, int]], pause_s: float
) -> None:
    """But for what would have flowed in while it was on its way: a bucket that was full had no use for it."""
    world = World(per_minute)
    gateways = [Gateway(world, ahead_s) for ahead_s in (0.0, 500.0, 12345.6)]
    for what, number, step_s, tokens in steps:
        world.now_s += step_s
        getattr(gateways[number], what)(*[tokens] if what in {"ask", "spend"} else [])
    for one in (*gateways, *gateways):  # the second time they hear what the later ones have told
        one.exchange()
        one.exchange()
    world.now_s += pause_s
    truth, late_s = world.truth.level(world.now_s), world.heard_after_s
    for one in gateways:
        assert one.unheard == 0
        assert truth - late_s * per_minute / MINUTE_S - EPSILON <= one.level() <= truth + EPSILON


@given(
    st.lists(st.tuples(st.integers(0, 1), st.floats(0, 0.4)), min_size=5, max_size=50),
    st.integers(60, 600),
)
def test_who_asks_all_the_time_gets_the_limit_and_no_more(
    arrivals: list[tuple[int, float]], per_minute: int
) -> None:
    """Of two gateways, wherever it asks: a minute's worth, what flows in, and what one has not heard of."""
    world = World(per_minute)
    gateways = [Gateway(world, 0.0), Gateway(world, 77.0)]
    last_s = [0.0, 0.5]
    got = most = 0
    for number, pause_s in arrivals * 12:
        world.now_s += pause_s
        for n, one in enumerate(gateways):
            if one.hurried or world.now_s - last_s[n] >= TELL_S:
                one.exchange()
                last_s[n] = world.now_s
        most = max(most, gateways[number].unheard)
        while gateways[number].ask(1):
            got += 1
    per_s = per_minute / MINUTE_S
    assert per_minute + world.now_s * per_s - 1 - 3 * TELL_S * per_s <= got
    assert got <= per_minute + world.now_s * per_s + most
    assert most <= per_minute + 2 * TELL_S * per_s, "no more than the other could let in at once"


@pytest.mark.parametrize(("number", "limited"), [(1, False), (2, True)])
def test_what_flows_in_as_it_is_taken_is_told_too(number: int, *, limited: bool) -> None:
    """A bucket that is full at every look may be emptied by two."""
    world = World(6000)
    gateways = [Gateway(world, 0.0) for _ in range(number)]
    refused = 0
    for tick in range(200 * 60):
        world.now_s += 0.01
        for one in gateways:
            refused += not one.ask(1) if tick % 10 else 0
            if tick % 100 == 0:
                assert one.level() > 5900 or limited
                one.exchange()
    assert bool(refused) == limited
    assert sum(n for _, n in world.taken) <= 6000 + 120 * 100 + 2 * 100


def test_a_gateway_that_comes_back_finds_the_bucket_as_it_is() -> None:
    """And not a full one."""
    world = World(60)
    one = Gateway(world, 5.0)
    one.spend(90)
    one.exchange()
    world.now_s += 10
    one.restart()
    assert one.level() == pytest.approx(-20)


def test_retry_after_of_one_is_true_at_the_other() -> None:
    """What it says is neither too short nor too long, whoever is asked then."""
    world = World(60)
    here, there = Gateway(world, 0.0), Gateway(world, 33.0)
    here.spend(40)
    there.spend(25)
    for one in (here, there, here):
        one.exchange()
    with pytest.raises(RateLimited) as refused:
        here.limits.take(here.key)
    assert refused.value.headers == (("retry-after", "6"),)
    world.now_s += 5.9
    assert not here.ask(1)
    assert not there.ask(1)
    world.now_s += 0.1 + EPSILON
    assert there.ask(1)


def test_an_outage_refuses_nobody_who_has_kept_to_the_limit() -> None:
    """What was asked of one gateway in ten minutes, and had flowed in, is no debt at the other."""
    world = World(60)
    here, there = Gateway(world, 0.0), Gateway(world, 33.0)
    for _ in range(600):
        world.now_s += 1
        assert here.ask(1)
        here.begin()
    here.exchange()
    there.exchange()
    assert there.level() == pytest.approx(60, abs=1.1)


def test_what_was_taken_too_much_in_an_outage_is_paid_back() -> None:
    """Each has let in what it may by itself, so together they have to wait."""
    world = World(60)
    here, there = Gateway(world, 0.0), Gateway(world, 33.0)
    for one in (here, there):
        while one.ask(1):
            pass
    world.now_s += 60
    for one in (here, there):
        while one.ask(1):
            pass
    for one in (here, there, here, there):
        one.exchange()
    assert [one.level() for one in (here, there)] == [pytest.approx(-120), pytest.approx(-120)]


def test_a_bucket_that_nobody_uses_is_forgotten() -> None:
    """By the database a minute after it is full, and then by each gateway."""
    world = World(60)
    here, there = Gateway(world, 0.0), Gateway(world, 33.0)
    here.spend(30)
    here.exchange()
    there.exchange()
    assert there.level() == 30
    world.now_s += 31 + KEPT_S
    there.key = Key("key_b", "b", b"", tokens_per_minute=60)
    there.limits.spend(there.key, 1)
    for one in (there, here, there):
        one.exchange()
    assert list(world.rows) == [("key_b", "tokens")]
    assert NAME not in here.limits._buckets
    assert NAME not in there.limits._buckets
    assert here.level() == 60


def test_a_row_that_was_made_again_is_not_taken_for_the_one_before() -> None:
    """By a gateway that was away meanwhile: what it has heard of the old one is not in the new one."""
    world = World(60)
    here, away = Gateway(world, 0.0), Gateway(world, 33.0)
    here.spend(50)
    here.exchange()
    away.exchange()
    assert away.level() == 10
    world.now_s += 51 + KEPT_S
    world.rows.clear()
    here.exchange()
    here.spend(55)
    here.exchange()
    away.exchange()
    assert away.level() == pytest.approx(5)


def test_a_key_whose_limit_changes_owes_the_same_time() -> None:
    """What is left is of the new limit."""
    world = World(60)
    one = Gateway(world, 0.0)
    one.spend(30)
    one.world.per_minute = 120
    assert one.level() == 60


def test_more_than_flows_in_is_told_at_once() -> None:
    """And what is no more than that, with all the rest."""
    one = Gateway(World(120), 0.0)
    one.spend(2)
    assert not one.hurried
    one.spend(1)
    assert one.hurried
