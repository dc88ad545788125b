"""Holding requests while no worker can take them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from handler import sse
from handler.admission import Admission, WorkerLost
from handler.asgi import call_app
from handler.errors import BadRequest, DeadlineExceeded, NotAdmitted, RequestError, UpstreamFailed
from handler.messages import Reply, Request, Visit, read
from handler.waiting import Room
from tests.asgi_client import turns
from tests.scripted_app import EVENT_STREAM, Fail, Pause, Say, Script, ScriptedApp, answer, stream

CHAT = "POST /v1/chat/completions"
LOST_AFTER_S = 2.5


def chat(n: int = 0, *, streamed: bool = False) -> Request:
    """A chat request that can be told from others by `n`."""
    body = {"model": "m", "stream": streamed, "n": n}
    return Request(
        "POST", "/v1/chat/completions", (("content-type", "application/json"),), json.dumps(body).encode()
    )


class ColdUpstream:
    """An upstream that becomes ready, or fails, when the test says so."""

    def __init__(self, app: ScriptedApp, *, ready: bool = False, retry_after_s: float = 7) -> None:
        self._call = call_app(app)
        self.ready = ready
        self.retry_after_s = retry_after_s
        self.cold_start_s = 4.25
        self.lost = 0
        self.visits: list[Visit] = []
        self.asked = asyncio.Event()
        self._failure: RequestError | None = None
        self._news = asyncio.Event()

    async def wait_ready(self) -> None:
        """As `Upstream` says."""
        self.asked.set()
        while not self.ready:
            await self._news.wait()
            if self._failure is not None:
                raise self._failure

    def become_ready(self) -> None:
        """The worker is there."""
        self.ready = True
        self._news.set()

    def fail(self, error: RequestError) -> None:
        """No worker can start."""
        self._failure = error
        self._news.set()

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """Ask the application, or lose the worker if `lost` says so."""
        self.visits.append(request.visit)
        if self.lost:
            self.lost -= 1
            self.ready = False
            self._news = asyncio.Event()
            self.asked.clear()
            raise WorkerLost("The worker went away.", worked_s=LOST_AFTER_S)
        async with self._call(request) as reply:
            yield reply


def raises(error: RequestError) -> Callable[[Request], None]:
    """A check that refuses everything."""

    def check(_: Request) -> None:
        raise error

    return check


def admission(
    upstream: ColdUpstream,
    *,
    queue_limit: int = 10,
    queue_timeout_s: float = 60,
    keep_alive_s: float = 60,
    check: Callable[[Request], None] = lambda _: None,
) -> Admission:
    """Admission in front of `upstream`, patient unless told otherwise."""
    return Admission(
        upstream,
        room=Room(limit=queue_limit),
        queue_timeout_s=queue_timeout_s,
        keep_alive_s=keep_alive_s,
        check=check,
    )


async def answered(front: Admission, request: Request) -> tuple[int, bytes]:
    """Status and whole body of the answer."""
    async with front.call(request) as reply:
        return reply.status, await read(reply)


async def waiting(front: Admission, count: int) -> None:
    """Return once `count` requests wait."""
    while front.waiting != count:  # noqa: ASYNC110 - a turn of the loop takes no time
        await asyncio.sleep(0)


async def test_ready_worker_is_asked_at_once() -> None:
    """A request does not pass through the queue while a worker is ready."""
    app = ScriptedApp({CHAT: answer({"id": "a"})})
    upstream = ColdUpstream(app, ready=True)
    assert await answered(admission(upstream, queue_limit=0), chat()) == (200, b'{"id": "a"}')
    assert not upstream.asked.is_set()
    app.finish()


async def test_request_is_held_until_the_worker_is_ready() -> None:
    """A request that comes early is answered once the worker is there."""
    app = ScriptedApp({CHAT: answer({"id": "a"})})
    upstream = ColdUpstream(app)
    front = admission(upstream)
    task = asyncio.create_task(answered(front, chat()))
    await upstream.asked.wait()
    assert (front.waiting, app.seen) == (1, [])
    upstream.become_ready()
    assert await task == (200, b'{"id": "a"}')
    assert front.waiting == 0


@pytest.mark.parametrize(("ready", "expected"), [(False, "4.250"), (True, None)])
async def test_only_a_request_that_waited_tells_the_cold_start(ready: bool, expected: str | None) -> None:
    """`x-cold-start` explains a slow answer; a quick one has nothing to explain."""
    upstream = ColdUpstream(ScriptedApp({CHAT: answer({})}), ready=ready)

    async def headers() -> str | None:
        async with admission(upstream).call(chat()) as reply:
            await read(reply)
            return reply.header("x-cold-start")

    task = asyncio.create_task(headers())
    if not ready:
        await upstream.asked.wait()
    upstream.become_ready()
    assert await task == expected


async def test_held_requests_are_served_in_order_of_arrival() -> None:
    """First come, first served, streamed or not."""
    app = ScriptedApp({CHAT: answer({})}, repeat=True)
    upstream = ColdUpstream(app)
    front = admission(upstream, queue_limit=20)
    tasks = [asyncio.create_task(answered(front, chat(n, streamed=n % 2 == 0))) for n in range(20)]
    await waiting(front, 20)
    upstream.become_ready()
    await asyncio.gather(*tasks)
    assert [json.loads(seen.body)["n"] for seen in app.seen] == list(range(20))


async def test_full_queue_refuses_with_retry_after() -> None:
    """One more than the queue holds is a 503 at once, with about the time a start takes."""
    upstream = ColdUpstream(ScriptedApp({CHAT: answer({})}), retry_after_s=9000)
    front = admission(upstream, queue_limit=1)
    task = asyncio.create_task(answered(front, chat()))
    await waiting(front, 1)
    with pytest.raises(NotAdmitted) as refused:
        await answered(front, chat())
    assert (refused.value.status, refused.value.code) == (503, "not_admitted")
    assert refused.value.headers == (("retry-after", "120"),)
    upstream.become_ready()
    assert await task == (200, b"{}")


async def test_client_that_leaves_frees_its_place() -> None:
    """A cancelled request waits no more, and the next one has its place."""
    app = ScriptedApp({CHAT: answer({})})
    upstream = ColdUpstream(app)
    front = admission(upstream, queue_limit=1)
    left = asyncio.create_task(answered(front, chat(1)))
    await waiting(front, 1)
    left.cancel()
    await asyncio.wait({left})
    await waiting(front, 0)
    task = asyncio.create_task(answered(front, chat(2)))
    await waiting(front, 1)
    upstream.become_ready()
    await task
    assert [json.loads(seen.body)["n"] for seen in app.seen] == [2]


async def test_deadline_ends_the_wait() -> None:
    """Nobody waits longer than `queue_timeout_s`: 504, with a time to come back."""
    front = admission(ColdUpstream(ScriptedApp({})), queue_timeout_s=0.001)
    with pytest.raises(DeadlineExceeded) as late:
        await answered(front, chat())
    assert (late.value.status, late.value.code, late.value.headers) == (
        504,
        "deadline_exceeded",
        (("retry-after", "7"),),
    )
    assert front.waiting == 0


async def test_what_can_be_refused_already_does_not_wait() -> None:
    """It takes no place in the queue and starts no worker; a stream gets the status too."""
    error = BadRequest("no")
    upstream = ColdUpstream(ScriptedApp({}))
    front = admission(upstream, keep_alive_s=0.001, check=raises(error))
    for streamed in (False, True):
        with pytest.raises(BadRequest) as refused:
            await answered(front, chat(streamed=streamed))
        assert refused.value is error
    assert not upstream.asked.is_set()


async def test_a_ready_worker_is_not_spoken_for() -> None:
    """Only what would have to wait is checked."""
    upstream = ColdUpstream(ScriptedApp({CHAT: answer({"id": "a"})}), ready=True)
    front = admission(upstream, check=raises(BadRequest("no")))
    assert await answered(front, chat()) == (200, b'{"id": "a"}')


async def test_a_body_that_only_looks_like_a_stream_waits_for_its_status() -> None:
    """Lists in lists in lists are more than the parser takes, and are no reason to fail."""
    body = b'"stream"' + b"[" * 100_000
    front = admission(ColdUpstream(ScriptedApp({})), keep_alive_s=0.001, queue_timeout_s=0.05)
    with pytest.raises(DeadlineExceeded):
        await answered(front, Request("POST", "/v1/audio/transcriptions", (), body))


async def test_failed_start_fails_everyone_who_waits() -> None:
    """Why no worker can start is told to all who wait, at once."""
    upstream = ColdUpstream(ScriptedApp({}))
    front = admission(upstream)
    tasks = [asyncio.create_task(answered(front, chat(n))) for n in range(3)]
    await waiting(front, 3)
    error = NotAdmitted("The worker could not start.", retry_after_s=4, code="worker_start_failed")
    upstream.fail(error)
    assert await asyncio.gather(*tasks, return_exceptions=True) == [error, error, error]
    assert front.waiting == 0


async def test_streamed_request_gets_comments_while_it_waits() -> None:
    """After `keep_alive_s` the answer begins with comment frames; then comes the stream."""
    upstream = ColdUpstream(ScriptedApp({CHAT: stream("1", "2")}))
    front = admission(upstream, keep_alive_s=0.001)
    async with front.call(chat(streamed=True)) as reply:
        head = (
            reply.status,
            reply.streams,
            reply.header("cache-control"),
            reply.header("x-accel-buffering"),
        )
        assert head == (200, True, "no-cache", "no")
        assert [await anext(reply.frames) for _ in range(3)] == [sse.KEEP_ALIVE] * 3
        upstream.become_ready()
        assert (await read(reply)).removeprefix(sse.KEEP_ALIVE) == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"


async def test_status_after_an_early_answer_becomes_the_last_frame() -> None:
    """An error of the worker can't have its status any more; its body is the last frame."""
    error = {
        "error": {"message": "no such model", "type": "invalid_request_error", "param": "model", "code": "x"}
    }
    upstream = ColdUpstream(ScriptedApp({CHAT: answer(error, 404)}))
    async with admission(upstream, keep_alive_s=0.001).call(chat(streamed=True)) as reply:
        await anext(reply.frames)
        upstream.become_ready()
        last = (await read(reply)).removeprefix(sse.KEEP_ALIVE)
    assert last == sse.event(error)


async def test_failed_start_after_an_early_answer_is_raised_from_the_frames() -> None:
    """So that the server ends the stream with an error frame."""
    upstream = ColdUpstream(ScriptedApp({}))
    error = NotAdmitted("The worker could not start.", retry_after_s=4, code="worker_start_failed")
    async with admission(upstream, keep_alive_s=0.001).call(chat(streamed=True)) as reply:
        await anext(reply.frames)
        upstream.fail(error)
        with pytest.raises(NotAdmitted) as failed:
            await read(reply)
    assert failed.value is error


async def test_request_without_stream_waits_for_its_real_status() -> None:
    """Only `"stream": true` is answered early."""
    upstream = ColdUpstream(ScriptedApp({CHAT: answer({"error": {}}, 400)}))
    front = admission(upstream, keep_alive_s=0.001, queue_timeout_s=0.05)
    with pytest.raises(DeadlineExceeded):
        await answered(front, chat())


async def test_keep_alive_of_zero_never_answers_early() -> None:
    """`KEEP_ALIVE_S=0` keeps every status real."""
    front = admission(ColdUpstream(ScriptedApp({})), keep_alive_s=0, queue_timeout_s=0.01)
    with pytest.raises(DeadlineExceeded):
        await answered(front, chat(streamed=True))


async def test_a_stream_gets_comments_wherever_it_waits() -> None:
    """Also in a line of the upstream, which was ready."""
    app = ScriptedApp({CHAT: Script((Pause("line"), Say("data: 1\n\n")), 200, EVENT_STREAM)})
    async with admission(ColdUpstream(app, ready=True), keep_alive_s=0.001).call(
        chat(streamed=True)
    ) as reply:
        assert (reply.status, reply.headers) == (200, sse.HEADERS)
        assert [await anext(reply.frames) for _ in range(3)] == [sse.KEEP_ALIVE] * 3
        app.gate("line").opened.set()
        assert (await read(reply)).replace(sse.KEEP_ALIVE, b"") == b"data: 1\n\n"


async def test_leaving_an_early_answer_stops_the_work() -> None:
    """The connection to the worker is left as soon as the client leaves."""
    app = ScriptedApp({CHAT: stream("1", Pause("generating"))})
    upstream = ColdUpstream(app)
    async with admission(upstream, keep_alive_s=0.001).call(chat(streamed=True)) as reply:
        await anext(reply.frames)
        upstream.become_ready()
        while (await anext(reply.frames)) == sse.KEEP_ALIVE:
            pass
    await app.seen[0].over.wait()
    assert app.seen[0].ended == "disconnected"


async def test_leaving_an_early_answer_frees_its_place() -> None:
    """Who left while comments were sent is not in the queue any more."""
    front = admission(ColdUpstream(ScriptedApp({})), keep_alive_s=0.001)
    async with front.call(chat(streamed=True)) as reply:
        await anext(reply.frames)
        assert front.waiting == 1
    await waiting(front, 0)


@pytest.mark.parametrize("streamed", [False, True])
async def test_lost_worker_before_the_first_byte_is_retried_on_the_next(streamed: bool) -> None:
    """The client never hears of a worker that died before it said anything."""
    app = ScriptedApp({CHAT: answer({"id": "b"})})
    upstream = ColdUpstream(app, ready=True)
    upstream.lost = 1
    task = asyncio.create_task(answered(admission(upstream), chat(streamed=streamed)))
    await upstream.asked.wait()
    upstream.become_ready()
    assert await task == (200, b'{"id": "b"}')


async def test_lost_worker_is_no_reason_to_turn_away() -> None:
    """Whoever came before the others is not refused for their number."""
    app = ScriptedApp({CHAT: answer({}), "GET /v1/models": answer({"id": "m"})})
    upstream = ColdUpstream(app, ready=True)
    upstream.lost = 1
    front = admission(upstream, queue_limit=0)
    task = asyncio.create_task(answered(front, chat()))
    await upstream.asked.wait()
    with pytest.raises(NotAdmitted):
        await answered(front, chat())
    upstream.become_ready()
    assert await task == (200, b"{}")


async def test_upstream_hears_of_the_waits_before() -> None:
    """When the request came, that it was let in, and what a lost worker had of its time."""
    upstream = ColdUpstream(ScriptedApp({CHAT: answer({})}))
    upstream.lost = 1
    request = chat()
    task = asyncio.create_task(answered(admission(upstream), request))
    for _ in range(2):
        await upstream.asked.wait()
        upstream.become_ready()
        await turns()
    await task
    waited = replace(request.visit, admitted=True, kept_alive=True)
    assert upstream.visits == [waited, replace(waited, worked_s=LOST_AFTER_S)]


async def test_second_lost_worker_is_an_error() -> None:
    """A request that kills workers is not given to a third."""
    upstream = ColdUpstream(ScriptedApp({}), ready=True)
    upstream.lost = 2
    task = asyncio.create_task(answered(admission(upstream), chat()))
    await upstream.asked.wait()
    upstream.become_ready()
    with pytest.raises(WorkerLost) as lost:
        await task
    assert (lost.value.status, lost.value.code) == (502, "upstream_failed")


async def test_lost_worker_after_an_early_answer_is_retried_too() -> None:
    """Comments are not the answer: the next worker may still give it."""
    upstream = ColdUpstream(ScriptedApp({CHAT: stream("1")}))
    upstream.lost = 1
    async with admission(upstream, keep_alive_s=0.001).call(chat(streamed=True)) as reply:
        await anext(reply.frames)
        upstream.become_ready()
        while upstream.ready:
            assert await anext(reply.frames) == sse.KEEP_ALIVE
        upstream.become_ready()
        assert (await read(reply)).replace(sse.KEEP_ALIVE, b"") == b"data: 1\n\ndata: [DONE]\n\n"


async def test_failure_after_the_first_byte_is_not_retried() -> None:
    """What was begun ends with its error, and no second worker generates it again."""
    app = ScriptedApp({CHAT: Script((Say("data: 1\n\n"), Pause("go"), Fail()), 200, EVENT_STREAM)})
    upstream = ColdUpstream(app, ready=True)
    async with admission(upstream).call(chat(streamed=True)) as reply:
        assert await anext(reply.frames) == b"data: 1\n\n"
        app.gate("go").opened.set()
        with pytest.raises(RequestError):
            await anext(reply.frames)
    assert len(app.seen) == 1


async def test_answer_without_json_after_an_early_answer_is_an_upstream_error() -> None:
    """Nothing but JSON can be told in a frame."""
    upstream = ColdUpstream(
        ScriptedApp({CHAT: Script((Say("<html>"),), 502, (("content-type", "text/html"),))})
    )
    async with admission(upstream, keep_alive_s=0.001).call(chat(streamed=True)) as reply:
        await anext(reply.frames)
        upstream.become_ready()
        with pytest.raises(UpstreamFailed):
            await read(reply)
