"""`handler.asgi`: an application as a `Call`, a `Call` as an application, and one as the other."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler import sse
from handler.asgi import HIGH_WATER_BYTES, App, Message, Receive, Send, call_app, refuse, serve
from handler.errors import Forbidden, RequestError, UpstreamFailed
from handler.messages import Call, Headers, Reply, Request, once, read
from tests.asgi_client import exchange, turns
from tests.scripted_app import EVENT_STREAM, JSON, Fail, Pause, Say, Script, ScriptedApp, answer, stream

CHAT = "POST /v1/chat/completions"
REQUEST = Request("POST", "/v1/chat/completions")


def app_of(call: Call, *, max_body_bytes: int = 100) -> App:
    """`call` as an application."""
    return serve(call, max_body_bytes=max_body_bytes)


def replying(status: int, headers: Headers, frames: AsyncIterator[bytes]) -> Call:
    """The call that gives this reply to anyone."""

    @asynccontextmanager
    async def call(_: Request) -> AsyncIterator[Reply]:
        yield Reply(status, headers, frames)

    return call


# --- call_app ---------------------------------------------------------------------------------


async def test_an_application_sees_the_request_as_it_is() -> None:
    """Method, path, query, headers in order, and the whole body in one piece."""
    app = ScriptedApp({"PUT /v1/\u00e9 x": answer({})})
    headers = (("x-a", "1"), ("x-a", "2"), ("x-latin", "\u00e9"))
    async with call_app(app)(Request("PUT", "/v1/\u00e9 x", headers, b"body", "a=1&b=%20")):
        pass
    seen = app.seen[0]
    assert (seen.method, seen.path, seen.query, seen.headers, seen.body) == (
        "PUT",
        "/v1/\u00e9 x",
        "a=1&b=%20",
        headers,
        b"body",
    )


async def test_a_server_may_have_us_below_a_folder() -> None:
    """Ray Serve's `route_prefix` is ASGI's `root_path`, with which a path begins."""
    seen: list[str] = []

    @asynccontextmanager
    async def call(request: Request) -> AsyncIterator[Reply]:
        seen.append(request.path)
        yield Reply(200, (), once(b""))

    app = app_of(call)

    async def below(scope: Message, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": "/one", "path": "/one" + scope["path"]}, receive, send)

    async with call_app(below)(Request("GET", "/v1/models")):
        pass
    assert seen == ["/v1/models"]


async def test_status_and_headers_come_back_in_order() -> None:
    """Names in lower case, repeated ones kept."""
    script = Script(
        (Say("x"),), 418, (("X-B", "1"), ("Set-Cookie", "a"), ("set-cookie", "b"), ("X-L", "\u00e9"))
    )
    async with call_app(ScriptedApp({CHAT: script}))(REQUEST) as reply:
        assert reply.status == 418
        assert reply.headers == (("x-b", "1"), ("set-cookie", "a"), ("set-cookie", "b"), ("x-l", "\u00e9"))


async def test_an_answer_without_body_is_whole() -> None:
    """Its status is known and it has no frames."""
    async with call_app(ScriptedApp({CHAT: Script((), 204, ())}))(REQUEST) as reply:
        assert (reply.status, [chunk async for chunk in reply.frames]) == (204, [])


async def test_frames_arrive_as_they_are_made() -> None:
    """Each is there before the next one exists."""
    app = ScriptedApp({CHAT: stream("1", Pause("a"), "2", Pause("b"), "3")})
    async with call_app(app)(REQUEST) as reply:
        assert await anext(reply.frames) == b"data: 1\n\n"
        app.gate("a").opened.set()
        assert await anext(reply.frames) == b"data: 2\n\n"
        app.gate("b").opened.set()
        assert await read(reply) == b"data: 3\n\ndata: [DONE]\n\n"


async def test_what_is_ready_travels_together() -> None:
    """Frames that were made while nobody read are one chunk."""
    app = ScriptedApp({CHAT: stream("1", "2", "3", Pause("a"), "4")})
    async with call_app(app)(REQUEST) as reply:
        await app.gate("a").reached.wait()
        assert await anext(reply.frames) == b"data: 1\n\ndata: 2\n\ndata: 3\n\n"
        app.gate("a").opened.set()
        assert await read(reply) == b"data: 4\n\ndata: [DONE]\n\n"


async def test_a_stream_is_regrouped_to_whole_frames() -> None:
    """However the application cuts it."""
    steps = (Say("da"), Say("ta: 1\n"), Pause("a"), Say("\nda"), Pause("b"), Say("ta: 2\n\n"))
    app = ScriptedApp({CHAT: Script(steps, 200, EVENT_STREAM)})
    async with call_app(app)(REQUEST) as reply:
        app.gate("a").opened.set()
        assert await anext(reply.frames) == b"data: 1\n\n"
        app.gate("b").opened.set()
        assert await read(reply) == b"data: 2\n\n"


async def test_a_reader_that_is_slow_holds_its_application() -> None:
    """Once the high-water mark is passed a `send` waits until what there is was taken."""
    large = "x" * HIGH_WATER_BYTES
    steps = (Say(large), Pause("at the mark"), Say("y"), Pause("above"), Say("z"))
    app = ScriptedApp({CHAT: Script(steps, 200, JSON)})
    async with call_app(app)(REQUEST) as reply:
        await app.gate("at the mark").reached.wait()
        app.gate("at the mark").opened.set()
        await turns()
        assert not app.gate("above").reached.is_set()
        assert await anext(reply.frames) == (large + "y").encode()
        await app.gate("above").reached.wait()
        app.gate("above").opened.set()
        assert await read(reply) == b"z"


async def test_leaving_frees_an_application_that_was_held() -> None:
    """Its `send` returns, and it learns that nobody reads."""
    app = ScriptedApp({CHAT: Script((Say("x" * (HIGH_WATER_BYTES + 1)), Pause("never")), 200, JSON)})
    async with call_app(app)(REQUEST):
        pass
    assert app.seen[0].ended == "disconnected"


async def test_leaving_in_mid_stream_disconnects() -> None:
    """The block is left only after the application has gone."""
    app = ScriptedApp({CHAT: stream("1", Pause("never"))})
    async with call_app(app)(REQUEST) as reply:
        await anext(reply.frames)
    assert app.seen[0].ended == "disconnected"


async def test_cancelling_a_wait_disconnects() -> None:
    """Also before there is a status."""
    app = ScriptedApp({CHAT: Script((Pause("never"),))})

    async def ask() -> None:
        async with call_app(app)(REQUEST):
            raise AssertionError("answered")

    asking = asyncio.create_task(ask())
    await app.gate("never").reached.wait()
    asking.cancel()
    await asyncio.wait({asking})
    assert asking.cancelled()
    assert app.seen[0].ended == "disconnected"


async def test_an_application_that_ignores_the_disconnect_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a grace, so that vLLM's handlers can stop what they started."""
    monkeypatch.setattr("handler.asgi.LEAVE_GRACE_S", 0)
    ended = asyncio.Event()

    async def deaf(_: Message, __: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"1", "more_body": True})
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with call_app(deaf)(REQUEST) as reply:
        await anext(reply.frames)
    await ended.wait()


async def test_what_is_said_after_leaving_is_dropped() -> None:
    """An application that sends on while it winds up neither waits nor fails."""
    sent = asyncio.Event()

    async def chatty(_: Message, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.body", "body": b"x" * 10 * HIGH_WATER_BYTES, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        sent.set()

    async with call_app(chatty)(REQUEST) as reply:
        await anext(reply.frames)
    assert sent.is_set()


async def test_a_failure_before_the_status_is_an_answerable_error(caplog: pytest.LogCaptureFixture) -> None:
    """The caller gets a `RequestError` of status 500 that names no internals; the log has them."""
    with pytest.raises(RequestError) as failed:
        async with call_app(ScriptedApp({CHAT: Script((Fail(),))}))(REQUEST):
            raise AssertionError("answered")
    assert failed.value.status == 500
    assert "script" not in failed.value.message
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.ERROR, "application failed")
    ]


async def test_a_failure_of_the_application_is_not_the_death_of_the_engine() -> None:
    """`engine_dead` tells a client that this worker is gone; a bug in one answer is less."""
    with pytest.raises(RequestError) as failed:
        async with call_app(ScriptedApp({CHAT: Script((Fail(),))}))(REQUEST):
            raise AssertionError("answered")
    assert failed.value.code == "internal_error"


async def test_a_failure_in_mid_stream_comes_after_what_was_said() -> None:
    """The frames that were made are read first, then the error is raised."""
    app = ScriptedApp({CHAT: Script((Say("data: 1\n\n"), Say("data: cut"), Fail()), 200, EVENT_STREAM)})
    async with call_app(app)(REQUEST) as reply:
        assert await anext(reply.frames) == b"data: 1\n\n"
        with pytest.raises(RequestError) as failed:
            await anext(reply.frames)
    assert failed.value.status == 500


async def test_an_application_that_ends_early_has_failed() -> None:
    """An answer without its last message is not taken for a whole one."""

    async def short(_: Message, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})

    async with call_app(short)(REQUEST) as reply:
        assert await anext(reply.frames) == b"1"
        with pytest.raises(RequestError, match="before it was complete"):
            await anext(reply.frames)


async def test_an_application_that_says_nothing_has_failed() -> None:
    """Nobody waits for a status that never comes."""

    async def mute(_: Message, __: Receive, ___: Send) -> None:
        """Return."""

    with pytest.raises(RequestError, match="before it was complete"):
        async with call_app(mute)(REQUEST):
            raise AssertionError("answered")


async def test_a_request_error_of_the_application_stays_what_it_is() -> None:
    """Our own layers below may be applications too."""

    async def refusing(_: Message, __: Receive, ___: Send) -> None:
        raise Forbidden("no")

    with pytest.raises(Forbidden, match="no"):
        async with call_app(refusing)(REQUEST):
            raise AssertionError("answered")


# --- keep-alive comments ------------------------------------------------------------------------

TICK_S = 0.001


@asynccontextmanager
async def clock() -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """Waits for a number of intervals: each is one comment of another silent stream."""
    silent = ScriptedApp({CHAT: Script((Say(":\n\n"), Pause("never")), 200, EVENT_STREAM)})
    async with call_app(silent, keep_alive_s=TICK_S)(REQUEST) as reply:

        async def pass_by(intervals: int) -> None:
            for _ in range(intervals):
                await anext(reply.frames)

        yield pass_by


async def test_a_silent_stream_gets_comments() -> None:
    """While nothing happens in mid-stream, and what follows is untouched."""
    app = ScriptedApp({CHAT: stream("1", Pause("a"), "2")})
    async with call_app(app, keep_alive_s=TICK_S)(REQUEST) as reply:
        assert await anext(reply.frames) == b"data: 1\n\n"
        assert await anext(reply.frames) == sse.KEEP_ALIVE
        assert await anext(reply.frames) == sse.KEEP_ALIVE
        app.gate("a").opened.set()
        assert (await read(reply)).replace(sse.KEEP_ALIVE, b"") == b"data: 2\n\ndata: [DONE]\n\n"


async def test_a_prefill_gets_comments() -> None:
    """vLLM says its status before it has a token: from then on the stream counts as silent."""

    async def prefilling(_: Message, receive: Receive, send: Send) -> None:
        await receive()
        headers = [(b"Content-Type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await receive()

    async with call_app(prefilling, keep_alive_s=TICK_S)(REQUEST) as reply:
        assert reply.status == 200
        assert await anext(reply.frames) == sse.KEEP_ALIVE


async def test_what_is_no_stream_gets_no_comments() -> None:
    """A JSON answer that takes its time is not touched."""
    app = ScriptedApp({CHAT: Script((Say("{"), Pause("a"), Say("}")), 200, JSON)})
    async with call_app(app, keep_alive_s=TICK_S)(REQUEST) as reply, clock() as pass_by:
        await app.gate("a").reached.wait()
        await pass_by(3)
        app.gate("a").opened.set()
        assert await read(reply) == b"{}"


async def test_no_comment_cuts_a_frame() -> None:
    """Half a frame waits for its end, however long that takes."""
    app = ScriptedApp({CHAT: Script((Say("data: 1\n\ndata: "), Pause("a"), Say("2\n\n")), 200, EVENT_STREAM)})
    async with call_app(app, keep_alive_s=TICK_S)(REQUEST) as reply, clock() as pass_by:
        assert await anext(reply.frames) == b"data: 1\n\n"
        await pass_by(3)
        app.gate("a").opened.set()
        assert [frame for frame in sse.split(await read(reply)) if frame != sse.KEEP_ALIVE] == [
            b"data: 2\n\n"
        ]


async def test_without_an_interval_there_are_no_comments() -> None:
    """0 turns them off."""
    app = ScriptedApp({CHAT: stream("1", Pause("a"), "2")})
    async with call_app(app, keep_alive_s=0)(REQUEST) as reply, clock() as pass_by:
        await app.gate("a").reached.wait()
        await pass_by(3)
        app.gate("a").opened.set()
        assert await read(reply) == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"


# --- serve ------------------------------------------------------------------------------------


async def test_a_request_reaches_the_call_whole() -> None:
    """Names of headers in lower case, the body joined from its pieces, the query as sent."""
    seen: list[Request] = []

    @asynccontextmanager
    async def call(request: Request) -> AsyncIterator[Reply]:
        seen.append(request)
        yield Reply(200, (), once(b""))

    headers = (("X-A", "1"), ("x-a", "\u00e9"))
    async with exchange(app_of(call), "PUT", "/v1/\u00e9", headers, [b"12", b"", b"3"], "a=%20") as client:
        await client.over()
    assert seen == [Request("PUT", "/v1/\u00e9", (("x-a", "1"), ("x-a", "\u00e9")), b"123", "a=%20")]


async def test_a_reply_is_rendered_frame_by_frame() -> None:
    """Status and headers first, then one message for each chunk, then the end."""
    frames = sse.frames(_arriving([b"data: 1\n\n", b"data: 2\n\n"]))
    async with exchange(app_of(replying(201, (("x-b", "\u00e9"),), frames))) as client:
        assert await client.over() == [
            {"type": "http.response.start", "status": 201, "headers": [(b"x-b", b"\xe9")]},
            {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True},
            {"type": "http.response.body", "body": b"data: 2\n\n", "more_body": True},
            {"type": "http.response.body", "body": b""},
        ]


async def _arriving(chunks: list[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def test_a_slow_client_holds_its_own_stream() -> None:
    """No frame is asked for before the one in front of it was sent."""
    made: list[int] = []

    async def numbers() -> AsyncIterator[bytes]:
        for number in range(3):
            made.append(number)
            yield b"%d" % number

    async with exchange(app_of(replying(200, (), numbers()))) as client:
        for messages, numbers_made in ((0, []), (1, [0]), (2, [0, 1])):
            client.hold(after=messages)
            await client.heard(messages)
            await turns()
            assert made == numbers_made
            await client.go_on()
        await client.over()
    assert client.answer == b"012"


@pytest.mark.parametrize("begun", [False, True], ids=["waiting", "in mid-stream"])
async def test_a_client_that_leaves_cancels_its_call(begun: bool) -> None:
    """At once, and nothing is sent to it any more."""
    steps = ("1", Pause("never")) if begun else (Pause("never"),)
    app = ScriptedApp({CHAT: stream(*steps)})
    async with exchange(app_of(call_app(app))) as client:
        await app.gate("never").reached.wait()
        said = await client.heard(2 if begun else 0)
        client.leave()
        assert await client.over() == said
    assert app.seen[0].ended == "disconnected"


async def test_a_client_that_leaves_before_its_body_is_whole_was_never_there() -> None:
    """The call is not made and nothing is answered."""
    app = ScriptedApp({})
    async with exchange(app_of(call_app(app)), parts=None) as client:
        client.body(b"half", more=True)
        client.leave()
        assert await client.over() == []
    assert app.seen == []


async def test_a_server_that_cancels_cancels_the_call() -> None:
    """uvicorn does so when its own deadline for a shutdown has passed."""
    app = ScriptedApp({CHAT: stream("1", Pause("never"))})
    async with exchange(app_of(call_app(app))) as client:
        await client.heard(2)
        client.task.cancel()
        await asyncio.wait({client.task})
        assert client.task.cancelled()
    assert app.seen[0].ended == "disconnected"


async def test_an_error_before_the_status_is_a_whole_reply() -> None:
    """With the status and the headers of the error."""
    async with exchange(app_of(refuse(UpstreamFailed("gone", headers=(("x-a", "1"),))))) as client:
        await client.over()
    assert client.status == 502
    assert client.headers == {"content-type": "application/json", "content-length": "88", "x-a": "1"}
    assert json.loads(client.answer)["error"]["code"] == "upstream_failed"


async def test_an_error_in_mid_stream_is_the_last_frame() -> None:
    """What was said stays, the half frame is gone, and no `[DONE]` follows."""
    app = ScriptedApp({CHAT: Script((Say("data: 1\n\ndata: cut"), Pause("a"), Fail()), 200, EVENT_STREAM)})
    async with exchange(app_of(call_app(app))) as client:
        await client.heard(2)
        app.gate("a").opened.set()
        await client.over()
    first, last = sse.split(client.answer)
    assert client.status == 200
    assert first == b"data: 1\n\n"
    assert sse.data(last)["error"]["type"] == "server_error"


async def test_an_error_in_mid_answer_is_raised_to_the_server() -> None:
    """Half a JSON body can't be mended: the server cuts the connection, and the client knows."""
    app = ScriptedApp({CHAT: Script((Say("{"), Pause("a"), Fail()), 200, JSON)})
    async with exchange(app_of(call_app(app))) as client:
        await client.heard(2)
        app.gate("a").opened.set()
        with pytest.raises(RequestError):
            await client.over()
    assert client.sent[-1]["more_body"] is True


async def test_an_error_after_the_end_is_not_sent() -> None:
    """The answer is whole; what fails while its call is left concerns nobody."""

    @asynccontextmanager
    async def call(_: Request) -> AsyncIterator[Reply]:
        yield Reply(200, EVENT_STREAM, once(b"data: 1\n\n"))
        raise UpstreamFailed("late")

    async with exchange(app_of(call)) as client:
        await client.over()
    assert client.answer == b"data: 1\n\n"


async def test_what_an_application_does_after_its_answer_is_not_cut_off() -> None:
    """The server reports a disconnect when the answer is complete; that is not a client who left."""
    gate, done = asyncio.Event(), asyncio.Event()

    async def with_background_work(_: Message, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"1"})
        await gate.wait()
        done.set()

    async with exchange(app_of(call_app(with_background_work))) as client:
        await client.heard(3)
        await turns()
        gate.set()
        await client.over()
    assert done.is_set()


# --- bodies and checks --------------------------------------------------------------------------

TOO_LARGE = {
    "error": {
        "message": "The request body is larger than 5 bytes.",
        "type": "invalid_request_error",
        "param": None,
        "code": "request_too_large",
    }
}


async def test_a_body_that_announces_too_much_is_not_read() -> None:
    """The length in the header is enough to refuse it."""
    app = app_of(call_app(ScriptedApp({})), max_body_bytes=5)
    async with exchange(app, headers=(("content-length", "6"),), parts=None) as client:
        await client.heard(2)
    assert (client.status, json.loads(client.answer)) == (413, TOO_LARGE)


async def test_a_body_that_grows_too_large_is_cut_off() -> None:
    """Pieces are counted, whatever was announced; no more of them are read."""
    app = app_of(call_app(ScriptedApp({})), max_body_bytes=5)
    async with exchange(app, headers=(("content-length", "1"),), parts=None) as client:
        client.body(b"123", more=True)
        client.body(b"456", more=True)
        await client.heard(2)
    assert (client.status, json.loads(client.answer)) == (413, TOO_LARGE)


@pytest.mark.parametrize("length", ["5", "", "-1", "five", "9" * 5000])
async def test_a_body_of_the_largest_size_is_taken(length: str) -> None:
    """The limit itself is allowed, and a length that is no number counts as none."""
    app = ScriptedApp({CHAT: answer({})})
    headers = (("content-length", length),)
    async with exchange(
        app_of(call_app(app), max_body_bytes=5), headers=headers, parts=[b"123", b"45"]
    ) as client:
        await client.over()
    if length.isdecimal() and int(length[:9]) > 5:
        assert client.status == 413
    else:
        assert (client.status, app.seen[0].body) == (200, b"12345")


async def test_a_check_refuses_before_the_body_is_read() -> None:
    """Who has no key can't make the server hold 32 MiB."""

    def check(request: Request) -> None:
        assert request.body == b""
        raise Forbidden("no")

    app = serve(call_app(ScriptedApp({})), max_body_bytes=5, check=check)
    async with exchange(app, headers=(("content-length", "1000"),), parts=None) as client:
        await client.heard(2)
        assert client.status == 403
        assert client.reads == 1  # `_gone` waits for the client to leave


async def test_front_wraps_answers_and_refusals() -> None:
    """What it adds is on every answer: of the call, of the check, and of the body's limit."""

    def front(call: Call) -> Call:
        @asynccontextmanager
        async def fronted(request: Request) -> AsyncIterator[Reply]:
            try:
                async with call(request) as reply:
                    yield Reply(reply.status, (*reply.headers, ("x-front", "1")), reply.frames)
            except RequestError as error:
                reply = error.reply()
                yield Reply(reply.status, (*reply.headers, ("x-front", "1")), reply.frames)

        return fronted

    def check(request: Request) -> None:
        if request.path == "/closed":
            raise Forbidden("no")

    app = serve(call_app(ScriptedApp({CHAT: answer({})})), max_body_bytes=5, check=check, front=front)
    cases = [
        ("/v1/chat/completions", b"", 200),
        ("/v1/chat/completions", b"123456", 413),
        ("/closed", b"", 403),
    ]
    for path, body, status in cases:
        async with exchange(app, path=path, parts=[body]) as client:
            await client.over()
        assert (client.status, client.headers["x-front"]) == (status, "1")


# --- bodies that calls read ---------------------------------------------------------------------


def reading(call: Call, limit_bytes: int = 100) -> App:
    """`call`, which reads its requests' bodies by itself."""
    return serve(call, max_body_bytes=5, check=lambda _: limit_bytes)


@asynccontextmanager
async def echo(request: Request) -> AsyncIterator[Reply]:
    """Answers with the pieces of the body."""
    assert request.body == b""
    assert request.pieces is not None
    pieces = [piece.decode() async for piece in request.pieces]
    yield Reply(200, JSON, once(json.dumps(pieces).encode()))


async def test_a_call_may_read_the_body_as_it_comes() -> None:
    """Piece by piece, past the limit of those that are held."""
    async with exchange(reading(echo), parts=[b"123", b"", b"456", b"789"]) as client:
        await client.over()
    assert (client.status, json.loads(client.answer)) == (200, ["123", "456", "789"])


async def test_a_call_has_the_first_piece_before_the_last_is_sent() -> None:
    """Nothing on the way collects them."""
    seen: asyncio.Queue[bytes] = asyncio.Queue()

    @asynccontextmanager
    async def call(request: Request) -> AsyncIterator[Reply]:
        assert request.pieces is not None
        async for piece in request.pieces:
            seen.put_nowait(piece)
        yield Reply(200, JSON, once(b"{}"))

    async with exchange(reading(call), parts=None) as client:
        client.body(b"1", more=True)
        assert await seen.get() == b"1"
        assert client.sent == []
        client.body(b"2")
        await client.over()
    assert seen.get_nowait() == b"2"


async def test_a_client_that_leaves_in_its_body_cancels_the_call_that_reads_it() -> None:
    """Nothing is answered."""
    ended = asyncio.Event()

    @asynccontextmanager
    async def call(request: Request) -> AsyncIterator[Reply]:
        assert request.pieces is not None
        try:
            async for _ in request.pieces:
                pass
        except asyncio.CancelledError:
            ended.set()
            raise
        yield Reply(200, JSON, once(b"{}"))

    async with exchange(reading(call), parts=None) as client:
        client.body(b"half", more=True)
        client.leave()
        assert await client.over() == []
    assert ended.is_set()


async def test_a_client_that_leaves_after_its_body_cancels_the_call_that_has_read_it() -> None:
    """As it does any other."""

    @asynccontextmanager
    async def call(request: Request) -> AsyncIterator[Reply]:
        assert request.pieces is not None
        async for _ in request.pieces:
            pass
        read_all.set()
        await asyncio.Event().wait()
        yield Reply(200, JSON, once(b"{}"))

    read_all = asyncio.Event()
    async with exchange(reading(call)) as client:
        await read_all.wait()
        client.leave()
        assert await client.over() == []


async def test_a_call_that_refuses_a_body_answers_before_its_end() -> None:
    """The rest is not waited for."""

    @asynccontextmanager
    async def call(request: Request) -> AsyncIterator[Reply]:
        assert request.pieces is not None
        async for _ in request.pieces:
            raise Forbidden("no")
        yield Reply(200, JSON, once(b"{}"))

    async with exchange(reading(call), parts=None) as client:
        client.body(b"half", more=True)
        await client.over()
    assert client.status == 403


@pytest.mark.parametrize("length", ["101", "9" * 5000, "3"])
async def test_a_body_that_a_call_reads_has_a_limit_too(length: str) -> None:
    """By what it announces, and by what comes."""
    async with exchange(reading(echo), headers=(("content-length", length),), parts=None) as client:
        if length == "3":
            client.body(b"x" * 101, more=True)
        await client.over()
    assert client.status == 413


# --- other scopes -------------------------------------------------------------------------------


async def test_lifespan_is_acknowledged() -> None:
    """A server that insists on it can start and stop us."""
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    sent: list[Message] = []

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        sent.append(message)

    await app_of(call_app(ScriptedApp({})))({"type": "lifespan"}, receive, send)
    assert sent == [{"type": "lifespan.startup.complete"}, {"type": "lifespan.shutdown.complete"}]


async def test_websockets_are_closed() -> None:
    """Nothing here speaks them."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app_of(call_app(ScriptedApp({})))({"type": "websocket"}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1000}]


# --- both ways ----------------------------------------------------------------------------------

TOKEN = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=8)
VALUE = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0xFF, blacklist_characters="\x7f"), max_size=8
)
SCRIPTS = st.builds(
    Script,
    steps=st.lists(st.text(st.characters(blacklist_categories=["Cs"]), max_size=20).map(Say), max_size=5).map(
        tuple
    ),
    status=st.integers(200, 599),
    headers=st.lists(st.tuples(TOKEN, VALUE), max_size=4).map(tuple),
)


@given(SCRIPTS)
def test_serving_a_called_application_behaves_as_the_application(script: Script) -> None:
    """Same status, same headers, same bytes; only the cuts between messages may differ."""

    async def answered(wrap: Callable[[App], App]) -> tuple[int, object, bytes]:
        async with exchange(wrap(ScriptedApp({CHAT: script}))) as client:
            await client.over()
        return client.status, client.sent[0]["headers"], client.answer

    async def both() -> None:
        assert await answered(lambda app: app_of(call_app(app))) == await answered(lambda app: app)

    asyncio.run(both())


async def test_a_disconnect_passes_through_every_layer() -> None:
    """An application behind three adapters sees its client leave as if there were none."""
    app = ScriptedApp({CHAT: stream("1", Pause("never"))})
    nested = app_of(call_app(app_of(call_app(app_of(call_app(app))))))
    async with exchange(nested) as client:
        await client.heard(2)
        client.leave()
        await client.over()
    assert app.seen[0].ended == "disconnected"
