"""The gateway's queue: who goes at once, who waits, for how long, and what clients hear of it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from gateway.endpoints.admission import SERVED_GUESS_S, TRIES, Admission, Outcome
from gateway.upstreams import WorkerLost
from handler import sse
from handler.errors import BadRequest, DeadlineExceeded, NotAdmitted, RequestError, UpstreamFailed
from handler.messages import Reply, Request, Visit, once, read
from tests.asgi_client import turns
from tests.pools import ScriptedPool
from tests.scripted_app import EVENT_STREAM, Fail, Pause, Say, Script, ScriptedApp, answer, stream

CHAT = "POST /v1/chat/completions"
LOST_AFTER_S = 2.5
STARTS_NEVER = NotAdmitted("The worker could not start.", retry_after_s=4, code="worker_start_failed")


def chat(n: int = 0, *, streamed: bool = False, key: str = "", background: bool = False) -> Request:
    """A chat request of `key` that can be told from others by `n`."""
    body = {"model": "m", "stream": streamed, "n": n}
    return Request(
        "POST",
        "/v1/chat/completions",
        (("content-type", "application/json"),),
        json.dumps(body).encode(),
        visit=Visit(caller=key, background=background),
    )


class Stage:
    """An admission in front of a pool, patient unless told otherwise."""

    def __init__(
        self,
        app: ScriptedApp,
        *,
        places: int = 0,
        limit: int = 10,
        queue_timeout_s: float = 60,
        keep_alive_s: float = 60,
        retry_after_s: float = 7,
        check: Callable[[Request], None] = lambda _: None,
    ) -> None:
        self.app = app
        self.pool = ScriptedPool(app, places=places, retry_after_s=retry_after_s)
        self.outcomes: list[Outcome] = []
        self.waits_s: list[float] = []
        self.front = Admission(
            self.pool,
            limit=limit,
            queue_timeout_s=queue_timeout_s,
            keep_alive_s=keep_alive_s,
            check=check,
            tell=self.tell,
        )

    def tell(self, outcome: Outcome, waited_s: float) -> None:
        """Keep what came of a request."""
        self.outcomes.append(outcome)
        self.waits_s.append(waited_s)

    async def answered(self, request: Request) -> tuple[int, bytes]:
        """Status and whole body of the answer."""
        async with self.front.call(request) as reply:
            return reply.status, await read(reply)

    def asks(self, request: Request) -> asyncio.Task[tuple[int, bytes]]:
        """A client that waits for its answer."""
        return asyncio.create_task(self.answered(request))

    async def waiting(self, count: int) -> None:
        """Return once `count` requests wait."""
        while self.front.waiting != count:  # noqa: ASYNC110 - a turn of the loop takes no time
            await asyncio.sleep(0)

    @property
    def asked(self) -> list[int]:
        """Which requests the workers were asked, in order."""
        return [json.loads(seen.body)["n"] for seen in self.app.seen]


def raises(error: RequestError) -> Callable[[Request], None]:
    """A check that refuses everything."""

    def check(_: Request) -> None:
        raise error

    return check


# --- who goes at once -------------------------------------------------------------------------


async def test_a_free_place_is_had_at_once() -> None:
    """Nothing is asked of the queue, and nobody is told to want anything."""
    on = Stage(ScriptedApp({CHAT: answer({"id": "a"})}), places=1, limit=0)
    assert await on.answered(chat()) == (200, b'{"id": "a"}')
    assert (on.outcomes, on.waits_s, on.pool.wanted) == (["at_once"], [0], [])
    on.app.finish()


async def test_a_free_place_costs_no_turn_of_the_loop() -> None:
    """The worker is asked by the task that came, before anything else runs."""
    on = Stage(ScriptedApp({}), places=1)

    @asynccontextmanager
    async def at_once(_: Request) -> AsyncIterator[Reply]:
        yield Reply(200, (), once(b"a"))

    on.pool.call = at_once  # type: ignore[method-assign,assignment]
    tasks = asyncio.all_tasks()
    answering = on.front.call(chat(streamed=True))
    with pytest.raises(StopIteration) as entered:
        answering.__aenter__().send(None)
    assert entered.value.value.status == 200
    assert asyncio.all_tasks() == tasks
    await answering.__aexit__(None, None, None)


async def test_no_more_run_than_there_are_places() -> None:
    """The next one goes when one has ended."""
    on = Stage(ScriptedApp({CHAT: [answer({}, 200), Script((Pause("b"),)), answer({})]}), places=0)
    tasks = [on.asks(chat(n)) for n in range(3)]
    await on.waiting(3)
    on.pool.give(1)
    await on.app.gate("b").reached.wait()
    assert (on.asked, on.front.waiting, on.pool.free) == ([0, 1], 1, 0)
    on.app.gate("b").opened.set()
    await asyncio.gather(*tasks)
    assert on.asked == [0, 1, 2]


async def test_nobody_passes_those_who_wait() -> None:
    """A place that has become free is promised to whoever is first, before that one could take it."""
    on = Stage(ScriptedApp({CHAT: answer({})}, repeat=True))
    first = on.asks(chat(1))
    await on.waiting(1)
    on.pool.give(1)
    assert (on.front.waiting, on.pool.free, on.asked) == (0, 1, [])
    await on.answered(chat(2))
    await first
    assert on.asked == [1, 2]
    assert on.outcomes == ["waited", "waited"]


async def test_nobody_passes_those_who_have_not_been_called_yet() -> None:
    """Whoever comes before the pool has said that there is room again comes after those who wait."""
    on = Stage(ScriptedApp({CHAT: answer({})}, repeat=True))
    first = on.asks(chat(1))
    await on.waiting(1)
    on.pool.capacity = 1
    await on.answered(chat(2))
    await first
    assert on.asked == [1, 2]


async def test_what_only_asks_needs_no_place() -> None:
    """As soon as there is a worker. Before that it waits for one as everybody does."""
    on = Stage(ScriptedApp({CHAT: Script((Pause("busy"),)), "GET /v1/models": [answer({}), answer({})]}))
    models = Request("GET", "/v1/models")
    waits = on.asks(models)
    await on.waiting(1)
    on.pool.give(1)
    assert await waits == (200, b"{}")
    busy = on.asks(chat())
    await on.app.gate("busy").reached.wait()
    assert await on.answered(models) == (200, b"{}")
    assert on.front._served_s == SERVED_GUESS_S, "it says nothing of how long a place is taken"
    on.app.gate("busy").opened.set()
    await busy


# --- who goes next ----------------------------------------------------------------------------


async def test_held_requests_are_served_in_order_of_arrival() -> None:
    """First come, first served, streamed or not."""
    on = Stage(ScriptedApp({CHAT: answer({})}, repeat=True), limit=20)
    tasks = [on.asks(chat(n, streamed=n % 2 == 0)) for n in range(20)]
    await on.waiting(20)
    on.pool.give(1)
    await asyncio.gather(*tasks)
    assert on.asked == list(range(20))


async def test_keys_have_their_turns_one_after_the_other() -> None:
    """However many requests one of them has sent before; the background comes last."""
    on = Stage(ScriptedApp({CHAT: answer({})}, repeat=True))
    tasks = [on.asks(chat(n, key="b", background=True)) for n in (7, 8)]
    tasks += [on.asks(chat(n, key=key)) for n, key in enumerate("aaaabbc")]
    await on.waiting(9)
    on.pool.give(1)
    await asyncio.gather(*tasks)
    assert on.asked == [0, 4, 6, 1, 5, 2, 3, 7, 8]


async def test_a_key_with_fewer_is_let_into_a_full_queue() -> None:
    """The newest of whoever has most is refused in its place, as it would have been a moment later."""
    on = Stage(ScriptedApp({CHAT: answer({})}, repeat=True), limit=3)
    many = [on.asks(chat(n, key="many")) for n in range(3)]
    await on.waiting(3)
    one = on.asks(chat(3, key="one"))
    with pytest.raises(NotAdmitted, match="3 requests already wait"):
        await many[2]
    with pytest.raises(NotAdmitted):
        await on.answered(chat(4, key="many"))
    on.pool.give(1)
    await asyncio.gather(*many[:2], one)
    assert on.asked == [0, 3, 1]
    assert sorted(on.outcomes) == ["full", "full", "waited", "waited", "waited"]


# --- bounds and deadlines ---------------------------------------------------------------------


@pytest.mark.parametrize(("retry_after_s", "told"), [(9000, "120"), (4.4, "4"), (-3, "1")])
async def test_full_queue_refuses_with_the_rest_of_the_start(retry_after_s: float, told: str) -> None:
    """One more than the queue holds is a 503 at once, while no worker is there."""
    on = Stage(ScriptedApp({CHAT: answer({})}), limit=1, retry_after_s=retry_after_s)
    task = on.asks(chat())
    await on.waiting(1)
    with pytest.raises(NotAdmitted) as refused:
        await on.answered(chat())
    assert (refused.value.status, refused.value.code) == (503, "not_admitted")
    assert refused.value.headers == (("retry-after", told),)
    on.pool.give(1)
    assert await task == (200, b"{}")
    assert on.outcomes == ["full", "waited"]


async def test_full_queue_refuses_with_the_time_that_those_who_wait_need() -> None:
    """Once a worker is there: by how long requests take, so many at a time."""
    on = Stage(
        ScriptedApp({CHAT: [Script((Pause("1"),)), Script((Pause("2"),)), *[answer({})] * 4]}), limit=4
    )
    on.pool.give(2)
    tasks = [on.asks(chat(n)) for n in range(6)]
    await on.waiting(4)
    with pytest.raises(NotAdmitted) as refused:
        await on.answered(chat())
    assert refused.value.headers == (("retry-after", str(round(4 * SERVED_GUESS_S / 2))),)
    for gate in "12":
        on.app.gate(gate).opened.set()
    await asyncio.gather(*tasks)
    assert on.front._served_s == pytest.approx(SERVED_GUESS_S * 0.9**6, rel=0.2), "they took no time at all"


async def test_bodies_are_bounded_too() -> None:
    """Of many large ones not all wait."""
    pool = ScriptedPool(ScriptedApp({CHAT: answer({})}, repeat=True))
    front = Admission(pool, limit=9, queue_timeout_s=60, keep_alive_s=0, limit_bytes=len(chat().body) + 1)

    async def ask() -> int:
        async with front.call(chat()) as reply:
            return reply.status

    first = asyncio.create_task(ask())
    await turns()
    with pytest.raises(NotAdmitted):
        await ask()
    pool.give(1)
    assert await first == 200


async def test_a_visitor_hears_that_a_worker_has_its_request() -> None:
    """Each time: at once, after a wait, and when the next one has it."""
    on = Stage(ScriptedApp({CHAT: answer({})}, repeat=True), places=1)
    taken: list[int] = []
    await on.answered(replace(chat(), visit=Visit(taken=lambda: taken.append(1))))
    assert taken == [1]
    on.pool.losing.append(LOST_AFTER_S)
    task = on.asks(replace(chat(), visit=Visit(taken=lambda: taken.append(len(on.pool.visits)))))
    await on.pool.lost.wait()
    await on.waiting(1)
    assert taken == [1, 1]
    on.pool.give(1)
    await task
    assert taken == [1, 1, 2]


async def test_bounds_can_be_changed_while_somebody_waits() -> None:
    """Who waits stays."""
    on = Stage(ScriptedApp({CHAT: answer({})}, repeat=True), limit=2)
    tasks = [on.asks(chat(n)) for n in range(2)]
    await on.waiting(2)
    on.front.adjust(limit=1, queue_timeout_s=60, keep_alive_s=60, check=lambda _: None)
    with pytest.raises(NotAdmitted):
        await on.answered(chat())
    on.front.adjust(limit=3, queue_timeout_s=60, keep_alive_s=60, check=raises(BadRequest("no")))
    with pytest.raises(BadRequest):
        await on.answered(chat())
    on.front.adjust(limit=3, queue_timeout_s=60, keep_alive_s=60, check=lambda _: None)
    tasks.append(on.asks(chat(2)))
    await on.waiting(3)
    on.pool.give(1)
    await asyncio.gather(*tasks)
    assert on.asked == [0, 1, 2]


async def test_client_that_leaves_frees_its_place() -> None:
    """A cancelled request waits no more, and the next one has its place."""
    on = Stage(ScriptedApp({CHAT: answer({})}), limit=1)
    left = on.asks(chat(1))
    await on.waiting(1)
    left.cancel()
    await asyncio.wait({left})
    assert (on.front.waiting, on.outcomes) == (0, ["left"])
    task = on.asks(chat(2))
    await on.waiting(1)
    on.pool.give(1)
    await task
    assert on.asked == [2]


@pytest.mark.parametrize("keep_alive_s", [0, 60])
@pytest.mark.parametrize("before", [False, True])
async def test_who_leaves_as_its_turn_comes_gives_it_to_the_next(before: bool, keep_alive_s: float) -> None:
    """The place is not lost, whichever of the two was first."""
    on = Stage(ScriptedApp({CHAT: answer({})}, repeat=True), keep_alive_s=keep_alive_s)
    leaving, staying = on.asks(chat(1)), on.asks(chat(2))
    await on.waiting(2)
    await turns()
    if before:
        leaving.cancel()
    on.pool.give(1)
    if not before:
        leaving.cancel()
    await asyncio.wait({leaving})
    assert leaving.cancelled()
    assert await staying == (200, b"{}")
    assert (on.front._promised, on.pool.free) == (0, 1)
    if not keep_alive_s:  # else a task stands between the two, and the worker is asked and left
        assert (on.asked, on.outcomes) == ([2], ["left", "waited"])


async def test_a_running_request_that_is_left_is_left() -> None:
    """The worker hears of it, and its place is the next one's."""
    on = Stage(ScriptedApp({CHAT: [Script((Pause("thinking"),)), answer({})]}), places=1)
    left = on.asks(chat(1))
    await on.app.gate("thinking").reached.wait()
    waits = on.asks(chat(2))
    await on.waiting(1)
    left.cancel()
    await on.app.seen[0].over.wait()
    assert on.app.seen[0].ended == "disconnected"
    assert await waits == (200, b"{}")


async def test_deadline_ends_the_wait() -> None:
    """Nobody waits longer than `queue_timeout_s`: 504, with a time to come back."""
    on = Stage(ScriptedApp({}), queue_timeout_s=0.001)
    with pytest.raises(DeadlineExceeded, match=r"^No worker was ready within 0\.001 s") as late:
        await on.answered(chat())
    assert (late.value.status, late.value.code, late.value.headers) == (
        504,
        "deadline_exceeded",
        (("retry-after", "7"),),
    )
    assert (on.front.waiting, on.outcomes) == (0, ["late"])
    assert on.waits_s[0] >= 0.001


async def test_who_waited_for_others_hears_so() -> None:
    """A worker was there, and its place was somebody else's."""
    on = Stage(ScriptedApp({CHAT: stream("1", Pause("generating"))}), queue_timeout_s=0.001)
    on.pool.give(1)
    async with on.front.call(chat(streamed=True)):
        with pytest.raises(DeadlineExceeded, match=r"turn did not come within 0\.001 s"):
            await on.answered(chat())


async def test_the_deadline_counts_from_the_arrival() -> None:
    """Whatever the request has waited for since. Who says how long it may wait is believed."""
    on = Stage(ScriptedApp({CHAT: answer({})}))
    long_ago = Visit(arrived_s=Visit().arrived_s - 3600)
    with pytest.raises(DeadlineExceeded, match="within 60 s"):
        await on.answered(replace(chat(), visit=long_ago))
    patient = on.asks(replace(chat(), visit=replace(long_ago, wait_s=7200)))
    await on.waiting(1)
    on.pool.give(1)
    assert await patient == (200, b"{}")


async def test_what_can_be_refused_already_does_not_wait() -> None:
    """It takes no place in the queue and starts no worker; a stream gets the status too."""
    error = BadRequest("no")
    on = Stage(ScriptedApp({}), keep_alive_s=0.001, check=raises(error))
    for streamed in (False, True):
        with pytest.raises(BadRequest) as refused:
            await on.answered(chat(streamed=streamed))
        assert refused.value is error
    assert on.pool.wanted == []


async def test_a_ready_worker_is_not_spoken_for() -> None:
    """Only what would have to wait is checked."""
    on = Stage(ScriptedApp({CHAT: answer({"id": "a"})}), places=1, check=raises(BadRequest("no")))
    assert await on.answered(chat()) == (200, b'{"id": "a"}')


# --- what the pool hears, and says ------------------------------------------------------------


async def test_the_pool_hears_how_many_wait_and_how_long() -> None:
    """Each time that it changes."""
    on = Stage(ScriptedApp({CHAT: answer({})}, repeat=True))
    tasks = [on.asks(chat(n)) for n in range(2)]
    await on.waiting(2)
    on.pool.give(2)
    await asyncio.gather(*tasks)
    assert [count for count, _ in on.pool.wanted] == [1, 2, 0]
    waits_s = [wait_s for _, wait_s in on.pool.wanted]
    assert waits_s == [*sorted(waits_s[:2]), 0]


async def test_who_is_turned_away_counts_as_one_that_has_waited_for_ever() -> None:
    """Else a bound that keeps waits short would keep the workers away that it lacks."""
    on = Stage(ScriptedApp({CHAT: answer({})}), limit=1)
    first = on.asks(chat())
    await on.waiting(1)
    assert on.pool.wanted[-1][1] < math.inf
    with pytest.raises(NotAdmitted):
        await on.answered(chat())
    assert on.pool.wanted[-1] == (1, math.inf)
    on.pool.give(1)
    await first


async def test_the_longest_wait_is_that_of_whoever_came_first() -> None:
    """Though another key is next."""
    on = Stage(ScriptedApp({CHAT: answer({})}, repeat=True))
    tasks = [on.asks(chat(0, key="a")), on.asks(chat(1, key="a")), on.asks(chat(2, key="b"))]
    await on.waiting(3)
    list(on.front._turns)[1].began_s -= 100
    on.pool.give(1)
    waiting, oldest_wait_s = on.pool.wanted[-1]
    assert waiting == 2
    assert oldest_wait_s >= 100
    await asyncio.gather(*tasks)
    assert on.pool.wanted[-1] == (0, 0)


async def test_failed_start_fails_everyone_who_waits() -> None:
    """Why no worker can start is told to all who wait, at once, and to those who come after."""
    on = Stage(ScriptedApp({}))
    tasks = [on.asks(chat(n)) for n in range(3)]
    await on.waiting(3)
    on.pool.refuse(STARTS_NEVER)
    assert await asyncio.gather(*tasks, return_exceptions=True) == [STARTS_NEVER] * 3
    assert on.front.waiting == 0
    with pytest.raises(NotAdmitted) as refused:
        await on.answered(chat(streamed=True))
    assert refused.value is STARTS_NEVER
    assert on.outcomes == ["refused"] * 4


@pytest.mark.parametrize(("places", "expected"), [(0, "4.250"), (1, None)])
async def test_only_a_request_that_waited_for_a_start_tells_how_long_it_took(
    places: int, expected: str | None
) -> None:
    """`x-cold-start` explains a slow answer; who waited for a place was not kept by a start."""
    on = Stage(ScriptedApp({CHAT: [Script((Pause("busy"),)), answer({})]}), places=places)

    async def header() -> str | None:
        async with on.front.call(chat()) as reply:
            await read(reply)
            return reply.header("x-cold-start")

    busy, waits = asyncio.create_task(header()), asyncio.create_task(header())
    await turns()
    on.pool.give(1)
    await on.waiting(1)
    on.app.gate("busy").opened.set()
    assert [await busy, await waits] == [expected, expected]


async def test_a_start_is_told_whoever_answers_in_the_end() -> None:
    """Here another worker than the one that was waited for."""
    on = Stage(ScriptedApp({CHAT: answer({})}))
    on.pool.losing.append(LOST_AFTER_S)
    on.pool.left = 1
    asyncio.get_running_loop().call_soon(on.pool.give, 1)
    async with on.front.call(chat()) as reply:
        assert reply.header("x-cold-start") == "4.250"


# --- what streams hear ------------------------------------------------------------------------


async def test_streamed_request_gets_comments_while_it_waits() -> None:
    """After `keep_alive_s` the answer begins with comment frames; then comes the stream."""
    on = Stage(ScriptedApp({CHAT: stream("1", "2")}), keep_alive_s=0.001)
    async with on.front.call(chat(streamed=True)) as reply:
        assert (reply.status, reply.headers) == (200, sse.HEADERS)
        assert [await anext(reply.frames) for _ in range(3)] == [sse.KEEP_ALIVE] * 3
        on.pool.give(1)
        assert (await read(reply)).replace(sse.KEEP_ALIVE, b"") == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"


async def test_status_after_an_early_answer_becomes_the_last_frame() -> None:
    """An error of the worker can't have its status any more; its body is the last frame."""
    error = {
        "error": {"message": "no such model", "type": "invalid_request_error", "param": "model", "code": "x"}
    }
    on = Stage(ScriptedApp({CHAT: answer(error, 404)}), keep_alive_s=0.001)
    async with on.front.call(chat(streamed=True)) as reply:
        await anext(reply.frames)
        on.pool.give(1)
        assert (await read(reply)).replace(sse.KEEP_ALIVE, b"") == sse.event(error)


async def test_failed_start_after_an_early_answer_is_raised_from_the_frames() -> None:
    """So that the server ends the stream with an error frame."""
    on = Stage(ScriptedApp({}), keep_alive_s=0.001)
    async with on.front.call(chat(streamed=True)) as reply:
        await anext(reply.frames)
        on.pool.refuse(STARTS_NEVER)
        with pytest.raises(NotAdmitted) as failed:
            await read(reply)
    assert failed.value is STARTS_NEVER


@pytest.mark.parametrize(
    ("keep_alive_s", "request_"),
    [
        (0.001, chat()),
        (0, chat(streamed=True)),
        (0.001, Request("POST", "/v1/audio/transcriptions", (), b'"stream"' + b"[" * 100_000)),
    ],
    ids=["no stream", "never", "only looks like a stream"],
)
async def test_everybody_else_waits_for_its_real_status(keep_alive_s: float, request_: Request) -> None:
    """Only `"stream": true` is answered early, and not with `KEEP_ALIVE_S=0`."""
    on = Stage(ScriptedApp({}), keep_alive_s=keep_alive_s, queue_timeout_s=0.05)
    with pytest.raises(DeadlineExceeded):
        await on.answered(replace(request_, visit=Visit()))


async def test_leaving_an_early_answer_stops_the_work() -> None:
    """The connection to the worker is left as soon as the client leaves."""
    on = Stage(ScriptedApp({CHAT: stream("1", Pause("generating"))}), keep_alive_s=0.001)
    async with on.front.call(chat(streamed=True)) as reply:
        await anext(reply.frames)
        on.pool.give(1)
        while (await anext(reply.frames)) == sse.KEEP_ALIVE:
            pass
    assert on.app.seen[0].ended == "disconnected"
    assert on.pool.free == 1


async def test_leaving_an_early_answer_frees_its_place() -> None:
    """Who left while comments were sent is not in the queue any more."""
    on = Stage(ScriptedApp({}), keep_alive_s=0.001)
    async with on.front.call(chat(streamed=True)) as reply:
        await anext(reply.frames)
        assert on.front.waiting == 1
    assert on.front.waiting == 0
    assert on.outcomes == ["left"]


# --- workers that go away ---------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
async def test_lost_worker_before_the_first_byte_is_retried_on_the_next(streamed: bool) -> None:
    """The client never hears of a worker that died before it said anything."""
    on = Stage(ScriptedApp({CHAT: answer({"id": "b"})}), places=1)
    on.pool.losing.append(LOST_AFTER_S)
    task = on.asks(chat(streamed=streamed))
    await on.waiting(1)
    on.pool.give(1)
    assert await task == (200, b'{"id": "b"}')
    assert on.outcomes == ["at_once"]


async def test_who_lost_its_worker_goes_first() -> None:
    """Those who wait have not had a turn yet, nor may their number keep it out."""
    on = Stage(ScriptedApp({CHAT: answer({})}, repeat=True), places=1, limit=1)
    on.pool.losing.append(LOST_AFTER_S)
    lost = on.asks(chat(1, key="a"))
    await on.pool.lost.wait()
    waits = on.asks(chat(2, key="b"))
    await on.waiting(2)
    with pytest.raises(NotAdmitted):
        await on.answered(chat(3, key="b"))
    on.pool.give(1)
    await asyncio.gather(waits, lost)
    assert on.asked == [1, 2]


async def test_the_pool_hears_of_the_waits_before() -> None:
    """When the request came, that it was let in, and what a lost worker had of its time."""
    on = Stage(ScriptedApp({CHAT: answer({})}))
    on.pool.losing.append(LOST_AFTER_S)
    request = chat()
    task = on.asks(request)
    for _ in range(2):
        await on.waiting(1)
        on.pool.give(1)
    await task
    waited = replace(request.visit, admitted=True, kept_alive=True)
    assert on.pool.visits == [waited, replace(waited, worked_s=LOST_AFTER_S)]


async def test_request_that_kills_two_workers_is_an_error() -> None:
    """It is not given to a third."""
    on = Stage(ScriptedApp({}), places=1)
    on.pool.losing.extend([LOST_AFTER_S] * 3)
    task = on.asks(chat())
    await on.waiting(1)
    on.pool.give(1)
    with pytest.raises(WorkerLost) as lost:
        await task
    assert (lost.value.status, lost.value.code, len(on.pool.losing)) == (502, "upstream_failed", 1)


async def test_workers_that_leave_as_they_are_asked_are_no_fault_of_the_request() -> None:
    """But nobody is sent from one to the next for ever."""
    on = Stage(ScriptedApp({CHAT: answer({})}), places=1)
    on.pool.losing.extend([0.0] * (TRIES - 1))
    for fails in (False, True):
        task = on.asks(chat())
        for _ in range(TRIES - 1):
            await on.waiting(1)
            on.pool.give(1)
            await turns()
        if fails:
            with pytest.raises(WorkerLost):
                await task
        else:
            assert await task == (200, b"{}")
            on.pool.losing.extend([0.0] * TRIES)
    assert not on.pool.losing


async def test_lost_worker_after_an_early_answer_is_retried_too() -> None:
    """Comments are not the answer: the next worker may still give it."""
    on = Stage(ScriptedApp({CHAT: stream("1")}), keep_alive_s=0.001)
    on.pool.losing.append(LOST_AFTER_S)
    async with on.front.call(chat(streamed=True)) as reply:
        await anext(reply.frames)
        on.pool.give(1)
        while not on.pool.lost.is_set():
            assert await anext(reply.frames) == sse.KEEP_ALIVE
        on.pool.give(1)
        assert (await read(reply)).replace(sse.KEEP_ALIVE, b"") == b"data: 1\n\ndata: [DONE]\n\n"


@pytest.mark.parametrize("places", [0, 1])
async def test_failure_after_the_first_byte_is_not_retried(places: int) -> None:
    """What was begun ends with its error, and no second worker generates it again."""
    on = Stage(
        ScriptedApp({CHAT: Script((Say("data: 1\n\n"), Pause("go"), Fail()), 200, EVENT_STREAM)}),
        places=places,
    )
    asyncio.get_running_loop().call_soon(on.pool.give, 1)
    async with on.front.call(chat(streamed=True)) as reply:
        assert await anext(reply.frames) == b"data: 1\n\n"
        on.app.gate("go").opened.set()
        with pytest.raises(RequestError):
            await anext(reply.frames)
    assert len(on.app.seen) == 1


async def test_a_loss_that_the_reader_raises_is_the_readers() -> None:
    """It is no reason to ask again what was answered."""
    on = Stage(ScriptedApp({CHAT: answer({})}), places=1)
    with pytest.raises(WorkerLost):
        async with on.front.call(chat()):
            raise WorkerLost("somebody else's")
    assert len(on.app.seen) == 1


async def test_answer_without_json_after_an_early_answer_is_an_upstream_error() -> None:
    """Nothing but JSON can be told in a frame."""
    script = Script((Say("<html>"),), 502, (("content-type", "text/html"),))
    on = Stage(ScriptedApp({CHAT: script}), keep_alive_s=0.001)
    async with on.front.call(chat(streamed=True)) as reply:
        await anext(reply.frames)
        on.pool.give(1)
        with pytest.raises(UpstreamFailed):
            await read(reply)


async def test_many_come_and_go_and_no_place_is_lost() -> None:
    """Half of them leave in the midst of it; at the end all is as it was."""
    on = Stage(ScriptedApp({CHAT: answer({})}, repeat=True), places=3, limit=1000)
    tasks: list[asyncio.Task[Any]] = []
    for n in range(300):
        tasks.append(on.asks(chat(n, key=str(n % 7), background=n % 5 == 0)))
        if n % 2:
            await asyncio.sleep(0)
            tasks[n // 2].cancel()
        on.pool.give(n % 4)
    on.pool.give(3)
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await task
    assert (on.front.waiting, on.front._promised, on.pool.free) == (0, 0, 3)
    assert len(on.outcomes) == 300
    assert on.pool.wanted[-1] == (0, 0)
