"""A worker's lease: what its polls prove, and what they are told."""

from __future__ import annotations

import asyncio

from gateway.upstreams.lease import REPEATS_S, Lease

NEVER = 3600.0


def lease(hung: asyncio.Event, *, lease_s: float = NEVER, hold_s: float = NEVER) -> Lease:
    """A lease that has begun."""
    made = Lease("w", hung.set, lease_s=lease_s, hold_s=hold_s)
    made.begin()
    return made


async def test_a_worker_that_does_not_poll_hangs() -> None:
    """Its lease runs from the moment it is ready."""
    hung = asyncio.Event()
    lease(hung, lease_s=0)
    await hung.wait()


async def test_a_worker_that_polls_does_not_hang_until_it_polls_no_more() -> None:
    """An open poll holds the lease, and when it ends the lease runs anew."""
    hung = asyncio.Event()
    made = Lease("w", hung.set, lease_s=0, hold_s=NEVER)
    poll = asyncio.ensure_future(made.stops())
    await asyncio.sleep(0)
    made.begin()
    for _ in range(9):
        await asyncio.sleep(0)
    assert not hung.is_set()
    poll.cancel()
    await hung.wait()


async def test_a_stop_is_told_at_once() -> None:
    """To the poll that is open, or to the next."""
    made = lease(asyncio.Event())
    poll = asyncio.ensure_future(made.stops())
    await asyncio.sleep(0)
    made.stop("a")
    assert await poll == ["a"]
    made.stop("b")
    made.stop("c")
    assert await made.stops() == ["b", "c"]
    made.end()


async def test_a_stop_is_told_again_and_then_no_more() -> None:
    """The SDK ignores it for a job that it has taken and not begun."""
    assert 1.5 < sum(REPEATS_S) < 2.5
    made = Lease("w", lambda: None, lease_s=NEVER, hold_s=0.05, repeats_s=(0, 0))
    made.stop("a")
    assert [await made.stops() for _ in range(4)] == [["a"], ["a"], ["a"], []]
    made.end()


async def test_a_poll_without_news_is_answered_after_a_while() -> None:
    """Never at once: the SDK would come back at once."""
    made = lease(asyncio.Event(), hold_s=0.01)
    began_s = asyncio.get_running_loop().time()
    assert await made.stops() == []
    assert asyncio.get_running_loop().time() - began_s >= 0.01
    made.end()


async def test_a_worker_that_leaves_is_answered_and_need_not_poll() -> None:
    """Its drain may be longer than a lease, and what it polls then is held as ever: jobs can be stopped."""
    made = lease(asyncio.Event())
    poll = asyncio.ensure_future(made.stops())
    await asyncio.sleep(0)
    made.leave()
    assert await poll == []
    draining = asyncio.ensure_future(made.stops())
    await asyncio.sleep(0)
    assert not draining.done()
    made.stop("a")
    assert await draining == ["a"]
    assert made._expiry is None
    made.end()
