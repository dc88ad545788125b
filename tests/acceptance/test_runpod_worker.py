"""`python -m handler` as RunPod starts it: the real SDK, the real engine, and starts that fail."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from handler import sse
from tests.runpod_plane import Plane
from tests.servers import MAX_MODEL_LEN, MODEL, engine_environ, worker_process

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0}


@asynccontextmanager
async def worker(
    plane: Plane, model: Path, folder: Path, environ: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The worker's process, and what it says in `folder`; nothing but RunPod's names tells it where it is."""
    given = {
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        **engine_environ(model),
        **plane.environ(),
        **(environ or {}),
    }
    async with worker_process(given, folder / "said") as process:
        yield process


async def drained(plane: Plane, process: asyncio.subprocess.Process) -> int:
    """The exit code after SIGTERM."""
    process.send_signal(signal.SIGTERM)
    await plane.release()
    return await process.wait()


@pytest.mark.parametrize("mode", ["thread", "fork"])
async def test_a_worker_of_the_platform(mode: str, tiny_model: Path, tmp_path: Path) -> None:
    """Jobs wait until a token was made; then chat, stream and models are what they are elsewhere."""
    async with Plane().open() as plane:
        chat = {"openai_route": "/v1/chat/completions", "openai_input": ASK}
        streamed = {**chat, "openai_input": {**ASK, "stream": True}}
        jobs = await plane.submit(chat, streamed, {"openai_route": "/v1/models"}, {"prompt": "Hello"})
        environ = {"MAX_NUM_SEQS": "48", "ENGINE_MODE": mode}
        async with worker(plane, tiny_model, tmp_path, environ) as process:
            whole, stream, models, native = [await job.result() for job in jobs]
            assert await drained(plane, process) == 0
        assert plane.takes[0] == (48, 4)
        (answer,) = whole["output"]
        said = answer["choices"][0]["message"]["content"]
        assert (answer["object"], answer["usage"]["completion_tokens"]) == ("chat.completion", 6)
        *chunks, last = sse.split("".join(stream["output"]).encode())
        assert last == sse.DONE
        assert (
            "".join(sse.data(chunk)["choices"][0]["delta"].get("content") or "" for chunk in chunks) == said
        )
        assert [model["id"] for model in models["output"][0]["data"]] == [MODEL]
        assert native["output"][0]["object"] == "text_completion"
        assert plane.pings, "the SDK's heartbeat"
    log = (tmp_path / "said").read_text()
    assert "cold start {" in log
    assert "Traceback" not in log
    assert "leaked" not in log, "an engine core was not ended by vLLM"


async def test_a_stopped_job_stops_in_the_engine(tiny_model: Path, tmp_path: Path) -> None:
    """The next job, for which there was no room, begins; of the stopped one nothing more is said."""
    long = {**ASK, "max_tokens": MAX_MODEL_LEN - 64, "ignore_eos": True, "temperature": 1, "n": 2}
    chat = {"openai_route": "/v1/chat/completions"}
    async with (
        Plane().open() as plane,
        worker(plane, tiny_model, tmp_path, {"MAX_CONCURRENCY": "1"}) as process,
    ):
        for stream in (True, False):
            stopped, after = await plane.submit(
                {**chat, "openai_input": {**long, "stream": stream}}, {**chat, "openai_input": ASK}
            )
            await plane.taken(stopped)
            if stream:
                await stopped.said(1)
            await plane.cancel(stopped)
            assert (await after.result())["output"][0]["object"] == "chat.completion"
            assert stopped.done == []
        assert await drained(plane, process) == 0


async def test_a_worker_that_can_not_start_says_so_to_every_job(tmp_path: Path) -> None:
    """It stays, so that the platform does not start and bill it again and again."""
    async with Plane().open() as plane, worker(plane, tmp_path / "nothing-here", tmp_path) as process:
        jobs = await plane.submit(
            {"prompt": "Hi"}, {"openai_route": "chat/completions", "openai_input": {**ASK, "stream": True}}
        )
        for job in jobs:
            told = json.loads((await job.result())["error"])
            assert (told["code"], told["status"], told["type"]) == (
                "worker_start_failed",
                503,
                "server_error",
            )
            assert told["message"].startswith("The worker could not start: ")
            assert "nothing-here" in told["message"]
        assert json.loads(jobs[1].streamed[0].removeprefix("data: "))["error"] == told
        assert await drained(plane, process) == 0


async def test_wrong_settings_are_told_to_every_job(tiny_model: Path, tmp_path: Path) -> None:
    """All of them, ours and vLLM's; the default stands in for a wrong one that is needed to say so."""
    environ = {"MAX_MODEL_LENGTH": "12", "DRAIN_TIMEOUT_S": "soon"}
    async with Plane().open() as plane, worker(plane, tiny_model, tmp_path, environ) as process:
        (job,) = await plane.submit({"prompt": "Hi"})
        message = json.loads((await job.result())["error"])["message"]
        assert "DRAIN_TIMEOUT_S='soon' is not allowed" in message
        assert "MAX_MODEL_LENGTH is not a flag of vLLM; the nearest is MAX_MODEL_LEN" in message
        assert await drained(plane, process) == 0


async def test_a_failed_start_may_end_the_worker(tmp_path: Path) -> None:
    """As on every other platform, if that is asked for: no job is taken."""
    async with Plane().open() as plane:
        environ = {"START_FAILURE": "exit"}
        async with worker(plane, tmp_path / "nothing-here", tmp_path, environ) as process:
            assert await process.wait() == 66
        assert plane.polls == 0


async def test_a_machine_that_fails_the_platforms_checks_is_left(tiny_model: Path, tmp_path: Path) -> None:
    """The SDK reports it, no device was opened and no job taken; another machine may do better."""
    environ = {
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "",
        "RUNPOD_SKIP_GPU_CHECK": "",
        "RUNPOD_MIN_MEMORY_GB": "1000000",
    }
    async with Plane().open() as plane:
        async with worker(plane, tiny_model, tmp_path, environ) as process:
            assert await process.wait() == 75
        (report,) = [ping for ping in plane.pings if "status" in ping]
        assert (report["status"], plane.polls) == ("unhealthy", 0)
        assert "emory" in report["reason"]
    assert "RunPod's fitness checks failed" in (tmp_path / "said").read_text()
