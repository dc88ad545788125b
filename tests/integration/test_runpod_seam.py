"""What is used of RunPod's SDK beyond `start`, and what of its behaviour is relied on.

Red after an upgrade? Each test says what was expected; handler/platforms/{runpod,intake}.py say what for.
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
from contextlib import suppress
from typing import Any

import pytest

from handler import jobs
from handler.platforms import intake
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


class Scaler:
    """The SDK's own scaler with our hand in it, and a platform that answers what it is told to."""

    def __init__(self, most: int, *answers: list[Any] | Exception | None) -> None:
        self.scaler = part("rp_scale").JobScaler({"handler": platform.make_handler(self.call)})
        self.asked: list[int] = []
        self.begun: list[str] = []
        self._answers = list(answers)
        self.scaler.jobs_queue = asyncio.Queue(maxsize=most)
        self.scaler.jobs_fetcher = self._fetch
        self.scaler.jobs_handler = self._handle
        self.go_on = asyncio.Event()
        self.intake = intake.Intake(most, 1.0)
        self.intake._mend(self.scaler.handle_shutdown)

    def call(self, _: Any) -> Any:
        """No request gets this far."""
        raise AssertionError

    async def _fetch(self, _: Any, number: int) -> list[Any] | None:
        self.asked.append(number)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _handle(self, _: Any, __: Any, job: Any) -> None:
        self.begun.append(job["id"])
        await self.go_on.wait()

    async def take(self) -> Any:
        """As the scaler's loop does it."""
        return await self.scaler.jobs_fetcher(None, 1)


def job(name: str) -> dict[str, Any]:
    """A job."""
    return {"id": name, "input": {}}


async def test_a_job_begins_as_it_comes(sdk: Any) -> None:
    """Not at the next tenth of a second; it is counted once, and can be stopped at once."""
    on = Scaler(8, [job("a"), job("b")])
    assert await on.take() is None
    await asyncio.sleep(0)
    assert on.begun == ["a", "b"]
    assert on.scaler.current_occupancy() == intake.held() == 2
    assert await on.scaler.stop_job("a")
    await asyncio.sleep(0)
    assert intake.held() == 1
    on.go_on.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert intake.held() == 0


async def test_a_full_worker_waits_for_the_end_of_a_job(sdk: Any) -> None:
    """And not for a second; then it asks for the room that there is."""
    on = Scaler(2, [job("a"), job("b")], [job("c")])
    await on.take()
    assert on.scaler.current_occupancy() == 1, "the scaler believes that there is room"
    waiting = asyncio.ensure_future(on.take())
    await asyncio.sleep(0)
    await on.scaler.stop_job("b")
    await waiting
    assert on.asked == [2]
    await on.take()
    assert on.asked == [2, 1]
    on.go_on.set()
    for _ in range(3):
        await asyncio.sleep(0)
    assert intake.held() == 0


async def test_what_is_no_job_does_not_end_the_worker(sdk: Any, caplog: pytest.LogCaptureFixture) -> None:
    """By itself the SDK dies of it, with all that it holds."""
    on = Scaler(8, [{"input": {}}, "a", {"id": 7, "input": {}}, {"id": ["a"], "input": {}}, job("b")])
    on.go_on.set()
    await on.take()
    await asyncio.sleep(0)
    assert on.begun == ["b"]
    assert [record.message for record in caplog.records] == [
        "the platform has sent something that is no job"
    ] * 4


async def test_a_stop_before_the_first_step_leaves_nothing_held(sdk: Any) -> None:
    """Then the SDK's own end of a job is never reached."""
    on = Scaler(8)
    on.intake._start(on.scaler, None, job("a"))
    (begun,) = on.scaler.jobs_tasks.values()
    begun.cancel()
    await asyncio.wait({begun})
    await asyncio.sleep(0)
    assert (on.begun, intake.held(), on.scaler.jobs_tasks) == ([], 0, {})


async def test_a_job_that_comes_twice_is_begun_once(sdk: Any) -> None:
    """Else the end of one would be taken for the end of both."""
    on = Scaler(8, [job("a"), job("a")])
    await on.take()
    await asyncio.sleep(0)
    assert on.begun == ["a"]
    on.go_on.set()
    for _ in range(3):
        await asyncio.sleep(0)
    assert intake.held() == 0


@pytest.mark.parametrize("answer", [None, [], RuntimeError("500")])
async def test_the_platform_is_not_asked_without_a_pause(
    answer: Any, sdk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it answers at once; by itself the SDK asks 2,000 times a second."""
    monkeypatch.setattr(intake, "PACE_S", 0.05)
    monkeypatch.setattr(intake, "FAILED_PACE_S", 0.05)
    on = Scaler(8, answer)
    begun_s = asyncio.get_running_loop().time()
    with suppress(RuntimeError):
        await on.take()
    assert asyncio.get_running_loop().time() - begun_s >= 0.05


@pytest.mark.parametrize("expire", ["hangs", "raises"])
async def test_a_drain_ends_whatever_the_engine_does(
    expire: str, sdk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loop may be stuck in a device, or have ended."""
    monkeypatch.setattr(intake, "LINGER_S", 0.05)

    def failing() -> Any:
        if expire == "raises":
            raise RuntimeError("Event loop is closed")
        return asyncio.get_running_loop().create_future()

    on = Scaler(8, [job("a")])
    await on.take()
    ending = intake.Intake(8, 0.0, expire=failing)
    ending._taking = asyncio.ensure_future(asyncio.Event().wait())
    ending._end()
    await asyncio.wait({ending._taking}, timeout=60)
    assert ending._taking.cancelled()
    on.go_on.set()
    for _ in range(3):
        await asyncio.sleep(0)


def test_the_loop_takes_the_scaler_from_the_handler_of_sigterm(sdk: Any) -> None:
    """There it is what runs."""
    scaler = part("rp_scale").JobScaler
    assert "signal.signal(signal.SIGTERM, self.handle_shutdown)" in inspect.getsource(scaler.start)
    assert all(hasattr(scaler({"handler": None}), name) for name in intake.SCALER)


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
