"""Jobs on an endpoint in this process: what becomes of them, when, and what it costs."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import select

from gateway.jobs import Jobs, State, runner, table
from gateway.jobs.table import JOBS
from gateway.store import Store
from gateway.upstreams import WorkerLost
from handler import jobs as shapes
from handler.errors import DeadlineExceeded, KeyReused, NotAdmitted, RateLimited
from tests.job_endpoints import (
    CHAT,
    ScriptedEndpoint,
    Till,
    chat,
    frames,
    spent,
    told,
    used,
    whole,
)
from tests.scripted_app import EVENT_STREAM, Fail, Pause, Say, Script, ScriptedApp, answer


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """A database of its own."""
    store = Store.open(database_url)
    yield store
    store.close()


class Clock:
    """Unix time, as the test has it."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        """What it is."""
        return self.now


@asynccontextmanager
async def running(
    store: Store,
    endpoint: ScriptedEndpoint,
    *,
    till: Till | None = None,
    limit: int = 100,
    clock: Clock | None = None,
) -> AsyncIterator[Jobs]:
    """The jobs of `endpoint`, whose id is `local`."""
    endpoints = {"local": endpoint}
    async with Jobs(store, endpoints, costs=till or Till(), limit=limit, clock=clock or Clock()) as jobs:
        yield jobs


async def test_a_job_is_completed_with_what_the_worker_answers(store: Store) -> None:
    """Its output is a list, as from RunPod's SDK; what it has used is counted with it."""
    app, till = ScriptedApp({CHAT: whole(id="x")}), Till()
    endpoint = ScriptedEndpoint(app)
    async with running(store, endpoint, till=till) as jobs:
        job = await jobs.submit(chat())
        assert (await jobs.wait(job, 60)).state is State.COMPLETED
        assert await told(jobs, job) == {
            "id": job.id,
            "status": "COMPLETED",
            "output": [{**used(), "id": "x"}],
        }
    assert await spent(store) == [(job.id, 5)]
    assert till.told == [("a", 5)]
    seen, asked = app.seen[0], endpoint.asked[0]
    assert (seen.header("x-request-id"), asked.visit.caller, asked.visit.background) == (job.id, "a", False)


async def test_a_stream_is_its_frames_without_what_nobody_asked_for(store: Store) -> None:
    """Joined, as long as nobody has asked for them one by one."""
    async with running(store, ScriptedEndpoint(ScriptedApp({CHAT: frames("Hé", "😀")}))) as jobs:
        job = await jobs.wait(await jobs.submit(chat(streams=True)), 60)
        (output,) = (await told(jobs, job))["output"]
    assert [json.loads(part.removeprefix("data: "))["choices"] for part in output.split("\n\n")[:2]] == [
        [{"text": "Hé"}],
        [{"text": "😀"}],
    ]
    assert output.endswith("}\n\ndata: [DONE]\n\n")
    assert await spent(store) == [(job.id, 5)]


@pytest.mark.parametrize("streams", [False, True])
async def test_a_requests_own_fault_completes_its_job(store: Store, *, streams: bool) -> None:
    """As on RunPod: the error is the output, with its status."""
    fault = {"message": "no", "type": "invalid_request_error", "param": None, "code": "bad"}
    endpoint = ScriptedEndpoint(ScriptedApp({CHAT: answer({"error": fault}, 400)}))
    async with running(store, endpoint) as jobs:
        job = await jobs.wait(await jobs.submit(chat(streams=streams)), 60)
        shown = await told(jobs, job)
    output = shown["output"][0]
    error = json.loads(output.removeprefix("data: ")) if streams else output
    assert (shown["status"], error) == ("COMPLETED", {"error": {**fault, "status": 400}})
    assert await spent(store) == []


@pytest.mark.parametrize(
    ("job_input", "status", "code"),
    [
        ({"nothing": 1}, 400, "unknown_event"),
        ({"route": "/metrics"}, 404, "unknown_url"),
        ({"route": "/v1/chat/completions", "method": "GET"}, 405, "method_not_allowed"),
    ],
)
async def test_what_no_worker_needs_to_be_asked(store: Store, job_input: Any, status: int, code: str) -> None:
    """Shapes that are not known and routes that may not be called are answered here."""
    endpoint = ScriptedEndpoint(ScriptedApp({}))
    new = chat()
    new = type(new)(new.endpoint_id, new.key_id, json.dumps(job_input).encode())
    async with running(store, endpoint) as jobs:
        job = await jobs.wait(await jobs.submit(new), 60)
        (output,) = (await told(jobs, job))["output"]
    assert (job.state, output["error"]["status"], output["error"]["code"]) == ("COMPLETED", status, code)
    assert endpoint.asked == []


async def test_a_worker_that_fails_fails_the_job(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """With the error object as text; of a stream what came before it is still told by /stream."""
    caplog.set_level(logging.CRITICAL, "handler.asgi")
    script = Script((Say("data: 1\n\n"), Fail()), headers=EVENT_STREAM)
    async with running(store, ScriptedEndpoint(ScriptedApp({CHAT: script}))) as jobs:
        job = await jobs.wait(await jobs.submit(chat(streams=True)), 60)
        shown = await told(jobs, job)
        streamed = await jobs.stream(job, 60)
    assert (shown["status"], json.loads(shown["error"])["code"]) == ("FAILED", "internal_error")
    assert "output" not in shown
    assert streamed is not None
    assert streamed.status == "FAILED"
    (output,) = map(json.loads, streamed.outputs)
    assert output.startswith('data: 1\n\ndata: {"error":')


async def test_a_job_whose_worker_is_lost_goes_to_the_next_one(store: Store) -> None:
    """Its retries are told."""
    endpoint = ScriptedEndpoint(ScriptedApp({CHAT: whole()}))
    endpoint.failing = [WorkerLost("gone"), WorkerLost("gone")]
    endpoint.fails_begun = True
    async with running(store, endpoint) as jobs:
        job = await jobs.wait(await jobs.submit(chat()), 60)
        shown = await told(jobs, job)
    assert (shown["status"], shown["retries"], len(endpoint.asked)) == ("COMPLETED", 2, 3)
    assert await spent(store) == [(job.id, 5)]


async def test_a_job_that_ends_three_workers_is_failed(store: Store) -> None:
    """With the reason of the last."""
    endpoint = ScriptedEndpoint(ScriptedApp({}))
    endpoint.failing = [WorkerLost(f"gone {n}") for n in range(3)]
    async with running(store, endpoint) as jobs:
        job = await jobs.wait(await jobs.submit(chat()), 60)
        shown = await told(jobs, job)
    error = json.loads(shown["error"])
    assert (shown["status"], error["message"], error["code"]) == ("FAILED", "gone 2", "upstream_failed")
    assert len(endpoint.asked) == 3


async def test_a_job_that_no_worker_takes_in_time_waits_on(store: Store) -> None:
    """A turn that did not come is no attempt: only its ttl ends a job that waits."""
    endpoint = ScriptedEndpoint(ScriptedApp({CHAT: whole()}))
    endpoint.failing = [DeadlineExceeded("late") for _ in range(5)]
    async with running(store, endpoint) as jobs:
        job = await jobs.wait(await jobs.submit(chat()), 60)
        shown = await told(jobs, job)
    assert (shown["status"], "retries" in shown, len(endpoint.asked)) == ("COMPLETED", False, 6)


async def test_workers_that_cant_start_fail_jobs_with_the_reason(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a few starts, and then all that wait: nobody has to find out by waiting for a day."""
    monkeypatch.setattr(runner, "_retry_after_s", lambda _: 0.001)
    endpoint = ScriptedEndpoint(ScriptedApp({CHAT: whole()}), capacity=0)
    refusal = NotAdmitted("The worker could not start: no.", retry_after_s=60, code="worker_start_failed")
    endpoint.failing = [refusal] * 5
    async with running(store, endpoint) as jobs:
        first, second, third = [await jobs.submit(chat()) for _ in range(3)]
        for job in (first, second, third):
            shown = await told(jobs, await jobs.wait(job, 60))
            error = json.loads(shown["error"])
            assert (shown["status"], error["code"], error["status"]) == ("FAILED", "worker_start_failed", 503)
        last = await jobs.wait(await jobs.submit(chat()), 60)
    assert (last.state, len(endpoint.asked)) == (State.COMPLETED, 6)  # 3 for the first, 1 for each other


async def test_a_job_that_runs_for_too_long_times_out(store: Store) -> None:
    """Its executionTimeout counts from when a worker has it, and the worker stops."""
    app = ScriptedApp({CHAT: Script((Pause("here"),))})
    endpoint = ScriptedEndpoint(app)
    endpoint.gate = asyncio.Event()
    async with running(store, endpoint) as jobs:
        job = await jobs.submit(chat(execution_timeout_s=0.05))
        await endpoint.was_asked(1)
        await asyncio.wait({asyncio.ensure_future(jobs.wait(job, 60))}, timeout=0.2)
        assert (await told(jobs, job))["status"] == "IN_QUEUE"  # nobody has it yet
        endpoint.gate.set()
        job = await jobs.wait(job, 60)
        shown = await told(jobs, job)
        await app.seen[0].over.wait()
    assert shown == {
        "id": job.id,
        "status": "TIMED_OUT",
        "error": "The job took longer than its executionTimeout, 0.05 s.",
    }
    assert app.seen[0].ended == "disconnected"


async def test_a_cancelled_job_stops_in_the_worker(store: Store) -> None:
    """What it has made by then is paid for; what is cancelled once is not cancelled again."""
    script = Script((Say('data: {"model":"m"}\n\n'), Pause("here")), headers=EVENT_STREAM)
    app = ScriptedApp({CHAT: script})
    async with running(store, ScriptedEndpoint(app)) as jobs:
        job = await jobs.submit(chat(streams=True))
        assert await jobs.stream(job, 60)
        assert [one.state for one in await jobs.cancel(JOBS.c.id == job.id)] == [State.CANCELLED]
        assert await jobs.cancel(JOBS.c.id == job.id) == []
        await app.seen[0].over.wait()
        assert await told(jobs, job) == {"id": job.id, "status": "CANCELLED"}
    assert app.seen[0].ended == "disconnected"
    assert await spent(store) == [(job.id, 1)]


async def test_a_job_that_waits_is_cancelled_and_never_asked(store: Store) -> None:
    """Also when the endpoint was about to take it."""
    endpoint = ScriptedEndpoint(ScriptedApp({CHAT: whole()}), capacity=0)
    endpoint.gate = asyncio.Event()
    async with running(store, endpoint) as jobs:
        first, second = [await jobs.submit(chat()) for _ in range(2)]
        await endpoint.was_asked(1)
        assert len(await jobs.cancel(JOBS.c.key_id == "a", table.WAITING)) == 2
        endpoint.gate.set()
        third = await jobs.wait(await jobs.submit(chat("b")), 60)
        assert third.state is State.COMPLETED
        assert [(await told(jobs, job))["status"] for job in (first, second)] == ["CANCELLED"] * 2
    assert [request.visit.caller for request in endpoint.asked] == ["a", "b"]


async def test_a_job_whose_ttl_is_over_is_gone(store: Store) -> None:
    """It is not found, stops in the worker, whoever waits for it hears of it, and nothing is left of it."""
    script = Script((Say("data: 1\n\n"), Pause("here")), headers=EVENT_STREAM)
    app, clock = ScriptedApp({CHAT: [frames("a"), script]}), Clock()
    async with running(store, ScriptedEndpoint(app), clock=clock) as jobs:
        ended = await jobs.wait(await jobs.submit(chat(streams=True)), 60)
        await jobs.stream(ended, 60)
        job = await jobs.submit(chat(streams=True, ttl_s=10))
        await jobs.stream(job, 60)
        waiting = asyncio.ensure_future(jobs.wait(job, 60))
        clock.now += 1800
        assert await jobs.find(job.id) is None
        await waiting  # the sweep is a second away at most
        await app.seen[1].over.wait()
    assert app.seen[1].ended == "disconnected"
    assert store.read_now(lambda connection: connection.execute(JOBS.select()).all()) == []
    assert jobs._desk._told == {}


async def test_as_many_jobs_are_asked_for_as_are_worked_on(store: Store) -> None:
    """And one more, by which the pool sees that there are more; those of low priority beside them."""
    endpoint = ScriptedEndpoint(ScriptedApp({}, makes={CHAT: lambda _: whole()}), capacity=2)
    endpoint.gate = asyncio.Event()
    async with running(store, endpoint) as jobs:
        fast = [await jobs.submit(chat()) for _ in range(5)]
        slow = [await jobs.submit(chat(background=True)) for _ in range(4)]
        await endpoint.was_asked(5)
        assert await jobs.counts("local") == {
            "IN_QUEUE": 9,
            "IN_PROGRESS": 0,
            "COMPLETED": 0,
            "FAILED": 0,
            "CANCELLED": 0,
            "TIMED_OUT": 0,
        }
        endpoint.gate.set()
        for job in (*fast, *slow):
            assert (await jobs.wait(job, 60)).state is State.COMPLETED
    assert sorted(request.visit.background for request in endpoint.asked[:5]) == [False] * 3 + [True] * 2


async def test_keys_take_turns(store: Store) -> None:
    """One job of one key does not wait for a thousand of another."""
    endpoint = ScriptedEndpoint(ScriptedApp({}, makes={CHAT: lambda _: whole()}), capacity=0)
    endpoint.gate = asyncio.Event()
    async with running(store, endpoint) as jobs:
        submitted = [await jobs.submit(chat("a")) for _ in range(4)]
        submitted.append(await jobs.submit(chat("b")))
        endpoint.gate.set()
        for job in submitted:
            await jobs.wait(job, 60)
    assert [request.visit.caller for request in endpoint.asked] == ["a", "b", "a", "a", "a"]


async def test_what_a_stopped_gateway_has_not_finished_the_next_one_does(store: Store) -> None:
    """A clean stop gives back what runs: it is no attempt that failed."""
    half = Script((Say('data: {"model":"m"}\n\n'), Pause("here")), headers=EVENT_STREAM)
    endpoint = ScriptedEndpoint(ScriptedApp({CHAT: [half, frames("a")]}))
    async with running(store, endpoint) as jobs:
        job = await jobs.submit(chat(streams=True))
        await jobs.stream(job, 60)
    async with running(store, endpoint) as jobs:
        job = await jobs.wait(job, 60)
    assert (job.state, job.retries, job.attempt) == (State.COMPLETED, 0, 2)
    assert await spent(store) == [(job.id, 5)]


async def test_what_is_claimed_as_the_gateway_stops_is_given_back(store: Store) -> None:
    """However often it is told to stop meanwhile."""
    endpoint = ScriptedEndpoint(ScriptedApp({}))
    written = threading.Event()
    async with running(store, endpoint) as jobs:
        job = await jobs.submit(chat())
        store.begin_write(lambda _: written.wait(60))  # the claim waits behind it
        for _ in range(3):
            await asyncio.sleep(0)
        jobs.stop_taking()
        await asyncio.sleep(0)
        jobs.stop_taking()
        written.set()
    row = store.read_now(lambda connection: connection.execute(select(JOBS.c.state, JOBS.c.attempt)).one())
    assert (row.state, row.attempt) == (State.IN_QUEUE, 1), job.id
    assert not endpoint.asked


async def test_a_failed_job_is_lined_up_again_by_its_client(store: Store) -> None:
    """Under its id, without what came of it before."""
    endpoint = ScriptedEndpoint(ScriptedApp({CHAT: [answer({"error": {"message": "no"}}, 500), whole()]}))
    async with running(store, endpoint) as jobs:
        failed = await jobs.wait(await jobs.submit(chat()), 60)
        assert failed.state is State.FAILED
        again = await jobs.retry(failed)
        assert again is not None
        done = await jobs.wait(again, 60)
        assert (done.id, done.state, done.error) == (failed.id, State.COMPLETED, None)
        assert await jobs.retry(done) is None


async def test_too_many_waiting_jobs_are_turned_away(store: Store) -> None:
    """`JOBS_LIMIT` of them wait at an endpoint; those that run do not count."""
    endpoint = ScriptedEndpoint(ScriptedApp({CHAT: whole()}), capacity=0)
    endpoint.gate = asyncio.Event()
    async with running(store, endpoint, limit=1) as jobs:
        job = await jobs.submit(chat())
        with pytest.raises(RateLimited) as refused:
            await jobs.submit(chat())
        assert refused.value.code == "jobs_limit_reached"
        endpoint.gate.set()
        await jobs.wait(job, 60)


async def test_the_same_idempotency_key_is_the_same_job(store: Store) -> None:
    """However often, at the same time too, and it is not let in again; with another request it is a fault."""
    admitted: list[int] = []
    new = chat(idempotency_key="once", digest=b"1")
    async with running(store, ScriptedEndpoint(ScriptedApp({CHAT: whole()}))) as jobs:
        first, second = await asyncio.gather(*(jobs.submit(new) for _ in range(2)))
        third = await jobs.submit(new, lambda: admitted.append(1))
        with pytest.raises(KeyReused):
            await jobs.submit(chat(idempotency_key="once", digest=b"2"))
        await jobs.wait(first, 60)
    assert first.id == second.id == third.id
    assert admitted == []


async def test_a_stream_is_told_as_it_comes_each_part_once(store: Store) -> None:
    """What is ready together is told together; the end is told with the state."""
    one, two, three, four = (f"data: {n}\n\n" for n in range(1, 5))
    steps = (Say(one), Pause("one"), Say(two), Say(three), Pause("two"), Say(four))
    app = ScriptedApp({CHAT: Script(steps, headers=EVENT_STREAM)})
    async with running(store, ScriptedEndpoint(app)) as jobs:
        job = await jobs.submit(chat(streams=True))
        polls, rest = [await jobs.stream(job, 60)], []
        app.gate("one").opened.set()
        await app.gate("two").reached.wait()
        polls += [await jobs.stream(job, 60), await jobs.stream(job, 0.01)]
        app.gate("two").opened.set()
        while (poll := await jobs.stream(job, 60)) and (poll.outputs or poll.status != "COMPLETED"):
            rest.append(poll)
    assert [(poll.status, poll.attempt, list(map(json.loads, poll.outputs))) for poll in polls if poll] == [
        ("IN_PROGRESS", 1, [one]),
        ("IN_PROGRESS", 1, [two + three]),
        ("IN_PROGRESS", 1, []),
    ]
    assert [json.loads(output) for poll in rest for output in poll.outputs] == [four]


async def test_a_stream_that_no_job_could_hold_is_stopped(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs is bounded in memory."""
    monkeypatch.setattr(shapes, "ANSWER_MAX_BYTES", 1000)
    app = ScriptedApp(
        {CHAT: Script((Say("data: " + "x" * 2000 + "\n\n"), Pause("here")), headers=EVENT_STREAM)}
    )
    async with running(store, ScriptedEndpoint(app)) as jobs:
        job = await jobs.wait(await jobs.submit(chat(streams=True)), 60)
        error = json.loads((await told(jobs, job))["error"])
    assert (job.state, error["code"], app.seen[0].ended) == (State.FAILED, "answer_too_large", "disconnected")


async def test_the_jobs_of_a_key_that_was_closed_are_cancelled(store: Store) -> None:
    """Those that wait are never asked for, one that runs is stopped; it is said why. Others' go on."""
    app, closed = ScriptedApp({CHAT: [Script((Pause("here"),)), whole()]}), set[str]()
    endpoint = ScriptedEndpoint(app, capacity=1)
    gone = {"status": "CANCELLED", "error": "The key of the job is valid no more."}
    async with Jobs(store, {"local": endpoint}, costs=Till(), limit=10, closed=lambda: [*closed]) as jobs:
        runs = await jobs.submit(chat("a"))
        await app.gate("here").reached.wait()
        endpoint.gate = asyncio.Event()
        waits = [await jobs.submit(chat("a", background=background)) for background in (True, False)]
        other = await jobs.submit(chat("b"))
        closed.add("a")
        jobs.keys_changed()
        ended = [await jobs.wait(job, 60) for job in (runs, *waits)]
        assert [(job.state, job.error) for job in ended] == [(State.CANCELLED, gone["error"])] * 3
        assert gone.items() <= (await told(jobs, runs)).items()
        endpoint.gate.set()
        assert (await jobs.wait(other, 60)).state is State.COMPLETED
    assert [seen.ended for seen in app.seen] == ["disconnected", "finished"]


async def test_a_gateway_begins_no_job_of_a_key_that_was_closed_before_it(store: Store) -> None:
    """A command may have revoked it while no gateway ran."""
    async with Jobs(store, {}, costs=Till(), limit=10) as jobs:
        job = await jobs.submit(chat("a"))
    endpoint = ScriptedEndpoint(ScriptedApp({}))
    async with Jobs(store, {"local": endpoint}, costs=Till(), limit=10, closed=lambda: ["a"]) as jobs:
        assert (await jobs.wait(job, 60)).state is State.CANCELLED
    assert endpoint.asked == []


async def test_jobs_of_an_endpoint_that_is_not_there_wait_for_it(store: Store) -> None:
    """It may come back with the next reload."""
    endpoints: dict[str, ScriptedEndpoint] = {}
    async with Jobs(store, endpoints, costs=Till(), limit=10) as jobs:
        job = await jobs.submit(chat())
        assert (await jobs.wait(job, 0.01)).state is State.IN_QUEUE
        endpoints["local"] = ScriptedEndpoint(ScriptedApp({CHAT: whole()}))
        jobs.wake("local")
        assert (await jobs.wait(job, 60)).state is State.COMPLETED
