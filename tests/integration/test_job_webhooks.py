"""Webhooks over real sockets: sent until they are answered with 200, and no more than RunPod does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError

from gateway.jobs import webhooks
from gateway.jobs.destinations import Allowed
from gateway.jobs.webhooks import HOST_AT_ONCE, WEBHOOKS, Webhooks
from gateway.store import Store
from tests.hooks import Hooks
from tests.job_endpoints import Names

BODY = b'{"id":"x","status":"COMPLETED"}'


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """A database of its own."""
    store = Store.open(database_url)
    yield store
    store.close()


async def put(store: Store, url: str) -> None:
    """A job with a webhook has ended."""
    await store.write(lambda connection: webhooks.add(connection, url, BODY, 0.0))


async def left(store: Store) -> int:
    """How many are still to be sent."""
    return (
        await store.read(lambda connection: connection.scalar(select(func.count()).select_from(WEBHOOKS)))
        or 0
    )


@asynccontextmanager
async def sending(
    store: Store, *allowed: str, resolver: AbstractResolver | None = None, timeout_s: float = 60.0
) -> AsyncIterator[Webhooks]:
    """Webhooks, tried again at once."""
    hooks = Webhooks(store, Allowed.of(allowed), resolver=resolver, again_s=0, timeout_s=timeout_s)
    hooks.start()
    try:
        yield hooks
    finally:
        await hooks.close()


async def until_none_left(store: Store) -> None:
    """Return once nothing is to be sent: the note of it comes after the answer."""
    while True:
        if not await left(store):
            return


async def test_a_webhook_is_sent_once_and_without_secrets(store: Store) -> None:
    """What an earlier gateway has left too."""
    async with Hooks().listening() as hooks:
        await put(store, f"http://127.0.0.1:{hooks.port}/a?b=c")
        async with sending(store, "127.0.0.1") as sender:
            await hooks.came(1)
            await until_none_left(store)
            await put(store, f"http://127.0.0.1:{hooks.port}/b")
            sender.wake()
            await hooks.came(2)
            await until_none_left(store)
    assert hooks.got == [("/a", BODY), ("/b", BODY)]
    assert set(hooks.headers[0]) == {
        *("host", "user-agent", "content-type", "content-length", "accept", "accept-encoding", "connection")
    } - ({"connection"} - set(hooks.headers[0]))


@pytest.mark.parametrize("status", [500, 404, 204, 302])
async def test_what_is_not_answered_with_200_is_sent_twice_more(store: Store, status: int) -> None:
    """As RunPod does; a redirect is not followed."""
    async with Hooks(*[status] * 9).listening() as hooks:
        await put(store, f"http://127.0.0.1:{hooks.port}/a")
        async with sending(store, "127.0.0.1"):
            await hooks.came(3)
            await until_none_left(store)
    assert hooks.got == [("/a", BODY)] * 3


async def test_a_webhook_that_hangs_is_given_up(store: Store) -> None:
    """It does not hold up the others for ever."""
    async with Hooks().listening() as hooks:
        hooks.hang = True
        await put(store, f"http://127.0.0.1:{hooks.port}/a")
        async with sending(store, "127.0.0.1", timeout_s=0.01):
            await until_none_left(store)


async def test_a_webhook_to_this_machine_is_not_sent(store: Store) -> None:
    """Not by its address, by a name that leads here, or by another spelling of one."""
    async with Hooks().listening() as hooks:
        names = Names(**{"rebound.example": ["127.0.0.1"], "2130706433": ["127.0.0.1"]})
        for host in ("127.0.0.1", "rebound.example", "2130706433"):
            await put(store, f"http://{host}:{hooks.port}/a")
        async with sending(store, resolver=names):
            await until_none_left(store)
    assert hooks.got == []


async def test_a_webhook_that_was_not_sent_is_the_next_gateways(store: Store) -> None:
    """However often one ends while it is being sent."""
    async with Hooks().listening() as hooks:
        hooks.hang = True
        await put(store, f"http://127.0.0.1:{hooks.port}/a")
        async with sending(store, "127.0.0.1"):
            await hooks.came(1)
        hooks.hang = False
        async with sending(store, "127.0.0.1"):
            await until_none_left(store)
    assert len(hooks.got) == 2


async def test_hosts_that_hang_hold_up_only_their_own(store: Store) -> None:
    """However much there is for them: each has a few at once, and no more."""
    dead = [f"dead-{number}.example" for number in range(16)]
    names = Names(**{host: ["127.0.0.1"] for host in (*dead, "alive.example")})
    async with Hooks().listening() as hanging, Hooks().listening() as hooks:
        hanging.hang = True
        for host in dead * (HOST_AT_ONCE + 2):
            await put(store, f"http://{host}:{hanging.port}/{host}")
        async with sending(store, "127.0.0.1", resolver=names) as sender:
            await hanging.came(len(dead) * HOST_AT_ONCE)
            for number in range(1, 20):
                await put(store, f"http://alive.example:{hooks.port}/a")
                sender.wake()
                await hooks.came(number)
            assert sorted(path for path, _ in hanging.got) == sorted(
                f"/{host}" for host in dead * HOST_AT_ONCE
            )


class FullDisk(Store):
    """A database that can't be written `failures` times."""

    failures = 0

    async def write(self, work: Callable[[Any], Any], *, insist: bool = False) -> Any:
        """Fail, or write."""
        if self.failures:
            self.failures -= 1
            raise OperationalError("INSERT", {}, Exception("database or disk is full"))
        return await super().write(work, insist=insist)


async def test_a_full_disk_has_no_webhook_sent_again(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came of it is written down as soon as it can be."""
    monkeypatch.setattr(webhooks, "DATABASE_AGAIN_S", 0.0)
    with closing(FullDisk.open(database_url)) as store:
        async with Hooks().listening() as hooks:
            await put(store, f"http://127.0.0.1:{hooks.port}/a")
            store.failures = 3
            async with sending(store, "127.0.0.1"):
                await until_none_left(store)
    assert (hooks.got, store.failures) == ([("/a", BODY)], 0)
