"""`handler.platforms.runpod`: the real SDK in a process of its own, a platform that records, no engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.servers import tree
from gateway.upstreams.notify import NotifySocket
from tests.runpod_plane import Plane
from tests.runpod_worker import COMMAND
from tests.scripted_app import EVENT_STREAM, Crash, Fail, Pause, Say, Script, answer, stream
from tests.scripted_worker import Director, Scripts, Worker
from tests.servers import ROOT, engine_environ

CHAT = "POST /v1/chat/completions"
DONE = "data: [DONE]\n\n"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
PLAIN = {"openai_route": "/v1/chat/completions", "openai_input": ASK}
STREAM = {"openai_route": "/v1/chat/completions", "openai_input": {**ASK, "stream": True}}


@dataclass(frozen=True)
class Pod:
    """A worker process on the platform, and what it says on its output."""

    plane: Plane
    worker: Worker
    process: asyncio.subprocess.Process
    said: Path
    stopping: asyncio.Event
    """Set once it has said that it takes no more."""

    async def exit_code(self) -> int:
        """How it ends, once every long poll has been answered."""
        await self.plane.release()
        return await self.process.wait()


@asynccontextmanager
async def pod(
    folder: Path, scripts: Scripts, environ: Mapping[str, str] | None = None, *, repeat: bool = False
) -> AsyncIterator[Pod]:
    """A worker that plays `scripts`; killed at the end if it is still there."""
    director = Director(folder / "control", ([["repeat"]] if repeat else [], scripts))
    said = folder / "said"
    stopping = asyncio.Event()
    notify = NotifySocket(folder / "notify", lambda news: stopping.set() if "STOPPING" in news else None)
    async with director.listening(), Plane().open() as plane:
        with said.open("w") as output:
            process = await asyncio.create_subprocess_exec(
                *COMMAND,
                cwd=ROOT,
                env={
                    **engine_environ(folder),
                    **plane.environ(),
                    "SCRIPT_CONTROL": str(director.path),
                    "NOTIFY_SOCKET": str(folder / "notify"),
                    **(environ or {}),
                },
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            yield Pod(plane, await director.worker(), process, said, stopping)
        finally:
            notify.close()
            with suppress(ProcessLookupError):  # the SDK's heartbeat outlives a worker that was killed
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose path is short enough for sockets."""
    return tmp_path_factory.mktemp("p")


# --- what a job is answered with ----------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        PLAIN,
        {"openai_route": "chat/completions", "openai_input": ASK},
        {"route": "/v1/chat/completions", "body": ASK, "method": "POST"},
        {"messages": ASK["messages"], "sampling_params": {"max_tokens": 3}},
    ],
    ids=["openai", "without v1", "route", "shorthand"],
)
async def test_a_plain_answer_is_the_object(given: dict[str, Any], folder: Path) -> None:
    """In every shape of input; over job-stream once, and in the result."""
    body = {"id": "chatcmpl-1", "choices": [{"text": "é😀"}], "error": None}
    async with pod(folder, {CHAT: answer(body)}) as on:
        (job,) = await on.plane.submit(given)
        assert await job.result() == {"output": [body]}
        assert job.streamed == [body]


async def test_a_get_has_no_input(folder: Path) -> None:
    """As RunPod's URL makes the job for the list of models."""
    async with pod(folder, {"GET /v1/models": answer({"object": "list", "data": []})}) as on:
        (job,) = await on.plane.submit({"openai_route": "/v1/models"})
        assert await job.result() == {"output": [{"object": "list", "data": []}]}


async def test_a_stream_is_whole_frames_the_first_at_once(folder: Path) -> None:
    """What comes while a chunk is posted goes out together with the next; no character is cut."""
    frames: list[Pause | str] = ["1", Pause("first"), *(f"{n} 😀" for n in range(50)), Pause("rest"), "end"]
    async with pod(folder, {CHAT: stream(*frames)}) as on:
        plane = on.plane
        plane.let_post.clear()
        (job,) = await plane.submit(STREAM)
        await plane.posting.wait()  # the first frame alone is on its way
        on.worker.open("first")
        await on.worker.saw("paused", "rest")
        plane.let_post.set()
        on.worker.open("rest")
        result = await job.result()
        assert job.streamed[0] == "data: 1\n\n"
        assert job.streamed[1].startswith("".join(f"data: {n} 😀\n\n" for n in range(50)))
        assert len(job.streamed) <= 3
        assert all(chunk.endswith("\n\n") for chunk in job.streamed)
        assert "".join(job.streamed).endswith(f"data: end\n\n{DONE}")
        assert result == {"output": job.streamed}


def faults(status: int) -> Script:
    """An error of vLLM's."""
    error = {"message": "no `é`", "type": "NotFoundError", "param": "model", "code": status}
    return answer({"error": error}, status)


async def test_a_requests_own_fault_completes_the_job_with_the_object(folder: Path) -> None:
    """With the status, which RunPod's path has no other place for; in a stream as its one frame."""
    told = {
        "message": "no `é`",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
        "status": 404,
    }
    async with pod(folder, {CHAT: [faults(404), faults(404)]}) as on:
        (plain,) = await on.plane.submit(PLAIN)
        assert await plain.result() == {"output": [{"error": told}]}
        (streamed,) = await on.plane.submit(STREAM)
        (frame,) = (await streamed.result())["output"]
    assert frame.startswith('data: {"error"')
    assert frame.endswith("\n\n")
    assert json.loads(frame.removeprefix("data: ")) == {"error": told}


async def test_the_workers_fault_fails_the_job_with_the_object_as_json(folder: Path) -> None:
    """And says when to come again. A stream tells its client first."""
    busy = answer({"error": {"message": "busy", "code": 503}}, 503, (("retry-after", "7"),))
    async with pod(folder, {CHAT: [busy, busy]}) as on:
        (plain,) = await on.plane.submit(PLAIN)
        result = await plain.result()
        assert set(result) == {"error"}
        told = json.loads(result["error"])
        assert (told["message"], told["status"], told["retry_after"]) == ("busy", 503, 7)
        (streamed,) = await on.plane.submit(STREAM)
        assert json.loads((await streamed.result())["error"]) == told
        assert streamed.streamed == [f"data: {json.dumps({'error': told}, separators=(',', ':'))}\n\n"]


async def test_a_stream_that_breaks_ends_with_an_error_frame(folder: Path) -> None:
    """The job has failed, whoever found the fault: the application by raising, vLLM by a frame."""
    error = 'data: {"error": {"message": "m", "type": "InternalServerError", "code": 500}}\n\n'
    told = Script((Say("data: 1\n\n"), Pause("tell"), Say(error), Say(DONE)), 200, EVENT_STREAM)
    async with pod(folder, {CHAT: [stream("1", Pause("raise"), Fail()), told]}) as on:
        for gate in ("raise", "tell"):
            (job,) = await on.plane.submit(STREAM)
            await job.said(1)
            on.worker.open(gate)
            result = await job.result()
            assert json.loads(result["error"])["type"] == "server_error"
            first, last = job.streamed
            assert first == "data: 1\n\n"
            assert last.startswith('data: {"error":{"message":')
            assert "[DONE]" not in last


@pytest.mark.parametrize(
    ("given", "code", "status"),
    [
        ({"task": 1}, "unknown_event", 400),
        (None, "unknown_event", 400),
        ({"openai_route": 7}, "unknown_event", 400),
        ({"route": "/invocations", "body": {}}, "unknown_url", 404),
        ({"route": "@169.254.169.254/latest", "method": "GET"}, "unknown_url", 404),
        ({"route": "/v1/../metrics", "method": "GET"}, "unknown_url", 404),
        ({"route": "/v1/chat/completions", "method": "DELETE"}, "method_not_allowed", 405),
    ],
)
async def test_what_is_no_request_of_ours_is_refused(
    given: Any, code: str, status: int, folder: Path
) -> None:
    """In OpenAI's shape, and vLLM is never asked."""
    async with pod(folder, {}) as on:
        (job,) = await on.plane.submit(given)
        (output,) = (await job.result())["output"]
        assert (output["error"]["code"], output["error"]["status"]) == (code, status)
        if code == "unknown_event":
            assert "openai_route" in output["error"]["message"]


async def test_half_a_character_does_not_lose_the_job(folder: Path) -> None:
    """JSON can name one, UTF-8 can't hold it, and the SDK drops a result that it can't send."""
    broken = Script((Say('{"text": "a\\ud800b"}'),))
    async with pod(folder, {CHAT: broken}) as on:
        (job,) = await on.plane.submit(PLAIN)
        assert await job.result() == {"output": [{"text": "a?b"}]}


# --- stopping one job ---------------------------------------------------------------------------


async def test_a_stop_while_it_generates_ends_the_engines_work(folder: Path) -> None:
    """At once, streamed or not, and nothing more is said of the job."""
    held = Script((Pause("never"),))
    async with pod(folder, {CHAT: [held, stream("1", Pause("never"))]}) as on:
        for number, given in enumerate((PLAIN, STREAM), 1):
            (job,) = await on.plane.submit(given)
            await on.worker.saw("paused", "never", number)
            await on.plane.cancel(job)
            await on.worker.saw("disconnected", CHAT, number)
            assert job.done == []


async def test_a_stop_while_a_chunk_is_posted_ends_the_engines_work(folder: Path) -> None:
    """Then nobody closes the generator: it hangs at its yield until it is collected."""
    async with pod(folder, {CHAT: [stream("1", Pause("never")), answer({"ok": 1})]}) as on:
        on.plane.let_post.clear()
        (job,) = await on.plane.submit(STREAM)
        await on.plane.posting.wait()
        await on.plane.cancel(job)
        await on.worker.saw("disconnected", CHAT)
        on.plane.let_post.set()
        (after,) = await on.plane.submit(PLAIN)
        assert await after.result() == {"output": [{"ok": 1}]}
        assert job.done == []


# --- how many at once ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "most"), [({"CAPACITY": "6"}, 6), ({"CAPACITY": "6", "MAX_CONCURRENCY": "2"}, 2)]
)
async def test_as_many_jobs_are_taken_as_the_engine_holds(
    environ: dict[str, str], most: int, folder: Path
) -> None:
    """Or as the setting says; a job that was just taken counts once."""
    held = answer({"ok": 1})
    waiting = Script((Pause("go"), *held.steps))
    async with pod(folder, {CHAT: [waiting] * (most - 1)}, environ) as on:
        given = await on.plane.submit(*[PLAIN] * (most - 1))
        await on.worker.saw("paused", "go", most - 1)
        await on.plane.polled(2)
        on.worker.open("go")
        for job in given:
            assert await job.result() == {"output": [{"ok": 1}]}
        assert await asyncio.wait_for(_released(on), 60) == [(most, most - 1), (1, 0)]


async def _released(on: Pod) -> list[tuple[int, int]]:
    on.process.send_signal(signal.SIGTERM)
    assert await on.exit_code() == 0
    return on.plane.takes


# --- the end ------------------------------------------------------------------------------------


async def test_a_job_that_comes_after_sigterm_is_served(folder: Path) -> None:
    """The request for jobs that was outstanding brings it; by itself the SDK would lose it."""
    async with pod(folder, {CHAT: [stream("1", Pause("go"), "2"), answer({"late": True})]}) as on:
        (early,) = await on.plane.submit(STREAM)
        await early.said(1)
        await on.plane.polled(2)
        on.process.send_signal(signal.SIGTERM)
        await on.stopping.wait()
        (late,) = await on.plane.submit(PLAIN)
        assert await late.result() == {"output": [{"late": True}]}
        on.worker.open("go")
        assert (await early.result())["output"][-1] == f"data: 2\n\n{DONE}"
        assert await on.exit_code() == 0
        assert on.plane.polls == 2


async def test_sigterm_under_load_loses_nothing_that_was_taken(folder: Path) -> None:
    """Every second job is a stream; what was not taken stays in the platform's line."""
    whole, streamed = answer({"ok": 1}), stream("1", "2")
    scripts = {CHAT: whole, "POST /v1/completions": streamed}
    text = {"openai_route": "/v1/completions", "openai_input": {"prompt": "Hi", "stream": True}}
    async with pod(folder, scripts, repeat=True) as on:
        given = await on.plane.submit(*[PLAIN, text] * 500)
        await given[100].result()
        on.process.send_signal(signal.SIGTERM)
        assert await on.process.wait() == 0
        taken = sum(count for _, count in on.plane.takes)
    assert 100 < taken < len(given)
    assert [job.done for job in given[:taken:2] if job.done != [{"output": [{"ok": 1}]}]] == []
    for job in given[1:taken:2]:
        (result,) = job.done
        assert "".join(result["output"]) == f"data: 1\n\ndata: 2\n\n{DONE}"
    assert all(job.done == [] and job.streamed == [] for job in given[taken:])


async def test_the_drains_deadline_ends_what_is_left_with_an_error(folder: Path) -> None:
    """Whole or streamed, and the exit code is that of a drain."""
    scripts = {CHAT: [stream("1", Pause("never")), Script((Pause("never"),))]}
    async with pod(folder, scripts, {"DRAIN_TIMEOUT_S": "0.5"}) as on:
        (streamed,) = await on.plane.submit(STREAM)
        await streamed.said(1)
        (plain,) = await on.plane.submit(PLAIN)
        await on.worker.saw("paused", "never", 2)
        on.process.send_signal(signal.SIGTERM)
        for job in (streamed, plain):
            assert json.loads((await job.result())["error"])["code"] == "worker_stopping"
        assert streamed.streamed[-1].startswith('data: {"error":')
        assert await on.exit_code() == 0


async def test_a_dead_engine_fails_its_jobs_and_the_worker(folder: Path) -> None:
    """With 70, so that the platform replaces it; its outstanding request for jobs is given up."""
    dead = answer({"error": {"message": "m", "code": 500}}, 500)
    async with pod(folder, {CHAT: [Script((Pause("go"), *dead.steps), 500)]}) as on:
        (job,) = await on.plane.submit(PLAIN)
        await on.worker.saw("paused", "go")
        await on.plane.polled(2)
        on.worker.order(die=True)
        on.worker.open("go")
        assert json.loads((await job.result())["error"])["code"] == "engine_dead"
        assert await on.process.wait() == 70
        (late,) = await on.plane.submit(PLAIN)
        assert (late.streamed, late.done, on.plane.polls) == ([], [], 2)


async def test_a_killed_worker_leaves_no_job_half_said(folder: Path) -> None:
    """What it had posted, it had posted whole; and the SDK's heartbeat does not go on without it."""
    async with pod(folder, {CHAT: stream("1", Pause("go"), Crash())}) as on:
        (job,) = await on.plane.submit(STREAM)
        await job.said(1)
        (heartbeat,) = tree(on.process.pid)[1:]
        ended, gone = os.pidfd_open(heartbeat), asyncio.Event()
        asyncio.get_running_loop().add_reader(ended, gone.set)
        on.worker.open("go")
        assert await on.process.wait() == -signal.SIGKILL
        assert (job.streamed, job.done) == (["data: 1\n\n"], [])
        await gone.wait()
        asyncio.get_running_loop().remove_reader(ended)
        os.close(ended)


# --- what the platform's log gets ---------------------------------------------------------------


@pytest.mark.parametrize("level", ["DEBUG", "WARNING"])
async def test_no_prompt_and_no_answer_reaches_the_log(level: str, folder: Path) -> None:
    """By default the SDK prints both, twice."""
    secret = {**ASK, "messages": [{"role": "user", "content": "the-prompt"}], "stream": True}
    environ = {"LOG_LEVEL": level, "RUNPOD_LOG_LEVEL": "DEBUG", "RUNPOD_DEBUG_LEVEL": "DEBUG"}
    async with pod(folder, {CHAT: stream("the-answer")}, environ) as on:
        (job,) = await on.plane.submit({"openai_route": "/v1/chat/completions", "openai_input": secret})
        await job.result()
        on.process.send_signal(signal.SIGTERM)
        assert await on.exit_code() == 0
    said = on.said.read_text()
    assert "Starting Serverless Worker" in said
    assert not [word for word in ("the-prompt", "the-answer", "secret-of-the-plane") if word in said]
