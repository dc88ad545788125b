"""A job's life as rows, whatever happens in whatever order: one end, no late word, nothing lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, select
from sqlalchemy.exc import IntegrityError

from gateway.jobs import claims, table
from gateway.jobs.claims import ATTEMPTS_MAX
from gateway.jobs.table import (
    JOBS,
    OUTPUTS,
    RUN_KEPT_S,
    RUNSYNC_KEPT_S,
    Ending,
    Job,
    NewJob,
    State,
)
from gateway.store import Store

TTL_S = 100.0
RETRIABLE = (State.FAILED, State.TIMED_OUT)


@pytest.fixture
def store(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A database of its own."""
    monkeypatch.setattr("gateway.database.STALL_MAX_S", 600)  # a test writes for as long as it takes
    store = Store.open(database_url)
    yield store
    store.close()


def connect(store: Store) -> Connection:
    """A write that is never committed: what it leaves is as empty as before."""
    return store._engine.connect()


@pytest.fixture
def connection(store: Store) -> Iterator[Connection]:
    """An open one."""
    with connect(store) as connection:
        yield connection


def new(key_id: str = "a", **how: object) -> NewJob:
    """A job that asks for nothing in particular."""
    return NewJob("e", key_id, b"{}", ttl_s=TTL_S, **how)  # type: ignore[arg-type]


def take(connection: Connection, most: int = 1, *, background: bool = False, after: str = "") -> list[Job]:
    """Claim, at the beginning of time."""
    return [job for job, _ in claims.claim(connection, "e", most, background=background, after=after, now=0)]


@dataclass
class Model:
    """What a job should be by now."""

    kind: str
    background: bool
    expires_at: float
    state: State = State.IN_QUEUE
    attempt: int = 0
    retries: int = 0
    output: bytes | None = None
    ends: list[int] = field(default_factory=list)
    """The attempts whose end was taken, or 0 for a cancellation, since it was last lined up by a client."""

    def is_over(self, now: float) -> bool:
        """Whether its time is."""
        return self.expires_at <= now


class Lives(RuleBasedStateMachine):
    """Everything that may be done to jobs, by runners that remember attempts which are long over too."""

    attempts = Bundle("attempts")

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.connection = connect(store)
        self.now = 0.0
        self.models: dict[str, Model] = {}
        self.forgotten: set[str] = set()

    def teardown(self) -> None:
        """Leave nothing open."""
        self.connection.close()

    def kept(self, kind: str) -> float:
        """Until when what has ended now is kept."""
        return {"run": self.now + RUN_KEPT_S, "runsync": self.now + RUNSYNC_KEPT_S}[kind]

    def current(self, token: Job, *states: State) -> Model | None:
        """The model of the attempt `token`, if that still counts in one of `states`."""
        model = self.models.get(token.id)
        return model if model and model.attempt == token.attempt and model.state in states else None

    def lost(self, model: Model) -> None:
        """What becomes of a job whose worker or gateway went away."""
        if model.retries + 1 >= ATTEMPTS_MAX:
            model.state = State.FAILED
            model.expires_at = self.kept(model.kind)
            model.ends.append(model.attempt)
        else:
            model.state = State.IN_QUEUE
            model.retries += 1

    @rule(key=st.sampled_from("abc"), kind=st.sampled_from(["run", "runsync"]), low=st.booleans())
    def submit(self, key: str, kind: str, low: bool) -> None:
        """A client, or a batch."""
        job = table.add(self.connection, new(key, kind=kind, background=low), self.now)
        self.models[job.id] = Model(kind, low, self.now + TTL_S)

    @rule(
        target=attempts, most=st.integers(1, 3), low=st.booleans(), after=st.sampled_from(["", "a", "b", "c"])
    )
    def claim(self, most: int, low: bool, after: str) -> object:
        """A runner has room."""
        claimed = claims.claim(self.connection, "e", most, background=low, after=after, now=self.now)
        for job, body in claimed:
            model = self.models[job.id]
            assert (model.state, model.background, body) == (State.IN_QUEUE, low, b"{}")
            assert not model.is_over(self.now)
            model.state = State.CLAIMED
            model.attempt += 1
            assert job.attempt == model.attempt
        left = [
            one
            for one in self.models.values()
            if one.state is State.IN_QUEUE and one.background is low and not one.is_over(self.now)
        ]
        assert len(claimed) == most or not left
        return multiple(*(job for job, _ in claimed))

    @rule(token=attempts)
    def begin(self, token: Job) -> None:
        """A worker has it, says a runner."""
        model = self.current(token, State.CLAIMED)
        assert claims.begin(self.connection, token, self.now) is (model is not None)
        if model:
            model.state = State.IN_PROGRESS

    @rule(token=attempts, state=st.sampled_from([State.COMPLETED, State.FAILED, State.TIMED_OUT]))
    def end(self, token: Job, state: State) -> None:
        """It has come to something, says a runner."""
        model = self.current(token, State.CLAIMED, State.IN_PROGRESS)
        output = b"[%d]" % token.attempt
        ended = claims.end(self.connection, token, Ending(state, output), self.now)
        assert (ended is not None) is (model is not None)
        if model:
            model.state = state
            model.output = output
            model.expires_at = self.kept(model.kind)
            model.ends.append(token.attempt)

    @rule(token=attempts)
    def lose(self, token: Job) -> None:
        """Its worker is gone, says a runner."""
        model = self.current(token, State.CLAIMED, State.IN_PROGRESS)
        assert (claims.lose(self.connection, token, "gone", self.now) is not None) is (model is not None)
        if model:
            self.lost(model)

    @rule(token=attempts)
    def give_back(self, token: Job) -> None:
        """No worker would have it, says a runner."""
        model = self.current(token, State.CLAIMED, State.IN_PROGRESS)
        assert claims.give_back(self.connection, token) is (model is not None)
        if model:
            model.state = State.IN_QUEUE

    @rule(token=attempts)
    def cancel(self, token: Job) -> None:
        """Its client wants it no more: that wins whenever it comes first."""
        model = self.models.get(token.id)
        cancelled = table.cancel(self.connection, JOBS.c.id == token.id, table.OPEN, 1, self.now)
        assert bool(cancelled) is bool(model and model.state in table.OPEN)
        if model and cancelled:
            model.state = State.CANCELLED
            model.expires_at = self.kept(model.kind)
            model.ends.append(0)

    @rule(token=attempts)
    def retry(self, token: Job) -> None:
        """Its client wants it again."""
        job = table.find(self.connection, token.id, self.now)
        again = table.retry(self.connection, job, self.now) if job else None
        model = self.models.get(token.id)
        assert (again is not None) is bool(job and model and model.state in RETRIABLE)
        if model and again:
            model.state, model.retries, model.output, model.ends = State.IN_QUEUE, 0, None, []
            model.expires_at = self.now + TTL_S

    @rule()
    def kill(self) -> None:
        """The gateway is killed, and the next one takes over."""
        claims.adopt(self.connection, self.now)
        for model in self.models.values():
            if model.state is State.CLAIMED:
                model.state = State.IN_QUEUE
            elif model.state is State.IN_PROGRESS:
                self.lost(model)

    @rule(seconds=st.sampled_from([1.0, 50.0, 99.0, RUNSYNC_KEPT_S, RUN_KEPT_S]))
    def pass_time(self, seconds: float) -> None:
        """Some jobs' time is over: they are not found, whether they are forgotten yet or not."""
        self.now += seconds
        for job_id, model in self.models.items():
            found = table.find(self.connection, job_id, self.now)
            assert (found is None) is model.is_over(self.now)

    @rule(most=st.integers(1, 3))
    def forget(self, most: int) -> None:
        """Their rows go, a few at a time."""
        over = {name for name, one in self.models.items() if one.is_over(self.now)}
        gone = {job.id for job in table.expire(self.connection, self.now, most)}
        assert gone <= over
        assert len(gone) == min(most, len(over))
        for job_id in gone:
            del self.models[job_id]

    @invariant()
    def rows_are_as_they_should_be(self) -> None:
        """Every job is there, in its state; its output is of the attempt that ended it; it ended once."""
        models = self.models
        rows = {
            row.id: (State(row.state), row.attempt, row.retries, row.expires_at)
            for row in self.connection.execute(select(JOBS))
        }
        assert rows == {
            job_id: (one.state, one.attempt, one.retries, one.expires_at)
            for job_id, one in self.models.items()
        }
        outputs = {
            row.id: row.body
            for row in self.connection.execute(
                select(JOBS.c.id, OUTPUTS.c.body).join(OUTPUTS, OUTPUTS.c.seq == JOBS.c.seq)
            )
        }
        assert outputs == {name: one.output for name, one in models.items() if one.output is not None}
        for model in self.models.values():
            assert len(model.ends) == (model.state not in table.OPEN)


def test_whatever_happens_in_whatever_order_a_job_comes_to_one_end(store: Store) -> None:
    """Nothing is lost, and who comes too late changes nothing."""
    lives = settings(max_examples=60, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(lambda: Lives(store), settings=lives)  # type: ignore[arg-type]  # a factory will do


def test_keys_take_turns(connection: Connection) -> None:
    """Who has lined up many waits no less for it than who has one, and the oldest of a key comes first."""
    jobs = [table.add(connection, new(key), 0) for key in "aaaabbc"]
    order = [job.id for job in take(connection, 7)]
    assert order == [jobs[n].id for n in (0, 4, 6, 1, 5, 2, 3)]


def test_the_turn_goes_on_behind_the_last_key(connection: Connection) -> None:
    """A runner with room for one serves everybody too."""
    for key in "aabb":
        table.add(connection, new(key), 0)
    turn, served = "", ""
    for _ in range(4):
        (job,) = take(connection, after=turn)
        turn = job.key_id
        served += turn
    assert served == "abab"


def test_low_priority_is_a_line_of_its_own(connection: Connection) -> None:
    """Neither takes the other's."""
    table.add(connection, new("a", background=True), 0)
    assert take(connection) == []
    assert len(take(connection, background=True)) == 1


@pytest.mark.parametrize("job_id", ["x", "x\0", "\ud800"])
def test_what_is_no_text_is_no_job_either(connection: Connection, job_id: str) -> None:
    """No database is asked for what none could hold."""
    assert table.find(connection, job_id, 0) is None


def test_an_idempotency_key_is_one_job(connection: Connection) -> None:
    """Of a key, at an endpoint, until what came of it is forgotten."""
    asked = new("a", idempotency_key="once", digest=b"1")
    job = table.add(connection, asked, 0)
    assert table.find_repeated(connection, asked, 0) == job
    assert table.find_repeated(connection, new("b", idempotency_key="once"), 0) is None
    with pytest.raises(IntegrityError), connection.begin_nested():
        table.add(connection, asked, 0)
    assert table.find_repeated(connection, asked, TTL_S) is None  # nobody has swept it away yet
    assert table.add(connection, asked, TTL_S).id != job.id


def test_jobs_that_wait_count_for_the_bound(connection: Connection) -> None:
    """Also while a runner asks a worker for them."""
    for _ in range(2):
        table.add(connection, new("a"), 0)
    assert table.queued(connection, "e") == (2, 4)
    (claimed,) = take(connection)
    assert table.queued(connection, "e") == (2, 4)
    claims.begin(connection, claimed, 0)
    assert table.queued(connection, "e") == (1, 2)
