"""`gateway.accounts.key_table`: keys are made, found and revoked in the database; a gateway hears of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy.exc import SQLAlchemyError

from gateway.accounts import key_table
from gateway.accounts.key_table import Following
from gateway.accounts.keys import Key, Keys
from gateway.store import Store
from handler.errors import BadRequest, NotFound, Unauthorized
from handler.messages import Request

NOW_S = 1_700_000_000
WISHES = {
    "name": " mobile app ",
    "admin": False,
    "endpoints": ["a", "b"],
    "models": ["org/m"],
    "requests_per_minute": 60,
    "tokens_per_minute": 1000,
    "expires_at": NOW_S + 10,
}


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """An open database."""
    store = Store.open(database_url)
    yield store
    store.close()


def create(store: Store, **fields: Any) -> tuple[Key, str]:
    """A new key, and the key itself."""
    return store.write_now(lambda c: key_table.create(c, key_table.parse(fields, NOW_S)))


def revoke(store: Store, name: str) -> Key:
    """The key of that id or name, revoked."""
    return store.write_now(lambda c: key_table.revoke(c, name, NOW_S + 5))


def bearing(key: str) -> Request:
    """A request with `key`."""
    return Request("GET", "/v2", (("authorization", f"Bearer {key}"),))


def test_a_key_is_kept_as_it_was_wished_and_itself_nowhere(store: Store, tmp_path: Path) -> None:
    """All but the key, of which there is a hash."""
    key, made = create(store, **WISHES)
    (kept,), _ = store.read_now(key_table.load)
    assert kept == key
    assert key.view() == {
        **WISHES,
        "id": key.id,
        "name": "mobile app",
        "created_at": NOW_S,
        "last_used_at": None,
        "revoked_at": None,
    }
    assert made.startswith("ft-")
    store.close()
    assert not [file for file in tmp_path.iterdir() if made.encode() in file.read_bytes()]


def test_every_fault_of_a_wish_is_named() -> None:
    """Not only the first."""
    wrong = {
        "name": "",
        "admin": 1,
        "endpoints": [],
        "models": "m",
        "requests_per_minute": 0,
        "tokens_per_minute": True,
        "expires_at": NOW_S,
        "id": "key_1",
        "colour": "red",
    }
    with pytest.raises(BadRequest) as refused:
        key_table.parse(wrong, NOW_S)
    assert refused.value.code == "invalid_key"
    for name in wrong:
        assert f"`{name}`" in refused.value.message, name


@pytest.mark.parametrize("name", [None, 5, " ", "x" * 65, "key_1", "env", "API_KEY", "door", "This machine"])
def test_a_name_is_not_an_id(name: object) -> None:
    """A key can be revoked by either."""
    with pytest.raises(BadRequest, match="`name` must be"):
        key_table.parse({"name": name}, NOW_S)


@pytest.mark.parametrize("name", ["a\nb", "a\x9b31m", "a\N{RIGHT-TO-LEFT OVERRIDE}b", "\ud800"])
def test_a_name_is_what_it_looks_like(name: str) -> None:
    """A terminal obeys none of it, and the database can hold it."""
    with pytest.raises(BadRequest, match="`name` must be"):
        key_table.parse({"name": name}, NOW_S)


def test_a_name_is_free_again_once_its_key_is_revoked(store: Store) -> None:
    """Of those that open there is one of a name."""
    first, _ = create(store, name="a")
    with pytest.raises(BadRequest) as refused:
        create(store, name="a")
    assert refused.value.code == "name_taken"
    assert revoke(store, "a") == replace(first, revoked_s=NOW_S + 5)
    second, _ = create(store, name="a")
    assert revoke(store, "a").id == second.id
    assert revoke(store, first.id) == replace(first, revoked_s=NOW_S + 5)


def test_what_cant_be_revoked(store: Store) -> None:
    """A key that is not there, what no database could be asked for, and the one that is not kept."""
    for name in ("a", "a\0", "\ud800"):
        with pytest.raises(NotFound):
            revoke(store, name)
    with pytest.raises(BadRequest, match="API_KEY"):
        revoke(store, "env")


def test_the_first_key_is_made_once(store: Store) -> None:
    """An admin's, and never again, be it revoked."""
    made = store.write_now(lambda c: key_table.first(c, NOW_S))
    assert made is not None
    (key,), _ = store.read_now(key_table.load)
    assert (key.name, key.admin, key.endpoints) == ("first", True, None)
    revoke(store, "first")
    assert store.write_now(lambda c: key_table.first(c, NOW_S)) is None


async def test_a_gateway_hears_of_changes(store: Store) -> None:
    """Made or revoked by another process; and writes down when keys were used."""
    keys = Keys(clock=lambda: NOW_S + 1)
    following = Following(keys, store)
    await following.look()
    key, made = create(store, name="a")
    with pytest.raises(Unauthorized):
        keys.check(bearing(made))
    await following.look()
    assert keys.check(bearing(made)) == key
    await following.look()
    assert store.read_now(key_table.load)[0] == [replace(key, last_used_s=NOW_S + 1)]
    revoke(store, "a")
    await following.look()
    with pytest.raises(Unauthorized):
        keys.check(bearing(made))
    assert keys.of(key.id).revoked_s == NOW_S + 5


async def test_a_slow_look_does_not_bring_a_revoked_key_back(store: Store) -> None:
    """Two look at once, and what the slower one has read is older."""

    class Slow:
        """Reads at once and tells late, while `late` is not set."""

        def __init__(self) -> None:
            self.has_read, self.late = asyncio.Event(), asyncio.Event()

        async def read(self, work: Any) -> Any:
            found = await store.read(work)
            if work is key_table.load and not self.has_read.is_set():
                self.has_read.set()
                await self.late.wait()
            return found

    slow, keys = Slow(), Keys()
    following = Following(keys, cast("Store", slow))
    key, made = create(store, name="a")
    looking = asyncio.create_task(following.look())
    await slow.has_read.wait()
    revoke(store, key.id)
    await following.look()
    slow.late.set()
    await looking
    with pytest.raises(Unauthorized):
        keys.check(bearing(made))


@pytest.mark.sqlite
async def test_keys_are_heeded_though_nothing_can_be_written(store: Store) -> None:
    """On a full disk, say; when they were used is written down later."""
    keys = Keys(clock=lambda: NOW_S)
    following = Following(keys, store)
    _, made = create(store, name="a")
    await following.look()
    keys.check(bearing(made))
    _, other = create(store, name="b")
    store.write_now(
        lambda c: c.exec_driver_sql(
            "CREATE TRIGGER full BEFORE UPDATE ON keys BEGIN SELECT RAISE(FAIL, 'full'); END"
        )
    )
    with pytest.raises(SQLAlchemyError):
        await following.look()
    assert keys.check(bearing(other)).name == "b"
    store.write_now(lambda c: c.exec_driver_sql("DROP TRIGGER full"))
    await following.look()
    assert [one.last_used_s for one in store.read_now(key_table.load)[0]] == [NOW_S, NOW_S]


async def test_a_gateway_looks_again_after_a_failure(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A database that can't be read now may be readable later."""
    monkeypatch.setattr(key_table, "POLL_S", 0)
    keys = Keys()
    store.write_now(lambda c: c.exec_driver_sql("ALTER TABLE keys RENAME TO away"))
    running = asyncio.create_task(Following(keys, store).run())
    while "keys could not be read or written" not in caplog.messages:
        await store.read(lambda _: None)
    store.write_now(lambda c: c.exec_driver_sql("ALTER TABLE away RENAME TO keys"))
    key, _made = create(store, name="a")
    while key.id not in keys:
        await store.read(lambda _: None)
    running.cancel()
