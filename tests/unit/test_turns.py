"""`gateway.endpoints.turns`: nothing is lost, in order within a key, fair between keys, and bounded."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.endpoints.turns import BACKGROUND_EVERY, Turn, Turns

LIMIT = 6
LIMIT_BYTES = 60


def lined_up(turns: Turns[Turn], *keys: str, background: bool = False) -> list[Turn]:
    """A turn for each of `keys`, in this order, all of which have a place."""
    added = [Turn(key, background=background) for key in keys]
    assert [turns.add(turn) for turn in added] == [[] for _ in added]
    return added


def taken(turns: Turns[Turn]) -> list[Turn]:
    """All turns to the last."""
    return list(iter(turns.take, None))


def test_each_key_has_one_turn_after_the_other() -> None:
    """However many one of them has waiting."""
    turns: Turns[Turn] = Turns(limit=9)
    a, b, c, d, e, f = lined_up(turns, *"aaabbc")
    assert taken(turns) == [a, d, f, b, e, c]
    assert turns.take() is None


def test_a_key_that_comes_back_is_the_last_of_the_round() -> None:
    """Asking again at once brings nobody forward."""
    turns: Turns[Turn] = Turns(limit=9)
    a, b, c = lined_up(turns, *"abc")
    assert turns.take() is a
    (again,) = lined_up(turns, "a")
    assert taken(turns) == [b, c, again]


def test_who_has_fewest_is_let_in_by_who_has_most() -> None:
    """One key may have the whole queue until another one comes; it gives way from the end."""
    turns: Turns[Turn] = Turns(limit=4)
    a, b, c, d = lined_up(turns, *"aaaa")
    refused = Turn("a")
    assert turns.add(refused) == [refused]
    e, f, g = Turn("b"), Turn("b"), Turn("b")
    assert [turns.add(turn) for turn in (e, f, g)] == [[d], [c], [g]]
    assert taken(turns) == [a, e, b, f]


def test_large_bodies_give_way_to_small_ones() -> None:
    """As many of them as it takes; who has few but large ones has most."""
    turns: Turns[Turn] = Turns(limit=9, limit_bytes=100)
    small = lined_up(turns, *"bbb")
    large = [Turn("a", size_bytes=30) for _ in range(3)]
    assert [turns.add(turn) for turn in large] == [[], [], []]
    middle = Turn("c", size_bytes=20)
    assert turns.add(middle) == [large[2]]
    larger = Turn("d", size_bytes=50)
    assert turns.add(larger) == [larger]
    assert taken(turns) == [small[0], large[0], middle, small[1], large[1], small[2]]


def test_one_may_always_wait_however_large() -> None:
    """But nobody beside it."""
    turns: Turns[Turn] = Turns(limit=9, limit_bytes=100)
    huge, small = Turn("a", size_bytes=1000), Turn("b", size_bytes=1)
    assert turns.add(huge) == []
    assert turns.add(small) == [small]
    turns.remove(huge)
    assert turns.add(small) == []


def test_nobody_waits_where_there_is_no_place() -> None:
    """A limit of zero."""
    turns: Turns[Turn] = Turns(limit=0)
    turn = Turn("a")
    assert turns.add(turn) == [turn]
    assert (len(turns), turns.take()) == (0, None)


def test_background_has_a_turn_now_and_then() -> None:
    """And all turns once nobody else waits. The two take no place from each other."""
    turns: Turns[Turn] = Turns(limit=40)
    lined_up(turns, *"b" * 40, background=True)
    lined_up(turns, *"a" * 40)
    every = [turn.background for turn in taken(turns)]
    assert every[:40] == ([False] * (BACKGROUND_EVERY - 1) + [True]) * 2 + [False] * 8
    assert every[40:].count(False) == 2


def test_who_had_a_turn_for_nothing_goes_first() -> None:
    """In order of arrival, and in no bound."""
    turns: Turns[Turn] = Turns(limit=3)
    early = [Turn("a", arrived_s=at) for at in (1.0, 2.0, 3.0)]
    for turn in early:
        turns.add(turn)
    assert taken(turns) == early
    late = lined_up(turns, *"bbb")
    for turn in (early[1], early[2], early[0]):
        turns.put_back(turn)
    turns.remove(early[2])
    assert (len(turns), list(turns)) == (5, [*late, early[1], early[0]])
    assert taken(turns) == [early[0], early[1], *late]


def test_a_limit_that_is_lowered_turns_nobody_away() -> None:
    """Nor does whoever comes then and has less: one gives way to one."""
    turns: Turns[Turn] = Turns(limit=8)
    (*many, last) = lined_up(turns, *"aaaaaaaa")
    turns.rebound(2)
    refused, one = Turn("a"), Turn("b")
    assert [turns.add(refused), turns.add(one)] == [[refused], [last]]
    assert taken(turns) == [many[0], one, *many[1:]]


class Queue(RuleBasedStateMachine):
    """Whatever is done, in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: Turns[Turn] = Turns(limit=LIMIT, limit_bytes=LIMIT_BYTES)
        self.clock = itertools.count()
        self.lines: dict[tuple[bool, str], list[Turn]] = defaultdict(list)
        self.had: list[Turn] = []
        self.again: list[Turn] = []
        self.since: dict[tuple[bool, str], Counter[str]] = {}
        """For each key that waits, who has gone since it last did."""
        self.passed = 0

    def band(self, background: bool) -> dict[str, list[Turn]]:
        """Who waits in that band."""
        return {key: line for (behind, key), line in self.lines.items() if behind is background and line}

    def size(self, background: bool) -> int:
        """The bytes that wait in that band."""
        return sum(turn.size_bytes for turn in self.all(background))

    def all(self, background: bool) -> list[Turn]:
        """Those who wait in that band, key by key."""
        return list(itertools.chain(*self.band(background).values()))

    def leaves(self, turn: Turn) -> None:
        """Strike it from the model."""
        where = turn.background, turn.key
        self.lines[where].remove(turn)
        if not self.lines[where]:
            self.since.pop(where, None)

    @rule(key=st.sampled_from("abcd"), size=st.sampled_from([0, 1, 9, 30, 70]), background=st.booleans())
    def add(self, key: str, size: int, background: bool) -> None:
        """Only who has most gives way, from its end, and never so that it has less than who comes."""
        turn = Turn(key, size, background, next(self.clock))
        present, fits = self.all(background), self.size(background) + size <= LIMIT_BYTES
        full = len(present) >= LIMIT or (len(present) > 0 and not fits)
        mine = [turn, *(each for each in present if each.key == key)]
        losers = self.turns.add(turn)
        assert bool(losers) == full
        if turn in losers:
            assert losers == [turn]
            small = fits and sum(each.size_bytes for each in mine) / LIMIT_BYTES <= len(mine) / LIMIT
            keys = len({key, *(each.key for each in present)})
            assert not (small and len(mine) <= LIMIT / keys), "an even part is everybody's"
            return
        for loser in losers:
            assert loser is [each for each in self.all(background) if each.key == loser.key][-1]
            assert loser.key != key
            self.leaves(loser)
        if losers and fits:
            assert len(losers) == 1
        self.lines[background, key].append(turn)
        self.since.setdefault((background, key), Counter())

    @precondition(lambda self: len(self.turns) > 0)
    @rule()
    def take(self) -> None:
        """In order within a key, one of each key between two of another, and the background by its share."""
        turn = self.turns.take()
        assert turn is not None
        if self.again:
            assert turn is min(self.again, key=lambda each: each.arrived_s)
            self.again.remove(turn)
            self.had.append(turn)
            return
        if turn.background:
            assert not self.band(False) or self.passed == BACKGROUND_EVERY - 1
            self.passed = 0
        elif self.band(True):
            self.passed += 1
            assert self.passed < BACKGROUND_EVERY
        assert turn is self.lines[turn.background, turn.key][0]
        for (behind, key), seen in self.since.items():
            if behind is turn.background and key != turn.key:
                seen[turn.key] += 1
                assert seen[turn.key] == 1, f"{turn.key} has gone twice before {key}"
        self.since[turn.background, turn.key].clear()
        self.leaves(turn)
        self.had.append(turn)

    @precondition(lambda self: len(self.turns) > 0)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """Anywhere in the queue."""
        turn = data.draw(st.sampled_from(sorted(self.turns, key=lambda each: each.arrived_s)))
        self.turns.remove(turn)
        if turn in self.again:
            self.again.remove(turn)
        else:
            self.leaves(turn)

    @precondition(lambda self: bool(self.had))
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        """Before all others."""
        turn = data.draw(st.sampled_from(self.had))
        self.had.remove(turn)
        self.again.append(turn)
        self.turns.put_back(turn)

    @invariant()
    def nothing_is_lost(self) -> None:
        """Nor there twice."""
        assert set(self.turns) == {*itertools.chain(*self.lines.values()), *self.again}
        assert len(self.turns) == sum(map(len, self.lines.values())) + len(self.again)

    @invariant()
    def bounds_are_kept(self) -> None:
        """By each band."""
        for background in (False, True):
            count = len(self.all(background))
            assert count <= LIMIT
            assert count <= 1 or self.size(background) <= LIMIT_BYTES


TestQueue = Queue.TestCase
TestQueue.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
