"""What is used of RunPod's SDK beyond `start`, and what of its behaviour is relied on.

Red after an upgrade? Each test says what was expected; handler/platforms/runpod.py says what for.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from handler import jobs
from handler.platforms import runpod as platform
from scripts.install import RUNPOD

TAKE = "http://127.0.0.1:9/v2/test/job-take/$ID?gpu=none"


@pytest.fixture(scope="module")
def sdk() -> Iterator[Any]:
    """The SDK, imported as the worker does it."""
    before = {name: os.environ.get(name) for name in ("RUNPOD_LOG_LEVEL", *platform.CHECKS_OFF)}
    theirs = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    hook = sys.excepthook
    yield platform.import_sdk("ERROR", os.environ)
    sys.excepthook = hook
    for signum, handler in theirs.items():
        signal.signal(signum, handler)
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def part(name: str) -> Any:
    """A module of the SDK."""
    return importlib.import_module(f"runpod.serverless.modules.{name}")


def test_the_version_is_the_one_that_is_installed_and_tested(sdk: Any) -> None:
    """Three places name it."""
    assert f"runpod=={platform.TESTED}" == RUNPOD
    assert sdk.__version__ == platform.TESTED


def test_its_log_level_is_set_before_it_logs(sdk: Any) -> None:
    """It reads the variable once, as its class is made."""
    assert part("rp_logger").RunPodLogger.level == "ERROR"


def test_the_loop_takes_the_scaler_from_the_handler_of_sigterm(sdk: Any) -> None:
    """A job that was just taken is in the queue and in progress: counted twice, and then once."""

    async def counted() -> tuple[int, int]:
        scaler = part("rp_scale").JobScaler({"handler": None})
        scaler.jobs_queue = asyncio.Queue()
        await scaler.jobs_queue.put({"id": "a", "input": {}})
        scaler.job_progress.add({"id": "a", "input": {}})
        before = scaler.current_occupancy()
        platform.Intake(8, 1.0)._mend(scaler.handle_shutdown)
        after = scaler.current_occupancy()
        scaler.job_progress.clear()
        return before, after

    assert asyncio.run(counted()) == (2, 1)


def test_a_full_worker_waits_for_the_end_of_a_job(sdk: Any) -> None:
    """And not for a second: the scaler always asks its fetcher, which asks the platform for the room."""

    async def fetched() -> tuple[int, Any, list[int]]:
        scaler = part("rp_scale").JobScaler({"handler": None})
        asked: list[int] = []

        async def get_job(_: Any, number: int) -> list[Any]:
            asked.append(number)
            return []

        scaler.jobs_fetcher = get_job
        intake = platform.Intake(2, 1.0)
        intake._mend(scaler.handle_shutdown)
        for job_id in ("a", "b"):
            scaler.job_progress.add({"id": job_id, "input": {}})
        needed = 2 - scaler.current_occupancy()
        waiting = asyncio.ensure_future(scaler.jobs_fetcher(None, needed))
        await asyncio.sleep(0)
        scaler.job_progress.remove({"id": "a", "input": {}})
        intake.job_ended()
        none = await waiting
        await scaler.jobs_fetcher(None, 1)
        scaler.job_progress.clear()
        return needed, none, asked

    assert asyncio.run(fetched()) == (1, None, [1])
    source = inspect.getsource(part("rp_scale").JobScaler.start)
    assert "signal.signal(signal.SIGTERM, self.handle_shutdown)" in source


def test_it_asks_how_many_before_each_request_for_jobs(sdk: Any) -> None:
    """So the drain knows by that call that no request is outstanding; 0 held means none is asked for."""
    source = inspect.getsource(part("rp_scale").JobScaler.get_jobs)
    asks, needs, takes = (
        source.index(text) for text in ("self.set_scale()", "jobs_needed =", "self.jobs_fetcher(session")
    )
    assert asks < needs < takes
    assert "jobs_needed <= 0" in source


def test_a_worker_needs_no_fastapi(sdk: Any) -> None:
    """Whose version the SDK and vLLM do not agree on: only the SDK's local server imports it."""
    program = "import runpod.serverless, sys; print('fastapi' in sys.modules)"
    environ = {**os.environ, "RUNPOD_WEBHOOK_GET_JOB": TAKE}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environ, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "False"


def test_the_handler_is_what_it_takes_for_a_generator(sdk: Any) -> None:
    """It asks `inspect`: a callable object or a partial would not do."""
    assert part("rp_handler").is_generator(platform.make_handler(lambda _: None))  # type: ignore[arg-type,return-value]


async def test_what_survives_of_an_error_and_what_does_not(sdk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dict's error becomes Python's spelling; the shapes of `handler.jobs` stay JSON."""
    told = {"message": "é", "type": "server_error", "param": None, "code": "c"}
    sent: list[Any] = []

    async def stream_result(_: Any, data: Any, __: Any) -> None:
        sent.append(json.loads(json.dumps(data)))

    async def send_result(_: Any, data: Any, __: Any, is_stream: bool) -> None:
        sent.append(json.loads(json.dumps(data)))

    monkeypatch.setattr(part("rp_job"), "stream_result", stream_result)
    monkeypatch.setattr(part("rp_job"), "send_result", send_result)

    async def posted(*outputs: Any) -> list[Any]:
        async def handler(_: Any) -> AsyncIterator[Any]:
            for output in outputs:
                yield output

        sent.clear()
        config = {"handler": handler, "return_aggregate_stream": True}
        await part("rp_job").handle_job(None, config, {"id": "a", "input": {}})
        return list(sent)

    assert await posted({"error": told}) == [{"error": str(told)}]
    object_, failure = {"error": {**told, "status": 404}}, {**told, "status": 500}
    assert await posted(*jobs.render_error(object_["error"], streamed=False)) == [
        {"output": object_},
        {"output": [object_]},
    ]
    (lost,) = await posted(*jobs.render_error(failure, streamed=False))
    assert json.loads(lost["error"]) == failure
    chunk, lost = await posted(*jobs.render_error(failure, streamed=True))
    assert json.loads(chunk["output"].removeprefix("data: ")) == {"error": failure}
    assert json.loads(lost["error"]) == failure
