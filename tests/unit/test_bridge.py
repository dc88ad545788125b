"""`handler.bridge`: a call from one event loop to another, each in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest

from handler.asgi import call_app
from handler.bridge import HIGH_WATER_BYTES, across
from handler.errors import BadRequest, RequestError
from handler.messages import Call, Headers, Reply, Request, once, read
from tests.asgi_client import turns
from tests.scripted_app import Fail, Pause, Script, ScriptedApp, answer, stream

T = TypeVar("T")

CHAT = "POST /v1/chat/completions"
REQUEST = Request("POST", "/v1/chat/completions", (("content-type", "application/json"),), b"{}")
PLAIN: Headers = (("content-type", "text/plain"),)


class There:
    """The other loop, which runs in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns, done there."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    def do(self, what: Callable[[], object]) -> None:
        """Have it done there, after all that was asked for before."""
        self.loop.call_soon_threadsafe(what)

    def block(self) -> threading.Event:
        """Let the loop stand still until the event is set."""
        begun, go_on = threading.Event(), threading.Event()

        def stand() -> None:
            begun.set()
            go_on.wait()

        self.do(stand)
        begun.wait()
        return go_on

    def tasks(self) -> set[asyncio.Task[Any]]:
        """What has not ended there."""
        return asyncio.all_tasks(self.loop)

    def cancel_all(self) -> None:
        """Cancel every task there, as the end of a loop does."""
        for task in self.tasks():
            task.cancel()

    def close(self) -> None:
        """End the thread."""
        self.do(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture
def there() -> Iterator[There]:
    """A loop on which nothing is left at the end."""
    other = There()
    try:
        yield other
        assert not other.tasks()
    finally:
        other.close()


@dataclass(slots=True)
class Work:
    """A call that yields what `make` makes, and is asked for on the other loop only."""

    make: Callable[[], AsyncIterator[bytes]]
    entering: Callable[[], Awaitable[None]] | None = None
    leaving: Callable[[], Awaitable[None]] | None = None
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def call(self, _: Request) -> AsyncIterator[Reply]:
        """As `Call` says."""
        self.entered.set()
        try:
            if self.entering is not None:
                await self.entering()
            yield Reply(200, PLAIN, self.make())
        finally:
            if self.leaving is not None:
                await self.leaving()
            self.left.set()


async def forever() -> None:
    """Wait for what never comes."""
    await asyncio.Event().wait()


def nothing() -> AsyncIterator[bytes]:
    """No body."""
    return once(b"")


async def answered(call: Call, request: Request = REQUEST) -> tuple[int, Headers, bytes]:
    """Status, headers and whole body."""
    async with call(request) as reply:
        return reply.status, reply.headers, await read(reply)


# --- what arrives -------------------------------------------------------------------------------


async def test_an_answer_crosses_as_it_is(there: There) -> None:
    """Status, headers and body, and the request on the way there."""
    app = ScriptedApp({CHAT: answer({"id": "é"}, 418, (("x-a", "1"),))})
    status, headers, body = await answered(across(call_app(app), there.loop))
    assert (status, dict(headers)["x-a"], json.loads(body)) == (418, "1", {"id": "é"})
    assert (app.seen[0].body, app.seen[0].path) == (b"{}", "/v1/chat/completions")
    app.finish()


async def test_a_body_may_be_empty(there: There) -> None:
    """Then it ends at once."""
    assert await answered(across(Work(nothing).call, there.loop)) == (200, PLAIN, b"")


async def test_the_first_frame_comes_at_once(there: There) -> None:
    """And each later one, while the next is not there yet."""
    app = ScriptedApp({CHAT: stream("1", Pause("a"), "2", Pause("b"), "3")})
    async with across(call_app(app), there.loop)(REQUEST) as reply:
        assert await anext(reply.frames) == b"data: 1\n\n"
        there.do(app.gate("a").opened.set)
        assert await anext(reply.frames) == b"data: 2\n\n"
        there.do(app.gate("b").opened.set)
        assert await read(reply) == b"data: 3\n\ndata: [DONE]\n\n"


async def test_what_has_come_meanwhile_is_one_piece(there: There) -> None:
    """A caller that was busy reads it at once, not chunk by chunk."""
    go_on, made = asyncio.Event(), asyncio.Event()

    async def make() -> AsyncIterator[bytes]:
        yield b"first;"
        await go_on.wait()
        for number in range(10):
            yield b"%d;" % number
        made.set()
        await forever()

    work = Work(make)
    async with across(work.call, there.loop)(REQUEST) as reply:
        assert await anext(reply.frames) == b"first;"
        there.do(go_on.set)
        await there.run(_wait(made))
        assert await anext(reply.frames) == b"0;1;2;3;4;5;6;7;8;9;"


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


async def test_a_slow_caller_holds_up_its_own_answer_only(there: There) -> None:
    """No more than the bound, and one chunk, is made ahead; once it was read, it goes on."""
    chunk = bytes(HIGH_WATER_BYTES // 4)
    made = 0

    async def make() -> AsyncIterator[bytes]:
        nonlocal made
        for _ in range(20):
            made += 1
            yield chunk

    app = ScriptedApp({CHAT: answer({})})
    async with across(Work(make).call, there.loop)(REQUEST) as reply:
        await there.run(turns(100))
        assert made == 5
        assert await answered(across(call_app(app), there.loop)) == (
            200,
            (("content-type", "application/json"),),
            b"{}",
        )
        assert await anext(reply.frames) == chunk * 5
        await there.run(turns(100))
        assert made == 10
        assert await read(reply) == chunk * 15


async def test_many_cross_at_once(there: There) -> None:
    """Each gets its own, whole and in order."""

    async def make(name: int) -> AsyncIterator[bytes]:
        for number in range(50):
            yield b"%d:%d;" % (name, number)
            await asyncio.sleep(0)

    @asynccontextmanager
    async def call(request: Request) -> AsyncIterator[Reply]:
        yield Reply(200, PLAIN, make(int(request.body)))

    crossed = across(call, there.loop)
    bodies = await asyncio.gather(
        *(answered(crossed, Request("POST", "/", (), b"%d" % name)) for name in range(50))
    )
    expected = [b"".join(b"%d:%d;" % (name, number) for number in range(50)) for name in range(50)]
    assert [body for _, _, body in bodies] == expected


# --- what fails ---------------------------------------------------------------------------------


async def test_a_refusal_crosses_as_it_is(there: There) -> None:
    """The very error, with its status and code."""
    refusal = BadRequest("no", param="x")

    async def refuse() -> None:
        raise refusal

    with pytest.raises(BadRequest) as raised:
        await answered(across(Work(nothing, entering=refuse).call, there.loop))
    assert raised.value is refusal


async def test_a_bug_is_an_internal_error(there: There, caplog: pytest.LogCaptureFixture) -> None:
    """The client hears no more of it, the log does."""

    async def fail() -> None:
        raise KeyError("secret")

    with pytest.raises(RequestError) as raised:
        await answered(across(Work(nothing, entering=fail).call, there.loop))
    assert (raised.value.status, raised.value.code) == (500, "internal_error")
    assert "secret" not in raised.value.message
    assert "KeyError" in caplog.text


async def test_an_application_that_fails_before_it_answers(there: There) -> None:
    """As without the bridge."""
    app = ScriptedApp({CHAT: Script((Fail(),))})
    with pytest.raises(RequestError) as raised:
        await answered(across(call_app(app), there.loop))
    assert raised.value.code == "internal_error"


@pytest.mark.parametrize("failure", [BadRequest("no"), KeyError("secret")])
async def test_a_failure_in_mid_stream_comes_after_what_was_made(there: There, failure: Exception) -> None:
    """Nothing that was made is lost, and the end is not taken for a good one."""

    async def make() -> AsyncIterator[bytes]:
        yield b"1"
        yield b"2"
        raise failure

    got = bytearray()

    async def gather(reply: Reply) -> None:
        async for chunk in reply.frames:
            got.extend(chunk)

    async with across(Work(make).call, there.loop)(REQUEST) as reply:
        with pytest.raises(RequestError) as raised:
            await gather(reply)
    assert got == b"12"
    assert raised.value is failure or raised.value.code == "internal_error"


# --- who leaves ---------------------------------------------------------------------------------


async def test_leaving_ends_the_work_and_waits_for_its_end(there: There) -> None:
    """Whoever has left knows that nothing of it runs any more."""

    async def make() -> AsyncIterator[bytes]:
        yield b"1"
        await forever()

    async def slowly() -> None:
        await turns(50)

    work = Work(make, leaving=slowly)
    async with across(work.call, there.loop)(REQUEST) as reply:
        assert await anext(reply.frames) == b"1"
    assert work.left.is_set()


async def test_the_application_sees_its_client_leave(there: There) -> None:
    """Which is how vLLM stops generating."""
    app = ScriptedApp({CHAT: stream("1", Pause("never"))})
    async with across(call_app(app), there.loop)(REQUEST) as reply:
        await anext(reply.frames)
    assert app.seen[0].ended == "disconnected"


async def test_leaving_ends_work_that_waits_for_a_reader(there: There) -> None:
    """It is as far ahead as it may be."""

    async def make() -> AsyncIterator[bytes]:
        while True:
            yield bytes(HIGH_WATER_BYTES)

    work = Work(make)
    async with across(work.call, there.loop)(REQUEST):
        await there.run(turns(50))
    assert work.left.is_set()


async def test_cancelled_while_it_waits_for_an_answer(there: There) -> None:
    """The work ends, and the caller is cancelled as it wanted."""
    work = Work(nothing, entering=forever)
    asking = asyncio.create_task(answered(across(work.call, there.loop)))
    await there.run(_wait(work.entered))
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert work.left.is_set()


async def test_cancelled_while_it_reads(there: There) -> None:
    """In mid-stream."""
    begun = asyncio.Event()

    async def make() -> AsyncIterator[bytes]:
        yield b"1"
        begun.set()
        await forever()

    work = Work(make)
    asking = asyncio.create_task(answered(across(work.call, there.loop)))
    await there.run(_wait(begun))
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert work.left.is_set()


async def test_cancelled_before_the_work_began(there: There) -> None:
    """The other loop is busy: once it is not, there is nothing left to do."""
    work = Work(nothing)
    go_on = there.block()
    asking = asyncio.create_task(answered(across(work.call, there.loop)))
    await turns()
    asking.cancel()
    await turns()
    assert not asking.done()  # it waits for the end of what has not begun
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert not work.entered.is_set()


async def test_the_other_loop_ends_the_work(there: There) -> None:
    """As a loop does that is closed: the caller hears an error and does not wait for ever."""
    work = Work(nothing, entering=forever)
    asking = asyncio.create_task(answered(across(work.call, there.loop)))
    await there.run(_wait(work.entered))
    there.do(there.cancel_all)
    with pytest.raises(RequestError) as raised:
        await asking
    assert raised.value.code == "internal_error"


async def test_the_other_loop_ends_the_work_before_its_first_step(there: There) -> None:
    """Then the work itself can't tell."""
    work = Work(nothing)
    go_on = there.block()
    asking = asyncio.create_task(answered(across(work.call, there.loop)))
    await turns()
    there.do(there.cancel_all)
    go_on.set()
    with pytest.raises(RequestError) as raised:
        await asking
    assert (raised.value.code, work.entered.is_set()) == ("internal_error", False)


async def test_the_other_loop_ends_a_stream(there: There) -> None:
    """What was made is read first."""

    async def make() -> AsyncIterator[bytes]:
        yield b"1"
        await forever()

    async with across(Work(make).call, there.loop)(REQUEST) as reply:
        assert await anext(reply.frames) == b"1"
        there.do(there.cancel_all)
        with pytest.raises(RequestError):
            await anext(reply.frames)


async def test_a_loop_that_is_closed_takes_nothing() -> None:
    """It says so, instead of letting the caller wait."""
    there = There()
    there.close()
    with pytest.raises(RuntimeError, match="closed"):
        await answered(across(Work(nothing).call, there.loop))
