"""The RunPod pool over real processes and sockets: a client that misbehaves, and the real SDK."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.endpoints.admission import Admission
from gateway.metrics import Metrics
from gateway.scaling import Scaling
from gateway.upstreams import WorkerLost
from gateway.upstreams.control_plane import ControlPlane
from gateway.upstreams.events import Ended, Event
from gateway.upstreams.job import HIGH_WATER_BYTES
from gateway.upstreams.launch import Fresh
from gateway.upstreams.line import Line
from gateway.upstreams.pool import Keep
from gateway.upstreams.process import SLOTS_GUESS
from gateway.upstreams.runpod import RunpodPool
from handler import sse
from handler.errors import BadRequest, DeadlineExceeded, NotAdmitted, UpstreamFailed
from handler.messages import Reply, Request, Visit, read
from tests import runpod_worker, scripted_worker
from tests.jobs_client import TAKES_JOBS, JobsClient, speaking_for
from tests.ready import until_ready
from tests.scripted_app import Crash, Pause, Say, Script, answer, stream
from tests.scripted_worker import Director, Worker

JSON = (("content-type", "application/json"),)
CHAT = Request("POST", "/v1/chat/completions", JSON, b'{"stream":true}')
PLAIN = Request("POST", "/v1/chat/completions", JSON, b'{"n":1}')


def arriving(request: Request) -> Request:
    """`request`, as if it came now: what it may wait counts from its arrival."""
    return replace(request, visit=Visit())


ROUTE = "POST /v1/chat/completions"
DONE = "data: [DONE]\n\n"
NEVER = 600.0


class Stage:
    """An upstream, its workers' director, and what was told and counted."""

    def __init__(self, upstream: RunpodPool, director: Director, metrics: Metrics) -> None:
        self.upstream = upstream
        self.director = director
        self.metrics = metrics
        self.events: list[Event] = []
        self.heard = asyncio.Event()

    def counted(self, what: str) -> float:
        """How often `what` has happened to a job."""
        return float(self.metrics.runpod_jobs.labels("local", what)._value.get())

    def held(self) -> int:
        """How many jobs workers hold."""
        return sum(view.in_flight for view in self.upstream.workers)

    async def ended(self) -> Ended:
        """How the first worker ended, once it has."""
        while not (ends := [event for event in self.events if isinstance(event, Ended)]):
            self.heard.clear()
            await self.heard.wait()
        return ends[0]

    async def worker(self) -> Worker:
        """The next worker, once it is ready."""
        waiting = asyncio.create_task(until_ready(self.upstream))
        worker = await self.director.worker()
        await waiting
        return worker

    def ask(self, request: Request = PLAIN) -> asyncio.Task[bytes]:
        """A client that asks and reads all."""

        async def ask() -> bytes:
            async with self.upstream.call(arriving(request)) as reply:
                return await read(reply)

        return asyncio.create_task(ask())


@asynccontextmanager
async def stage(
    tmp_path: Path,
    *plays: tuple[object, object],
    command: Sequence[str] = scripted_worker.COMMAND,
    environ: dict[str, str] | None = None,
    queue_limit: int = 9,
    queue_timeout_s: float = NEVER,
    execution_timeout_s: float = NEVER,
    lease_s: float = NEVER,
    hold_s: float = 20.0,
    scaling: Scaling = Scaling(),  # noqa: B008 - frozen
) -> AsyncIterator[Stage]:
    """An upstream whose nth worker plays the nth of `plays`."""
    async with AsyncExitStack() as stack:
        director = await stack.enter_async_context(Director(tmp_path / "control", *plays).listening())  # type: ignore[arg-type]
        metrics = Metrics()
        own = metrics.endpoint("local")
        line = Line(
            own,
            limit=queue_limit,
            queue_timeout_s=queue_timeout_s,
            execution_timeout_s=execution_timeout_s,
        )

        def tell(event: Event) -> None:
            on.events.append(replace(event, worker=""))
            on.heard.set()

        upstream = RunpodPool(
            lambda _: Fresh(command),
            {**os.environ, "SCRIPT_CONTROL": str(director.path), "MODEL_NAME": "m", **(environ or {})},
            ControlPlane("local", line, own, lease_s=lease_s, hold_s=hold_s),
            Keep(
                at_once=False,
                start_timeout_s=60,
                drain_timeout_s=30,
                scaling=scaling,
                tell=tell,
                back_off=lambda _: NEVER,
            ),
        )
        on = Stage(upstream, director, metrics)
        await stack.enter_async_context(upstream)
        yield on


@asynccontextmanager
async def spoken(tmp_path: Path, **kwargs: Any) -> AsyncIterator[tuple[Stage, JobsClient]]:
    """An upstream, and the client in the place of its first worker; a second one is allowed."""
    async with (
        stage(tmp_path, (TAKES_JOBS, {}), (TAKES_JOBS, {}), **kwargs) as on,
        speaking_for(await on.worker()) as sdk,
    ):
        yield on, sdk


async def begun(on: Stage, sdk: JobsClient, stack: AsyncExitStack) -> tuple[str, Reply]:
    """A stream that has one frame, and the id of its job."""
    entering = asyncio.create_task(stack.enter_async_context(on.upstream.call(arriving(CHAT))))
    job = await sdk.take()
    assert job is not None
    await sdk.stream(job["id"], "data: 1\n\n")
    reply = await entering
    assert await anext(reply.frames) == b"data: 1\n\n"
    return job["id"], reply


def in_front(on: Stage, keep_alive_s: float = 0) -> Admission:
    """The gateway's queue, as long as the line."""
    limit = on.upstream._line._limit
    return Admission(on.upstream, limit=limit, queue_timeout_s=NEVER, keep_alive_s=keep_alive_s)


async def answered(front: Admission, request: Request) -> bytes:
    """The whole answer to `request`, which may be asked of two workers."""
    async with front.call(request) as reply:
        return await read(reply)


def numbered(n: int) -> Request:
    """A request that can be told from others."""
    return Request("POST", "/v1/completions", JSON, json.dumps({"n": n}).encode())


async def test_worker_is_told_where_the_control_plane_is(tmp_path: Path) -> None:
    """All that the SDK reads, and nothing that is the gateway's."""
    own = {"API_KEY": "secret", "PORT": "1", "NO_PROXY": "a.example", "START_FAILURE": ""}
    async with stage(tmp_path, (TAKES_JOBS, {}), environ=own) as on:
        env = (await on.worker()).env
        assert {"HOST", "PORT", "API_KEY", "UDS"}.isdisjoint(env)
        base = env["RUNPOD_WEBHOOK_GET_JOB"].partition("/job-take/")[0]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v2/local", base)
        told = {name: env[name] for name in env if name.startswith("RUNPOD_")}
        assert len(told.pop("RUNPOD_AI_API_KEY")) == 43
        assert re.fullmatch(r"worker-1-[0-9a-f]{8}", told.pop("RUNPOD_POD_ID"))
        assert told == {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=local",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=local",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=local",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?gpu=local",
            "RUNPOD_PING_INTERVAL": "10000",
            "RUNPOD_ENDPOINT_ID": "local",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }
        assert (env["PLATFORM"], env["START_FAILURE"]) == ("runpod", "exit")
        assert env["no_proxy"] == env["NO_PROXY"] == "a.example,127.0.0.1"


@pytest.mark.parametrize("given", ["", "wrong", "Bearer {}", "{}x"])
async def test_nobody_without_the_key_is_heard(tmp_path: Path, given: str) -> None:
    """On no route, whether it exists or not; it is no bearer token, as the SDK sends it raw."""
    async with stage(tmp_path, (TAKES_JOBS, {})) as on:
        env = (await on.worker()).env
        key = env["RUNPOD_AI_API_KEY"]
        base = env["RUNPOD_WEBHOOK_GET_JOB"].partition("/job-take/")[0]
        async with aiohttp.ClientSession(headers={"authorization": given.format(key)}) as session:
            for method, route in (
                ("GET", "job-take/w"),
                ("GET", "job-take-batch/w"),
                ("GET", "job-stop/w"),
                ("GET", "ping/w"),
                ("POST", "job-stream/w/j"),
                ("POST", "job-done/w/j"),
                ("GET", "nothing"),
            ):
                async with session.request(method, f"{base}/{route}") as response:
                    assert response.status == 401


async def test_request_becomes_a_job_and_its_output_the_answer(tmp_path: Path) -> None:
    """Method, path and body travel in the job; no header does."""
    async with spoken(tmp_path) as (on, sdk):
        asking = on.ask()
        job = await sdk.take()
        assert job is not None
        assert job == {
            "id": job["id"],
            "input": {"openai_route": "/v1/chat/completions", "openai_input": {"n": 1}},
        }
        assert (on.upstream.in_line, on.held()) == (0, 1)
        await sdk.stream(job["id"], {"id": "a"})
        assert await asking == b'{"id":"a"}'
        await sdk.done(job["id"], {"output": [{"id": "a"}]})
        assert (on.upstream.in_line, on.held()) == (0, 0)
        assert (on.counted("stopped"), on.counted("dropped")) == (0, 0)


async def test_requests_are_taken_in_order_and_in_batches(tmp_path: Path) -> None:
    """A batch is a list, up to its size."""
    async with spoken(tmp_path) as (on, sdk):
        asking = [
            on.ask(Request("POST", "/v1/completions", JSON, json.dumps({"n": n}).encode())) for n in range(3)
        ]
        batch = await sdk.take_batch(2)
        last = await sdk.take_batch(2)
        assert [job["input"]["openai_input"]["n"] for job in batch + last] == [0, 1, 2]
        for job in batch + last:
            await sdk.done(job["id"], {"output": job["input"]["openai_input"]}, generator=False)
        assert [json.loads(await asked) for asked in asking] == [{"n": n} for n in range(3)]


async def test_frames_are_passed_on_as_they_come(tmp_path: Path) -> None:
    """The end comes when the job is done."""
    async with spoken(tmp_path) as (on, sdk), AsyncExitStack() as client:
        job_id, reply = await begun(on, sdk, client)
        await sdk.stream(job_id, f"data: 2\n\n{DONE}")
        assert await anext(reply.frames) == b"data: 2\n\n"
        await sdk.done(job_id, {"output": ["data: 1\n\n", f"data: 2\n\n{DONE}"]})
        assert await read(reply) == DONE.encode()


async def test_lost_frames_at_the_end_come_with_the_result(tmp_path: Path) -> None:
    """The SDK loses a post that meets a reset, and goes on."""
    async with spoken(tmp_path) as (on, sdk), AsyncExitStack() as client:
        job_id, reply = await begun(on, sdk, client)
        await sdk.done(job_id, {"output": ["data: 1\n\n", "data: 2\n\n", DONE]})
        assert await read(reply) == f"data: 2\n\n{DONE}".encode()


async def test_a_lost_frame_in_the_middle_is_an_error(tmp_path: Path) -> None:
    """In place of the end."""
    async with spoken(tmp_path) as (on, sdk), AsyncExitStack() as client:
        job_id, reply = await begun(on, sdk, client)
        await sdk.stream(job_id, "data: 3\n\n")
        await sdk.done(job_id, {"output": ["data: 1\n\n", "data: 2\n\n", "data: 3\n\n", DONE]})
        assert await anext(reply.frames) == b"data: 3\n\n"
        with pytest.raises(UpstreamFailed, match="lost on its way"):
            await anext(reply.frames)


async def test_failed_job_is_an_error_with_its_status(tmp_path: Path) -> None:
    """And what is no error of ours is one too."""
    async with spoken(tmp_path) as (on, sdk):
        for error, status, message in (
            (json.dumps({"message": "dead", "code": "engine_dead", "status": 500}), 500, "dead"),
            ("handler: boom \ntraceback: ...", 502, "The job failed: handler: boom"),
        ):
            async with AsyncExitStack() as client:
                entering = asyncio.create_task(client.enter_async_context(on.upstream.call(arriving(CHAT))))
                job = await sdk.take()
                assert job is not None
                await sdk.done(job["id"], {"error": error})
                reply = await entering
                assert reply.status == status
                assert json.loads(await read(reply))["error"]["message"].startswith(message)


async def test_progress_and_nonsense_end_no_job(tmp_path: Path) -> None:
    """The SDK tells progress on the route of results; a result that can't be read is a failure."""
    async with spoken(tmp_path) as (on, sdk):
        asking = on.ask()
        job = await sdk.take()
        assert job is not None
        await sdk.done(job["id"], {"status": "IN_PROGRESS", "output": "half"}, generator=False)
        assert on.held() == 1
        await sdk.done(job["id"], {})
        assert json.loads(await asking)["error"]["code"] == "upstream_failed"


async def test_leaving_the_line_is_not_heard_of(tmp_path: Path) -> None:
    """The next in line is taken."""
    async with spoken(tmp_path) as (on, sdk):
        gone, asking = on.ask(), on.ask()
        while on.upstream.in_line < 2:  # noqa: ASYNC110 - a state has no event
            await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait({gone})
        job = await sdk.take()
        assert job is not None
        await sdk.done(job["id"], {"output": [1]})
        assert await asking == b"1"
        assert on.counted("handed_out") == 1


@pytest.mark.parametrize("answered", [False, True], ids=["before the answer", "in mid-stream"])
async def test_leaving_stops_the_job_and_again(tmp_path: Path, answered: bool) -> None:
    """The open poll has the id at once, and the next again; late posts are dropped."""
    async with spoken(tmp_path) as (on, sdk):
        poll = asyncio.create_task(sdk.stops())
        async with AsyncExitStack() as client:
            if answered:
                job_id, _ = await begun(on, sdk, client)
            else:
                asking = on.ask()
                job = await sdk.take()
                assert job is not None
                job_id = job["id"]
                asking.cancel()
        assert await poll == [job_id]
        assert await sdk.stops() == [job_id]
        await sdk.stream(job_id, "data: 2\n\n")
        await sdk.done(job_id, {"output": []})
        assert (on.counted("stopped"), on.counted("dropped")) == (1, 2)


async def test_leaving_a_complete_answer_stops_nothing(tmp_path: Path) -> None:
    """The job is waited for."""
    async with spoken(tmp_path) as (on, sdk), AsyncExitStack() as client:
        job_id, _ = await begun(on, sdk, client)
        await sdk.stream(job_id, DONE)
        await client.aclose()
        assert on.held() == 1
        await sdk.done(job_id, {"output": ["data: 1\n\n", DONE]})
        assert on.held() == 0
        assert (on.counted("stopped"), on.counted("dropped")) == (0, 0)


async def test_slow_client_slows_its_worker(tmp_path: Path) -> None:
    """A post is answered once there is room; when the client leaves it is answered too."""
    async with spoken(tmp_path) as (on, sdk), AsyncExitStack() as client:
        job_id, reply = await begun(on, sdk, client)
        much = "data: " + "x" * HIGH_WATER_BYTES + "\n\n"
        post = asyncio.create_task(sdk.stream(job_id, much))
        while not reply_has_more(on):  # noqa: ASYNC110 - a state has no event
            await asyncio.sleep(0)
        other = on.ask()  # a later request is served meanwhile
        job = await sdk.take()
        assert job is not None
        await sdk.done(job["id"], {"output": [1]})
        assert await other == b"1"
        assert not post.done()
        assert await anext(reply.frames) == much.encode()
        await post
        post = asyncio.create_task(sdk.stream(job_id, much))
        while not reply_has_more(on):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)
        await client.aclose()
        await post


def reply_has_more(on: Stage) -> bool:
    """Whether a job has more unread than it may."""
    return any(not job._room.is_set() for job in on.upstream._line._handed.values())


async def test_take_whose_client_has_gone_takes_nothing(tmp_path: Path) -> None:
    """The next one gets the job."""
    async with spoken(tmp_path) as (on, sdk):
        poll = asyncio.create_task(sdk.take())
        while not on.upstream._line.wanted:  # noqa: ASYNC110 - a state has no event
            await asyncio.sleep(0)
        poll.cancel()
        while on.upstream._line.wanted:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)
        asking = on.ask()
        job = await sdk.take()
        assert job is not None
        await sdk.done(job["id"], {"output": [1]})
        assert await asking == b"1"


async def test_job_that_its_worker_does_not_know_is_not_waited_for(tmp_path: Path) -> None:
    """An answer to a take was lost, or a last word: the worker says that it has no job in progress."""
    async with spoken(tmp_path) as (on, sdk), AsyncExitStack() as client:
        _, reply = await begun(on, sdk, client)
        unknown = on.ask()
        assert await sdk.take() is not None
        sdk.held.clear()
        poll = asyncio.create_task(sdk.take())
        with pytest.raises(WorkerLost, match="lost the job before it answered"):
            await unknown
        with pytest.raises(UpstreamFailed, match="lost the job while it answered"):
            await anext(reply.frames)
        poll.cancel()


async def test_polls_without_news_are_held(tmp_path: Path) -> None:
    """An empty answer at once would be asked for again at once."""
    async with spoken(tmp_path, hold_s=0.2) as (_, sdk):
        began_s = asyncio.get_running_loop().time()
        assert await asyncio.gather(sdk.take(), sdk.take_batch(3), sdk.stops()) == [None, [], []]
        assert asyncio.get_running_loop().time() - began_s >= 0.2


async def test_full_line_turns_away_and_waiting_has_an_end(tmp_path: Path) -> None:
    """503 with a hint, and 504."""
    async with spoken(tmp_path, queue_limit=1) as (on, _):
        waiting = on.ask()
        while not on.upstream.in_line:  # noqa: ASYNC110 - a state has no event
            await asyncio.sleep(0)
        with pytest.raises(NotAdmitted):
            await on.ask()
        line = on.upstream._line
        (job,) = line._queued.values()
        line._give_up(job)  # its time is over
        with pytest.raises(DeadlineExceeded):
            await waiting


async def test_job_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    """Its client is told, the worker too, and what that still says is dropped."""
    async with spoken(tmp_path) as (on, sdk), AsyncExitStack() as client:
        job_id, reply = await begun(on, sdk, client)
        line = on.upstream._line
        line._expire(line._handed[job_id])  # its time is over
        with pytest.raises(DeadlineExceeded):
            await anext(reply.frames)
        assert await sdk.stops() == [job_id]
        await sdk.done(job_id, {"output": ["data: 1\n\n", DONE]})
        assert (on.counted("expired"), on.counted("dropped")) == (1, 1)


async def test_what_no_job_can_hold_is_refused(tmp_path: Path) -> None:
    """A form with a file never gets into the line."""
    async with stage(tmp_path) as on:
        sound = Request("POST", "/v1/audio/transcriptions", (("content-type", "multipart/form-data"),), b"--")
        with pytest.raises(BadRequest, match="can't be asked through jobs"):
            await on.ask(sound)


async def test_dead_worker_fails_what_had_begun_and_hands_on_the_rest(tmp_path: Path) -> None:
    """What was not begun is asked again, what was not taken stays in line, and late words are dropped."""
    async with spoken(tmp_path) as (on, sdk), AsyncExitStack() as client:
        job_id, reply = await begun(on, sdk, client)
        asking = asyncio.create_task(answered(in_front(on), arriving(PLAIN)))
        taken = await sdk.take()
        assert taken is not None
        queued = on.ask(Request("GET", "/v1/models"))
        while not on.upstream.in_line:  # noqa: ASYNC110 - a state has no event
            await asyncio.sleep(0)
        os.kill(on.upstream.workers[0].pid or 0, signal.SIGKILL)
        with pytest.raises(UpstreamFailed) as failed:
            await anext(reply.frames)
        assert not isinstance(failed.value, WorkerLost)
        second = await on.director.worker()
        async with speaking_for(second) as successor:
            both = [await successor.take(), await successor.take()]  # the one asked again may come later
            (models,) = [job for job in both if job and job["input"] == {"openai_route": "/v1/models"}]
            (again,) = [job for job in both if job and job["input"].get("openai_input") == {"n": 1}]
            assert again["id"] not in {taken["id"], job_id}
            await sdk.done(
                taken["id"], {"output": ["of the dead"]}
            )  # its process is gone, its words come late
            await sdk.done(again["id"], {"output": ["of another"]})
            await successor.done(models["id"], {"output": ["models"]})
            await successor.done(again["id"], {"output": ["alive"]})
        assert [await queued, await asking] == [b"models", b"alive"]
        assert (on.counted("retried"), on.counted("dropped")) == (1, 2)


async def test_dead_worker_turns_nobody_away(tmp_path: Path) -> None:
    """What it held is first in line again, which was full and is longer now."""
    async with spoken(tmp_path, queue_limit=2) as (on, sdk), AsyncExitStack() as clients:
        front = in_front(on)
        asking, held = [], []
        for n in range(2):
            asking.append(asyncio.create_task(answered(front, numbered(n))))
            held += await sdk.take_batch(1)
        assert [job["input"]["openai_input"]["n"] for job in held] == [0, 1]
        asking += [asyncio.create_task(answered(front, numbered(n))) for n in (2, 3)]
        while front.waiting < 2:  # noqa: ASYNC110 - a state has no event
            await asyncio.sleep(0)
        with pytest.raises(NotAdmitted):
            await answered(front, numbered(4))
        os.kill(on.upstream.workers[0].pid or 0, signal.SIGKILL)
        await on.ended()
        while front.waiting < 4:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)
        with pytest.raises(NotAdmitted, match="already wait"):
            await answered(front, numbered(5))
        successor = await clients.enter_async_context(speaking_for(await on.director.worker()))
        taken: list[dict[str, Any]] = []
        while len(taken) < 4:
            taken += await successor.take_batch(9)
        assert [job["input"]["openai_input"]["n"] for job in taken] == [0, 1, 2, 3]
        for job in taken:
            await successor.done(job["id"], {"output": [job["input"]["openai_input"]]})
        assert [json.loads(await asked) for asked in asking] == [{"n": n} for n in range(4)]


async def test_stream_that_waits_is_kept_alive(tmp_path: Path) -> None:
    """Until a worker asks for jobs it hears comments, and then what the worker posts."""
    async with spoken(tmp_path) as (on, sdk), AsyncExitStack() as clients:
        front = in_front(on, keep_alive_s=0.01)
        first, second = [await clients.enter_async_context(front.call(arriving(CHAT))) for _ in range(2)]
        for reply in (first, second):
            assert (reply.status, reply.headers) == (200, sse.HEADERS)
            assert [await anext(reply.frames) for _ in range(3)] == [sse.KEEP_ALIVE] * 3
        assert (front.waiting, on.upstream.in_line) == (2, 0)
        for reply, text in ((first, "1"), (second, "2")):
            job = await sdk.take()
            assert job is not None
            await sdk.stream(job["id"], f"data: {text}\n\n")
            await sdk.done(job["id"], {"output": [f"data: {text}\n\n", DONE]})
            assert (await read(reply)).replace(sse.KEEP_ALIVE, b"") == f"data: {text}\n\n{DONE}".encode()


async def test_hung_worker_is_killed_and_replaced(tmp_path: Path) -> None:
    """It lives and does not poll; pings prove nothing, they come from another process."""
    async with spoken(tmp_path, lease_s=NEVER) as (on, sdk):
        poll = asyncio.create_task(sdk.stops())
        asking = on.ask()
        job = await sdk.take()
        assert job is not None
        await sdk.ping(f"job_id={job['id']}&runpod_version=1.12.0")
        (lease,) = on.upstream._plane.leases.values()
        while not lease._polls:  # noqa: ASYNC110 - a state has no event
            await asyncio.sleep(0)
        lease._lease_s = 0.01  # only now: what comes before may take its time
        poll.cancel()
        with pytest.raises(WorkerLost):
            await asking
        assert await on.ended() == Ended("", f"it has not polled for {NEVER:g} s", expected=False)


async def test_unhealthy_worker_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the check and its reason; the SDK then ends its process."""
    async with spoken(tmp_path) as (_, sdk):
        with caplog.at_level(logging.ERROR, "gateway"):
            await sdk.ping("status=unhealthy&check=disk&reason=it+is+full&runpod_version=1.12.0")
        (said,) = caplog.records
        assert (said.message, vars(said)["check"], vars(said)["reason"]) == (
            "worker is unhealthy",
            "disk",
            "it is full",
        )


async def test_those_in_line_are_refused_when_no_worker_can_start(tmp_path: Path) -> None:
    """With the reason, at once."""
    plays: list[tuple[object, object]] = [(TAKES_JOBS, {}), ([("exit", "66")], {})]
    async with stage(tmp_path, *plays) as on:
        worker = await on.worker()
        asking = on.ask()
        while not on.upstream.in_line:  # noqa: ASYNC110 - a state has no event
            await asyncio.sleep(0)
        worker.kill()
        with pytest.raises(NotAdmitted) as refused:
            await asking
        assert refused.value.code == "worker_start_failed"
        with pytest.raises(NotAdmitted):
            await on.ask()


async def test_stopping_answers_the_polls_and_turns_away_the_line(tmp_path: Path) -> None:
    """Nothing is handed out any more."""
    async with spoken(tmp_path) as (on, sdk):
        poll, asking = asyncio.create_task(sdk.stops()), on.ask()
        (lease,) = on.upstream._plane.leases.values()
        while not (on.upstream.in_line and lease._polls):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)
        on.upstream.stop_taking()
        with pytest.raises(NotAdmitted, match="stopping"):
            await asking
        assert await poll == []
        with pytest.raises(NotAdmitted):
            await on.ask()


async def test_jobs_are_shared_between_workers(tmp_path: Path) -> None:
    """A job goes to whoever holds least of those that ask; who is retired gets none, and is waited for."""
    scaling = Scaling(min_workers=2, max_workers=2)
    async with (
        stage(tmp_path, (TAKES_JOBS, {}), (TAKES_JOBS, {}), scaling=scaling) as on,
        AsyncExitStack() as clients,
    ):
        sdks = [await clients.enter_async_context(speaking_for(await on.director.worker())) for _ in range(2)]
        while on.upstream.capacity < 2 * SLOTS_GUESS:  # noqa: ASYNC110 - a state has no event
            await asyncio.sleep(0)
        asking = [on.ask(numbered(0))]
        held = await sdks[0].take_batch(8)
        polls = [asyncio.create_task(sdk.take_batch(8)) for sdk in sdks]
        while len([lease for lease in on.upstream._plane.leases.values() if lease.asking]) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert on.upstream.free == 16
        asking.append(on.ask(numbered(1)))
        assert [job["input"]["openai_input"]["n"] for job in await polls[1]] == [1]  # the other holds one
        on.upstream.rescale(Scaling(max_workers=1, idle_timeout_s=0.0))
        while not (going := [view for view in on.upstream.workers if view.state == "retiring"]):  # noqa: ASYNC110
            await asyncio.sleep(0)
        left = [sdk.worker_id for sdk in sdks].index(going[0].id)
        stays = 1 - left
        polls[1] = asyncio.create_task(sdks[1].take_batch(8))
        asking.append(on.ask(numbered(2)))
        assert [job["input"]["openai_input"]["n"] for job in await polls[stays]] == [2]
        for number, sdk in ((0, sdks[0]), (1, sdks[1]), (2, sdks[stays])):
            (job,) = [
                job
                for job in on.upstream._line._handed.values()
                if job.input["openai_input"] == {"n": number}
            ]
            await sdk.done(job.id, {"output": [number]})
        assert [await asked for asked in asking] == [b"0", b"1", b"2"]
        assert held
        assert await polls[left] == []
        ended = await on.ended()
        assert ended.expected


# --- with the real SDK ------------------------------------------------------------------------


def real(scripts: object, *start: tuple[str, ...]) -> tuple[object, object]:
    """What the scripted application of a worker with the real SDK plays."""
    return (start, scripts)


async def test_real_sdk_answers_streams_and_statuses(tmp_path: Path) -> None:
    """Bytes and statuses are those of the application."""
    error = {
        "error": {
            "message": "no",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    scripts = {
        "GET /v1/models": answer({"data": []}),
        ROUTE: [stream("1", "é\\u2028", "3"), answer(error, 404), answer(error, 404), answer({"id": "ü"})],
    }
    async with stage(tmp_path, real(scripts), command=runpod_worker.COMMAND) as on:
        await on.worker()
        assert await on.ask(Request("GET", "/v1/models")) == b'{"data":[]}'
        assert await on.ask(CHAT) == "data: 1\n\ndata: é\\u2028\n\ndata: 3\n\ndata: [DONE]\n\n".encode()
        for request in (CHAT, PLAIN):
            async with on.upstream.call(arriving(request)) as reply:
                assert (reply.status, json.loads(await read(reply))) == (404, error)
        assert json.loads(await on.ask(PLAIN)) == {"id": "ü"}


async def test_real_sdk_ignores_the_key_of_a_user(tmp_path: Path) -> None:
    """`~/.runpod/config.toml` would win over the key it is given."""
    (tmp_path / ".runpod").mkdir()
    (tmp_path / ".runpod/config.toml").write_text('[default]\napi_key = "the user\'s own"\n')
    environ = {"HOME": str(tmp_path)}
    async with stage(
        tmp_path, real({ROUTE: answer({"id": "a"})}), command=runpod_worker.COMMAND, environ=environ
    ) as on:
        await on.worker()
        assert json.loads(await on.ask(PLAIN)) == {"id": "a"}


async def test_real_sdk_stops_what_its_client_has_left(tmp_path: Path) -> None:
    """Before the first byte and in mid-stream."""
    scripts = {ROUTE: [Script((Pause("before"), Say("{}"))), stream("1", Pause("midway"), "2")]}
    async with stage(tmp_path, real(scripts), command=runpod_worker.COMMAND) as on:
        worker = await on.worker()
        asking = on.ask(PLAIN)
        await worker.saw("paused", "before")
        asking.cancel()
        await worker.saw("disconnected", ROUTE)
        async with on.upstream.call(arriving(CHAT)) as reply:
            assert await anext(reply.frames) == b"data: 1\n\n"
        await worker.saw("disconnected", ROUTE, 2)


async def test_real_sdk_that_dies_is_replaced_silently(tmp_path: Path) -> None:
    """The client's answer comes from the next worker, which is one of its own."""
    plays = [real({ROUTE: Script((Crash(),))}), real({ROUTE: answer({"id": "b"})})]
    async with stage(tmp_path, *plays, command=runpod_worker.COMMAND) as on:
        async with in_front(on).call(arriving(PLAIN)) as reply:
            assert json.loads(await read(reply)) == {"id": "b"}
        assert on.upstream.starts == 2


async def test_real_sdk_drains(tmp_path: Path) -> None:
    """What it holds is answered whole, then it ends by itself."""
    scripts = {ROUTE: stream("1", Pause("generating"), "2")}
    async with stage(tmp_path, real(scripts), command=runpod_worker.COMMAND) as on:
        worker = await on.worker()
        async with on.upstream.call(arriving(CHAT)) as reply:
            await anext(reply.frames)
            closing = asyncio.create_task(on.upstream.close())
            worker.open("generating")
            assert await read(reply) == b"data: 2\n\ndata: [DONE]\n\n"
        await closing
        assert await on.ended() == Ended("", "it exited with code 0", expected=True)
