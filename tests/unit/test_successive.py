"""Workers of a newer description take the place of older ones; who waits or is answered does not notice."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from gateway.scaling import Scaling
from gateway.upstreams.successive import Successive
from handler.errors import NotAdmitted
from handler.messages import Request, read
from tests.pools import OwnedPool
from tests.scripted_app import Pause, ScriptedApp, answer

ASK = Request("POST", "/v1/x")


def pool(app: ScriptedApp, capacity: int = 1) -> OwnedPool:
    """A pool in front of `app`."""
    return OwnedPool(app, places=capacity, scaling=Scaling(1, 3, 60.0))


def says(text: str, *gates: str) -> ScriptedApp:
    """An application that answers every request with `text`, after `gates`."""
    script = answer(text)
    script = type(script)((*map(Pause, gates), *script.steps), script.status, script.headers)
    return ScriptedApp({"POST /v1/x": script}, repeat=True)


async def asked(pools: Successive) -> bytes:
    """The answer of whoever is asked now."""
    async with pools.call(ASK) as reply:
        return await read(reply)


async def test_what_runs_ends_in_the_old_pool_and_what_comes_goes_to_the_new_one() -> None:
    """The old one lives until its last request has ended, and no worker of it that is idle for longer."""
    first, second = says("old", "held"), says("new")
    old, new = pool(first), pool(second)
    async with Successive(old) as pools:
        running = asyncio.create_task(asked(pools))
        await first.gate("held").reached.wait()
        await pools.follow(new)
        assert await asked(pools) == b'"new"'
        assert (old.life, new.life) == (["entered"], ["entered"])
        assert old.scaling == Scaling(0, 3, 0.0)
        assert [view.state for view in pools.workers] == ["ready", "ready"]
        first.gate("held").opened.set()
        assert await running == b'"old"'
        await asyncio.gather(*pools._old.values())
        assert old.life == ["entered", "left"]
        assert [view.state for view in pools.workers] == ["ready"]
    assert new.life == ["entered", "stopped", "left"]


async def test_the_new_pool_hears_how_many_wait_and_they_hear_of_its_room() -> None:
    """Whoever waited for the old one need not ask again."""
    old, new = pool(says("old"), capacity=0), pool(says("new"), capacity=0)
    heard: list[int] = []
    async with Successive(old) as pools:
        pools.listen(lambda: heard.append(pools.free))
        pools.want(3, 1.0)
        assert old.wanted == [(3, 1.0)]
        await pools.follow(new)
        assert (old.wanted[-1], new.wanted) == ((0, 0.0), [(3, 1.0)])
        new.give(2)
        assert heard == [0, 2]
        old.give(5)  # nobody asks it any more
        assert heard == [0, 2]
        assert (pools.free, pools.capacity, pools.cold_start_s, pools.retry_after_s) == (2, 2, 4.25, 7)


async def test_an_old_pool_does_not_wait_for_ever() -> None:
    """A client that does not read its answer keeps no GPU."""
    first = says("old", "held")
    old = pool(first)
    async with AsyncExitStack() as stack:
        pools = await stack.enter_async_context(Successive(old, finish_s=0.0))
        running = asyncio.create_task(asked(pools))
        await first.gate("held").reached.wait()
        await pools.follow(pool(says("new")))
        await asyncio.gather(*pools._old.values())
        assert old.life == ["entered", "left"]
        running.cancel()
        await asyncio.wait({running})


async def test_stopping_ends_old_pools_too() -> None:
    """Both drain, within the deadline that they have for it."""
    first = says("old", "held")
    old, new = pool(first), pool(says("new"))
    async with Successive(old) as pools:
        running = asyncio.create_task(asked(pools))
        await first.gate("held").reached.wait()
        await pools.follow(new)
        pools.stop_taking()
        assert isinstance(pools.refusal, NotAdmitted)
        await asyncio.gather(*pools._old.values())
        running.cancel()
        await asyncio.wait({running})
    assert old.life == ["entered", "stopped", "left"]
    assert new.life == ["entered", "stopped", "stopped", "left"]


@pytest.mark.parametrize("follows", [False, True])
async def test_bounds_change_without_another_pool(follows: bool) -> None:
    """They are the newest's."""
    old, new = pool(says("old")), pool(says("new"))
    async with Successive(old) as pools:
        if follows:
            await pools.follow(new)
        pools.rescale(Scaling(2, 4, 1.0))
        assert (new if follows else old).scaling == Scaling(2, 4, 1.0)


async def test_killing_spares_nobody() -> None:
    """Old ones neither."""
    first = says("old", "held")
    old, new = pool(first), pool(says("new"))
    async with Successive(old) as pools:
        running = asyncio.create_task(asked(pools))
        await first.gate("held").reached.wait()
        await pools.follow(new)
        pools.kill()
        running.cancel()
        await asyncio.wait({running})
    assert "killed" in old.life
    assert "killed" in new.life
