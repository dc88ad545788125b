"""`gateway.accounts.levels` on a real PostgreSQL: what two gateways know of each other's keys."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing

import pytest
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.exc import SQLAlchemyError

from gateway.accounts import levels
from gateway.accounts.keys import Key
from gateway.accounts.levels import TABLE, Levels
from gateway.accounts.limits import Limits
from gateway.store import Store
from handler.errors import RateLimited
from tests import postgres
from tests.until import LOOK_S

KEY = Key("key_a", "a", b"", requests_per_minute=60, tokens_per_minute=600)


@pytest.fixture
def url(postgresql: postgres.Server) -> str:
    """An empty database."""
    return postgresql.database()


@pytest.fixture
def stores(url: str) -> Iterator[tuple[Store, Store]]:
    """The same database, as each of two gateways has it."""
    with closing(Store.open(url)) as one, closing(Store.open(url)) as other:
        yield one, other


@pytest.fixture(autouse=True)
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time passes, so that nothing flows in."""
    monkeypatch.setattr(levels, "_NOW", text("SELECT 1e9::float8"))


class Gateway:
    """What a gateway knows of its keys."""

    def __init__(self, store: Store) -> None:
        self.limits = Limits(lambda: 100.0)
        self.levels = Levels(store, self.limits)

    def left(self, key: Key = KEY) -> list[str]:
        """What clients are told: requests and tokens."""
        return [value for name, value in self.limits.headers(key) if "remaining" in name]


@asynccontextmanager
async def gateways(*stores: Store) -> AsyncIterator[list[Gateway]]:
    """One on each."""
    made = [Gateway(store) for store in stores]
    for one in made:
        await one.levels.exchange()
    yield made


def rows(store: Store) -> int:
    """How many buckets the database knows of."""
    return store.read_now(lambda c: c.execute(select(func.count()).select_from(TABLE)).scalar_one())


async def come(holds: Callable[[], object]) -> None:
    """Return once `holds()`: what another thread does has no event to wait for."""
    while not holds():  # noqa: ASYNC110 - as above
        await asyncio.sleep(LOOK_S)


async def test_what_one_has_let_in_the_other_does_not(stores: tuple[Store, Store]) -> None:
    """Requests and tokens, once told; a new gateway begins with what is left."""
    async with gateways(*stores) as (one, other):
        for _ in range(25):
            one.limits.take(KEY)
        one.limits.spend(KEY, 100)
        other.limits.take(KEY)
        other.limits.spend(KEY, 7)
        for each in (one, other, one):
            await each.levels.exchange()
        assert one.left() == other.left() == ["34", "493"]
        one.limits.spend(KEY, 700)
        for each in (one, other):
            await each.levels.exchange()
        with pytest.raises(RateLimited):
            other.limits.take(KEY)
    async with gateways(stores[0]) as (new,):
        assert new.left() == ["34", "0"]
        with pytest.raises(RateLimited):
            new.limits.take(KEY)


async def test_only_what_was_taken_is_written(stores: tuple[Store, Store]) -> None:
    """A row for each bucket; keys without limits, and who only asks how it stands, have none."""
    async with gateways(*stores) as (one, other):
        one.limits.take(Key("key_free", "free", b""))
        one.limits.spend(Key("key_free", "free", b""), 5)
        one.left()
        await one.levels.exchange()
        assert rows(stores[0]) == 0
        for each in (one, other, one):
            each.limits.take(KEY)
            await each.levels.exchange()
        assert rows(stores[0]) == 1


async def test_rows_of_full_buckets_go(stores: tuple[Store, Store]) -> None:
    """A minute after, with the next write, of whatever key: a revoked one needs nobody to clean up."""
    async with gateways(*stores) as (one, other):
        one.limits.take(KEY)
        await one.levels.exchange()
        past = update(TABLE).values(full_at=TABLE.c.full_at - levels.KEPT_S - 2)
        await stores[0].write(lambda c: c.execute(past))
        other.limits.take(Key("key_b", "b", b"", requests_per_minute=1))
        await other.levels.exchange()
        kept = await stores[0].read(lambda c: list(c.scalars(select(TABLE.c.key_id))))
        assert kept == ["key_b"]


async def test_what_could_not_be_told_is_told_later_and_once(
    stores: tuple[Store, Store], postgresql: postgres.Server
) -> None:
    """While the database is away each lets in what it may by itself."""
    async with gateways(*stores) as (one, other):
        postgresql.stop(crash=True)
        try:
            for each in (one, other):
                for _ in range(60):
                    each.limits.take(KEY)
                with pytest.raises(RateLimited):
                    each.limits.take(KEY)
                with pytest.raises(SQLAlchemyError):
                    await each.levels.exchange()
        finally:
            postgresql.start()
        for each in (one, other, one):
            await each.levels.exchange()
        for each in (one, other):
            with pytest.raises(RateLimited, match=r"Used 120\. Please try again in 1m1s\."):
                each.limits.take(KEY)


async def test_levels_that_are_lost_are_full_buckets(stores: tuple[Store, Store]) -> None:
    """A database that was put back to a state before refuses nobody."""
    async with gateways(*stores) as (one, other):
        for _ in range(60):
            one.limits.take(KEY)
        for each in (one, other):
            await each.levels.exchange()
        await stores[0].write(lambda c: c.execute(delete(TABLE)))
        for each in (one, other):
            await each.levels.exchange()
            each.limits.take(KEY)


async def test_who_takes_much_tells_it_at_once_and_the_rest_at_the_end(
    stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And while it is open, not only when it is asked to."""
    monkeypatch.setattr(levels, "TELL_S", 3600.0)
    one, other = map(Gateway, stores)
    async with one.levels:
        for _ in range(40):
            one.limits.take(KEY)
        await come(lambda: rows(stores[0]))
        one.limits.take(KEY)
    await other.levels.exchange()
    assert other.left()[0] == "19"


async def test_time_is_the_databases(stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """What has flowed in for a gateway that comes later is by the database's clock, not by machines'."""
    async with gateways(stores[0]) as (one,):
        one.limits.spend(KEY, 300)
        await one.levels.exchange()
    monkeypatch.setattr(levels, "_NOW", text("SELECT (1e9 + 10)::float8"))
    async with gateways(stores[1]) as (other,):
        assert other.left() == ["60", "400"]
        other.limits.spend(KEY, 100)
        await other.levels.exchange()
        assert other.left() == ["60", "300"]


async def test_the_databases_clock_is_asked(
    stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a number of seconds that goes on."""
    monkeypatch.undo()
    first, second = (stores[0].read_now(lambda c: c.execute(levels._NOW).scalar_one()) for _ in range(2))
    assert 1.7e9 < first < second < first + 60


async def test_a_failing_database_is_told_and_tried_again(
    stores: tuple[Store, Store],
    postgresql: postgres.Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody who asks waits for it, and no gateway ends of it."""
    monkeypatch.setattr(levels, "TELL_S", 0.02)
    caplog.set_level(logging.WARNING)
    one = Gateway(stores[0])
    async with one.levels:
        postgresql.stop(crash=True)
        try:
            one.limits.take(KEY)
            await come(lambda: "limits could not be told or heard" in caplog.text)
        finally:
            postgresql.start()
        await come(lambda: rows(stores[1]))
    assert postgres.PASSWORD not in caplog.text
