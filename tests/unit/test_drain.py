"""`handler.drain`: refuse what comes, finish what runs, end the rest with a proper error."""

from __future__ import annotations

import asyncio
import json

import pytest

from handler import sse
from handler.asgi import call_app, serve
from handler.drain import Drain
from handler.errors import NotAdmitted
from handler.messages import Call, Request, read
from tests.asgi_client import exchange, turns
from tests.scripted_app import Pause, Script, ScriptedApp, answer, stream

CHAT = "POST /v1/chat/completions"
REQUEST = Request("POST", "/v1/chat/completions")
STOPPED = {
    "error": {
        "message": "The worker stopped before this answer was complete.",
        "type": "server_error",
        "param": None,
        "code": "worker_stopping",
    }
}


async def whole(call: Call) -> tuple[int, bytes]:
    """Status and body of what `call` answers."""
    async with call(REQUEST) as reply:
        return reply.status, await read(reply)


async def test_an_idle_drain_ends_at_once() -> None:
    """With nothing in flight there is nothing to wait for and nothing to end."""
    drain = Drain()
    assert await drain.finish(0) == 0


async def test_a_stopping_worker_refuses() -> None:
    """503 with Retry-After, so that the client asks another worker, and the app is not asked."""
    app = ScriptedApp({})
    drain = Drain()
    call = drain.wrap(call_app(app))
    await drain.finish(0)
    with pytest.raises(NotAdmitted) as refused:
        await whole(call)
    assert refused.value.body()["error"] == {
        "message": "The worker is stopping.",
        "type": "server_error",
        "param": None,
        "code": "worker_stopping",
    }
    assert refused.value.headers == (("retry-after", "1"),)
    assert app.seen == []


async def test_in_flight_counts_from_the_request_to_the_end_of_its_answer() -> None:
    """A request waits or is read: both are held, and neither once it is over."""
    app = ScriptedApp({CHAT: stream(Pause("prefill"), "1", Pause("decode"), "2")})
    drain = Drain()
    answering = asyncio.create_task(whole(drain.wrap(call_app(app))))
    await app.gate("prefill").reached.wait()
    assert drain.in_flight == 1
    app.gate("prefill").opened.set()
    await app.gate("decode").reached.wait()
    assert drain.in_flight == 1
    app.gate("decode").opened.set()
    assert await answering == (200, b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n")
    assert drain.in_flight == 0


async def test_what_runs_is_finished() -> None:
    """A drain waits for the whole answer of what was taken before it began."""
    app = ScriptedApp({CHAT: stream("1", Pause("decode"), "2")})
    drain = Drain()
    call = drain.wrap(call_app(app))
    answering = asyncio.create_task(whole(call))
    await app.gate("decode").reached.wait()
    finishing = asyncio.create_task(drain.finish(60))
    await turns()
    assert not finishing.done()
    with pytest.raises(NotAdmitted):
        await whole(call)
    app.gate("decode").opened.set()
    assert await finishing == 0
    assert await answering == (200, b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n")


def served(drain: Drain, app: ScriptedApp) -> Call:
    """`app` behind `drain` and the ASGI adapter, as on a worker."""
    return call_app(serve(drain.wrap(call_app(app)), max_body_bytes=100))


async def test_a_stream_past_the_deadline_ends_with_an_error_frame() -> None:
    """What was said stays, the error is the last frame, and the app stops generating."""
    app = ScriptedApp({CHAT: stream("1", Pause("never"))})
    drain = Drain()
    async with served(drain, app)(REQUEST) as reply:
        begun = await anext(reply.frames)
        assert await drain.finish(0) == 1
        rest = await read(reply)
    assert (reply.status, begun) == (200, b"data: 1\n\n")
    assert [sse.data(frame) for frame in sse.split(rest)] == [STOPPED]
    assert app.seen[0].ended == "disconnected"
    assert drain.in_flight == 0


async def test_a_wait_past_the_deadline_is_answered_503() -> None:
    """Nothing was said yet, so the status tells what happened and when to ask again."""
    app = ScriptedApp({CHAT: Script((Pause("never"),))})
    drain = Drain()
    answering = asyncio.create_task(_headers_and_body(served(drain, app)))
    await app.gate("never").reached.wait()
    assert await drain.finish(0) == 1
    status, retry_after, body = await answering
    assert (status, retry_after, json.loads(body)) == (503, "1", STOPPED)
    assert app.seen[0].ended == "disconnected"


async def _headers_and_body(call: Call) -> tuple[int, str | None, bytes]:
    async with call(REQUEST) as reply:
        return reply.status, reply.header("retry-after"), await read(reply)


async def test_several_past_the_deadline_are_all_ended() -> None:
    """The count is of those that did not finish by themselves."""
    app = ScriptedApp({CHAT: [stream("1", Pause("a")), stream("1", Pause("b")), answer({})]})
    drain = Drain()
    call = served(drain, app)
    async with call(REQUEST) as first, call(REQUEST) as second:
        await anext(first.frames)
        await anext(second.frames)
        await whole(call)
        assert await drain.finish(0) == 2
        assert sse.data(await read(first)) == STOPPED
        assert sse.data(await read(second)) == STOPPED


async def test_a_client_that_leaves_is_not_answered_with_the_drain() -> None:
    """Cancelled from outside, a request ends as cancelled, also after the deadline of a drain."""
    app = ScriptedApp({CHAT: stream("1", Pause("never"))})
    drain = Drain()
    async with drain.wrap(call_app(app))(REQUEST) as reply:
        await anext(reply.frames)
    assert drain.in_flight == 0
    assert await drain.finish(0) == 0
    assert app.seen[0].ended == "disconnected"


async def test_a_cancelled_request_stays_cancelled() -> None:
    """Before the deadline a cancellation is the caller's own and passes through."""
    app = ScriptedApp({CHAT: stream("1", Pause("never"))})
    answering = asyncio.create_task(whole(Drain().wrap(call_app(app))))
    await app.gate("never").reached.wait()
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering


async def test_a_client_that_reads_no_more_can_not_hold_the_drain() -> None:
    """At the deadline its request is let go; should it read again, the error is what it reads."""
    app = ScriptedApp({CHAT: stream("1", Pause("decode"), "2", Pause("never"))})
    drain = Drain()
    async with exchange(serve(drain.wrap(call_app(app)), max_body_bytes=100)) as client:
        await client.heard(2)
        client.hold()
        app.gate("decode").opened.set()
        await app.gate("never").reached.wait()
        await turns()
        assert await drain.finish(0) == 1
        assert app.seen[0].ended == "disconnected"
        await client.go_on()
        await client.over()
    assert client.status == 200
    assert [sse.data(frame) for frame in sse.split(client.answer)] == [1, STOPPED]


async def test_a_deadline_before_the_status_was_sent_is_a_503() -> None:
    """A client that takes its time before the first byte still gets a status that says why."""
    app = ScriptedApp({CHAT: stream("1", Pause("never"))})
    drain = Drain()
    async with exchange(serve(drain.wrap(call_app(app)), max_body_bytes=100)) as client:
        client.hold()
        await app.gate("never").reached.wait()
        await turns()
        assert await drain.finish(0) == 1
        await client.go_on()
        await client.over()
    assert (client.status, json.loads(client.answer)) == (503, STOPPED)
