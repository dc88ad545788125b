"""`handler.waiting`: how many wait, how long, and what a stream hears meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from handler import sse
from handler.errors import DeadlineExceeded, NotAdmitted
from handler.messages import PATIENCE_S, Reply, Request, Visit, once, read
from handler.waiting import Room, kept_alive
from tests.asgi_client import turns

STREAM = Request("POST", "/v1/completions", (), b'{"stream": true}')
NEVER = 3600.0
LONG_AGO_S = time.monotonic() - NEVER


class Turn:
    """What is waited for, until the test says so."""

    def __init__(self) -> None:
        self.come = asyncio.Event()
        self.room = Room(limit=2, limit_bytes=10)

    def waits(
        self, size_bytes: int = 0, *, visit: Visit | None = None, timeout_s: float = NEVER
    ) -> asyncio.Task[None]:
        """A request of that size that waits."""
        request = Request("POST", "/", (), b"x" * size_bytes, visit=visit or Visit())
        return asyncio.create_task(
            self.room.wait(self.come.wait, request, timeout_s=timeout_s, retry_after_s=lambda: 7)
        )


async def test_no_more_wait_than_there_are_places() -> None:
    """One more is refused and told when to come again; who leaves makes room."""
    on = Turn()
    first, second = on.waits(), on.waits()
    await turns()
    with pytest.raises(NotAdmitted, match="2 requests already wait") as refused:
        await on.waits()
    assert refused.value.headers == (("retry-after", "7"),)
    first.cancel()
    await turns()
    third = on.waits()
    await turns()
    assert on.room.waiting == 2
    on.come.set()
    await asyncio.gather(second, third)
    assert on.room.waiting == 0


async def test_no_more_bytes_wait_than_may() -> None:
    """A large body is refused although there is a place; one that is alone always waits."""
    on = Turn()
    first = on.waits(20)
    await turns()
    with pytest.raises(NotAdmitted):
        await on.waits(1)
    on.come.set()
    await first
    on.come.clear()
    waiting = [on.waits(5), on.waits(5)]
    await turns()
    on.come.set()
    await asyncio.gather(*waiting)


async def test_who_was_admitted_before_has_a_place() -> None:
    """Whatever the bound."""
    on = Turn()
    waiting = [on.waits(9), on.waits(), on.waits(9, visit=Visit(admitted=True))]
    await turns()
    assert on.room.waiting == 3
    on.come.set()
    await asyncio.gather(*waiting)


@pytest.mark.parametrize(
    ("visit", "late"),
    [
        (Visit(arrived_s=LONG_AGO_S), True),
        (Visit(arrived_s=LONG_AGO_S, admitted=True), True),
        (Visit(arrived_s=LONG_AGO_S, worked_s=NEVER), True),
        (Visit(), False),
    ],
)
async def test_all_waits_have_one_deadline(visit: Visit, late: bool) -> None:
    """It counts from the arrival, wherever the request has waited since."""
    on = Turn()
    waiting = on.waits(visit=visit, timeout_s=300)
    if late:
        with pytest.raises(DeadlineExceeded, match="did not come within 300 s") as ended:
            await waiting
        assert ended.value.headers == (("retry-after", "7"),)
    on.come.set()
    await turns()
    assert waiting.done()


def test_what_a_lost_worker_took_is_no_waiting() -> None:
    """But nobody waits longer than a client does."""
    assert Visit(arrived_s=1000).deadline_s(300) == 1300
    assert Visit(arrived_s=1000, worked_s=200).deadline_s(300) == 1500
    assert Visit(arrived_s=1000, worked_s=400).deadline_s(300) == 1000 + PATIENCE_S


async def test_a_request_arrives_when_it_is_made() -> None:
    """On the clock of the loop, any loop; two that differ in nothing else are the same."""
    before_s = asyncio.get_running_loop().time()
    request = Request("GET", "/")
    assert before_s <= request.visit.arrived_s <= time.monotonic()
    assert request == Request("GET", "/")


@pytest.mark.parametrize("fails", [False, True])
async def test_an_answer_is_left_in_the_task_that_entered_it(fails: bool) -> None:
    """As whoever counts tasks and bounds times needs it, and told whether it was left in peace."""
    tasks: list[asyncio.Task[None] | None] = []
    left: list[type[BaseException] | None] = []

    @asynccontextmanager
    async def call(_: Request) -> AsyncIterator[Reply]:
        tasks.append(asyncio.current_task())
        try:
            yield Reply(200, (), once(b"a"))
        except BaseException as error:
            left.append(type(error))
            raise
        finally:
            tasks.append(asyncio.current_task())

    try:
        async with kept_alive(call, 60)(STREAM) as reply:
            assert await read(reply) == b"a"
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert tasks[0] is tasks[1]
    assert left == ([asyncio.CancelledError] if fails else [])


async def test_what_fails_as_it_is_left_is_raised() -> None:
    """As if nobody stood between."""

    @asynccontextmanager
    async def call(_: Request) -> AsyncIterator[Reply]:
        yield Reply(200, (), once(b"a"))
        raise NotAdmitted("no", retry_after_s=1)

    with pytest.raises(NotAdmitted):
        async with kept_alive(call, 60)(STREAM) as reply:
            assert await read(reply) == b"a"


async def test_what_fails_early_is_raised_and_late_is_the_end_of_the_stream() -> None:
    """The client has the status, or has heard comments."""
    failing = asyncio.Event()

    @asynccontextmanager
    async def call(_: Request) -> AsyncIterator[Reply]:
        await failing.wait()
        if failing.is_set():
            raise NotAdmitted("no", retry_after_s=1)
        yield Reply(200, (), once(b""))

    async with kept_alive(call, 0.001)(STREAM) as reply:
        assert await anext(reply.frames) == sse.KEEP_ALIVE
        failing.set()
        with pytest.raises(NotAdmitted):
            await read(reply)
    with pytest.raises(NotAdmitted):
        async with kept_alive(call, 60)(STREAM):
            pass
