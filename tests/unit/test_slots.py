"""`handler.slots`: at most so many at once, the others in their turn."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from handler.asgi import call_app
from handler.errors import DeadlineExceeded, NotAdmitted, RequestError
from handler.messages import Call, Request, Visit, read
from handler.slots import limit
from tests.asgi_client import turns
from tests.scripted_app import Fail, Pause, Script, ScriptedApp, answer, stream

CHAT = "POST /v1/chat/completions"


def asking(call: Call, n: int = 0, visit: Visit | None = None) -> asyncio.Task[bytes]:
    """A chat request that can be told from others by `n`, being answered."""
    body = json.dumps(n).encode()

    async def ask() -> bytes:
        request = Request("POST", "/v1/chat/completions", (), body, visit=visit or Visit())
        async with call(request) as reply:
            return await read(reply)

    return asyncio.create_task(ask())


async def test_as_many_as_there_are_slots_and_then_in_order() -> None:
    """A slot is free once the answer was read to its end."""
    app = ScriptedApp({CHAT: [stream(Pause("a")), stream(Pause("b")), answer(3), answer(4)]})
    call = limit(call_app(app), 2)
    tasks = [asking(call, n) for n in range(4)]
    await turns()
    assert [json.loads(seen.body) for seen in app.seen] == [0, 1]
    app.gate("b").opened.set()
    assert [await task for task in tasks[1:]] == [b"data: [DONE]\n\n", b"3", b"4"]
    assert [json.loads(seen.body) for seen in app.seen] == [0, 1, 2, 3]
    app.gate("a").opened.set()
    await tasks[0]
    app.finish()


async def test_what_only_asks_never_waits() -> None:
    """`GET /v1/models` makes no token."""
    app = ScriptedApp({CHAT: stream(Pause("never")), "GET /v1/models": answer({"data": []})})
    call = limit(call_app(app), 1)
    running = asking(call)
    await app.gate("never").reached.wait()
    async with call(Request("GET", "/v1/models")) as reply:
        assert await read(reply) == b'{"data": []}'
    running.cancel()
    await asyncio.wait({running})


@pytest.mark.parametrize("waits", [False, True], ids=["runs", "waits"])
async def test_who_leaves_makes_room(waits: bool) -> None:
    """Whether it has a slot or waits for one."""
    app = ScriptedApp({CHAT: [stream(Pause("a")), answer(1), answer(2)]})
    call = limit(call_app(app), 1)
    first, second, third = asking(call), asking(call), asking(call)
    await app.gate("a").reached.wait()
    gone, left = (second, [first, third]) if waits else (first, [second, third])
    gone.cancel()
    await asyncio.wait({gone})
    app.gate("a").opened.set()
    expected = [b"data: [DONE]\n\n", b"1"] if waits else [b"1", b"2"]
    assert await asyncio.gather(*left) == expected


async def test_no_more_wait_than_may() -> None:
    """One more is told to come again; who was let in elsewhere is not."""
    app = ScriptedApp({CHAT: [stream(Pause("a")), answer(1), answer(2)]})
    call = limit(call_app(app), 1, waiting_max=1)
    first, second = asking(call), asking(call)
    await app.gate("a").reached.wait()
    with pytest.raises(NotAdmitted) as refused:
        await asking(call)
    assert refused.value.headers == (("retry-after", "5"),)
    third = asking(call, visit=Visit(admitted=True))
    await turns()
    app.gate("a").opened.set()
    assert [await task for task in (first, second, third)] == [b"data: [DONE]\n\n", b"1", b"2"]


async def test_nobody_waits_for_ever() -> None:
    """Counted from the arrival; whoever has waited elsewhere waits less here. Its place is free again."""
    app = ScriptedApp({CHAT: [stream(Pause("a")), answer(1)]})
    call = limit(call_app(app), 1, waiting_max=1)
    first = asking(call)
    await app.gate("a").reached.wait()
    with pytest.raises(DeadlineExceeded):
        await asking(call, visit=Visit(arrived_s=time.monotonic() - 591))
    second = asking(call)
    await turns()
    app.gate("a").opened.set()
    assert [await task for task in (first, second)] == [b"data: [DONE]\n\n", b"1"]


async def test_a_call_that_fails_makes_room() -> None:
    """The next one has its slot."""
    app = ScriptedApp({CHAT: [Script((Fail(),)), answer(1)]})
    call = limit(call_app(app), 1)
    with pytest.raises(RequestError):
        await asking(call)
    assert await asking(call) == b"1"
