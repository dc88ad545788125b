"""RunPod serverless: jobs in, outputs out, through RunPod's own SDK, which only this file imports.

The SDK takes jobs, posts what the handler yields and listens for stops, on a loop of its own in the
main thread. It is started through its public `start`, with a handler, a concurrency and
`return_aggregate_stream`; what is changed beyond that, while it runs, is in `Intake._mend` and
`import_sdk`. docs/runpod.md lists what it does by itself.

`python -m handler.platforms.runpod` makes the SDK's fitness checks and exits: `fit` waits for it.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import multiprocessing
import os
import platform as machine
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from handler import edge, jobs
from handler.asgi import refuse
from handler.body import asks_for_stream
from handler.bridge import across
from handler.drain import Drain
from handler.engine import Engine
from handler.errors import EngineFailed, NoResources, RequestError, StartError, StartFailed, Unfit
from handler.messages import Call
from handler.phases import Phases
from handler.settings import Settings
from handler.slots import limit
from handler.supervision import Notifier

log = logging.getLogger(__name__)

TESTED = "1.12.0"
CHECKS_OFF = ("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "RUNPOD_SKIP_GPU_CHECK")

LOOK_S = 0.02
FULL_LOOK_S = 1.0
"""How often a full worker looks for room without being told, as the SDK does by itself."""
PACE_S, FAILED_PACE_S = 0.1, 1.0
"""How often jobs are asked for at most, where that is answered at once with none, and where it fails."""
CHECKS_TIMEOUT_S = 300.0
SCALER = ("current_occupancy", "handle_job", "job_progress", "jobs_fetcher", "jobs_queue", "jobs_tasks")
"""What is used of the SDK's scaler."""
LINGER_S = 5.0
"""What the SDK gets, after the drain's deadline, to post the errors that ended what was left."""
REFUSALS = 64
"""How many jobs at once a worker takes that can only say why it did not start."""


def open(settings: Settings) -> RunPod:  # noqa: A001 - each platform has one
    """The platform; its fitness checks begin."""
    return RunPod(settings, start_checks(os.environ))


class RunPod:
    """One worker of a queue endpoint."""

    def __init__(self, settings: Settings, checks: subprocess.Popen[bytes] | None) -> None:
        self._settings = settings
        self._checks = checks
        self._sdk: Any = None

    def fit(self) -> None:
        """Wait for the fitness checks: they open the GPU, and memory that they free would confuse vLLM."""
        if self._checks is None:
            return
        try:
            code = self._checks.wait(CHECKS_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:  # a driver that hangs
            self._checks.kill()
            raise Unfit(f"RunPod's fitness checks have not ended within {CHECKS_TIMEOUT_S:g} s") from error
        if code:
            raise Unfit(f"RunPod's fitness checks failed with exit code {code}; their log is above")

    def prepare(self) -> None:
        """Import the SDK. Raises `NoResources` where it is not installed."""
        self._sdk = import_sdk(self._settings.log_level, os.environ)

    def run(self, engine: Engine, phases: Phases, notifier: Notifier) -> None:
        """Take jobs until SIGTERM, then finish those that were taken. Raises `EngineFailed`."""
        settings, drain = self._settings, Drain()
        most = settings.max_concurrency or engine.capacity()
        openai = edge.openai(engine.call, engine_is_dead=lambda: engine.is_dead)
        call = across(drain.wrap(limit(openai, most)), engine.loop)
        intake = Intake(
            most,
            settings.drain_timeout_s,
            stopping=notifier.stopping,
            expire=lambda: asyncio.wrap_future(engine.submit(drain.finish(0))),
        )
        engine.dead.add_done_callback(lambda _: intake.stop(at_once=True))
        notifier.ready(phases.report())
        log.info("ready", extra={"jobs_at_once": most})
        self._take(call, intake)
        if engine.is_dead:
            raise EngineFailed("the engine died; the jobs that it held have failed")

    def fail(self, failure: StartError, notifier: Notifier) -> None:
        """Answer every job with `failure` until SIGTERM."""
        if self._sdk is None:
            self._sdk = import_sdk(self._settings.log_level, os.environ)
        intake = Intake(REFUSALS, self._settings.drain_timeout_s, stopping=notifier.stopping)
        notifier.status(f"can't start: {failure}")
        self._take(refuse(StartFailed(failure)), intake)

    def refuse(self, failure: StartError | None) -> None:  # noqa: ARG002 - of the protocol
        """No job was taken yet: there is nobody to tell."""
        if self._checks is not None:
            self._checks.kill()

    def _take(self, call: Call, intake: Intake) -> None:
        config = {
            "handler": make_handler(call),
            "concurrency_modifier": intake.scale,
            "return_aggregate_stream": True,  # so that a chunk whose post was lost is in the result
        }
        engines = set(multiprocessing.active_children())
        try:
            with suppress(asyncio.CancelledError):  # how `Intake` ends the SDK's loop
                self._sdk.serverless.start(config)
        finally:
            for ping in set(multiprocessing.active_children()) - engines:
                ping.kill()  # it would go on for ever: this process ends without Python's own end


def make_handler(call: Call) -> Callable[[dict[str, Any]], AsyncIterator[Any]]:
    """The SDK's handler: a job's outputs, as `handler.jobs.render` has them.

    An asynchronous generator function, and no callable object: the SDK asks `inspect`. On each
    pull it yields all whole frames that are ready. The work behind it ends with the SDK's task: a
    stop may come while the SDK posts a chunk, and then nobody closes the generator.
    """
    closing: set[asyncio.Task[None]] = set()

    def end_with(task: asyncio.Task[Any], work: AsyncExitStack) -> None:
        """Close `work` when `task` has failed or was stopped: it may still be open then."""

        def close(ended: asyncio.Task[Any]) -> None:
            if ended.cancelled() or ended.exception() is not None:
                task = asyncio.ensure_future(work.aclose())
                closing.add(task)
                task.add_done_callback(closing.discard)

        task.add_done_callback(close)

    async def handler(job: dict[str, Any]) -> AsyncIterator[Any]:
        streamed = begun = False
        job_task = asyncio.current_task()
        assert job_task is not None, "the SDK runs each job in a task"
        try:
            request = jobs.parse(job["input"])
            streamed = asks_for_stream(request)
            request = replace(request, headers=(*request.headers, ("x-request-id", str(job["id"]))))
            async with AsyncExitStack() as work:
                end_with(job_task, work)
                reply = await work.enter_async_context(call(request))
                async for output in jobs.render(reply, streamed=streamed):
                    begun = streamed
                    yield output
        except RequestError as error:
            for output in jobs.render_error(jobs.error_of(error), streamed=streamed, begun=begun):
                yield output
        except Exception:  # the boundary of a job: it is answered whatever happens
            log.exception("job failed", extra={"job": job.get("id")})
            fault = RequestError("The server had an internal error.", code="internal_error")
            for output in jobs.render_error(jobs.error_of(fault), streamed=streamed, begun=begun):
                yield output

    return handler


class Intake:
    """When the SDK takes jobs, and how it ends.

    By itself the SDK loses a job that its outstanding request brings after SIGTERM. So SIGTERM is
    heard here: no new request is made, what the outstanding one brings is served like any other
    job, and the SDK's loop is ended once all are answered. After `drain_timeout_s` `expire` ends
    what is left with an error.

    Its scaler waits where there is nothing to wait for: a job that it has taken is begun at the next
    tenth of a second, is counted twice until then, so that after half its concurrency it takes none
    for a second, and can't be stopped; and once it is full it looks again only each second. `_mend`
    has this one scaler begin its jobs as they come.
    """

    def __init__(
        self,
        most: int,
        drain_timeout_s: float,
        *,
        stopping: Callable[[], None] = lambda: None,
        expire: Callable[[], Any] | None = None,
    ) -> None:
        self._most = most
        self._drain_timeout_s = drain_timeout_s
        self._tell_stopping = stopping
        self._expire = expire
        self._loop: asyncio.AbstractEventLoop | None = None
        self._taking: asyncio.Task[Any] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._stopped = False
        self._at_once = False
        self._room = asyncio.Event()
        self._answered = False
        """Whether the request for jobs that was outstanding when the stop came has been answered."""

    def scale(self, _: int) -> int:
        """The SDK's `concurrency_modifier`, which it calls each time before it asks for jobs.

        A constant: at any other value the SDK takes nothing until it holds nothing. Once stopped
        it is what is held, so that nothing is asked for and all that was taken is begun.
        """
        if self._loop is None:
            self._begin()
        if not self._stopped:
            return self._most
        self._answered = True
        return held()

    def _begin(self) -> None:
        """The SDK's first call: it has installed its signal handlers and runs its loop."""
        self._loop = asyncio.get_running_loop()
        self._taking = asyncio.current_task()
        self._mend(signal.getsignal(signal.SIGTERM))
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda *_: self.stop())
        if self._stopped:
            self._end()

    def _mend(self, shutdown: Any) -> None:
        """Change how the scaler takes jobs; `shutdown` is its own handler of SIGTERM."""
        scaler: Any = getattr(shutdown, "__self__", None)
        if not all(hasattr(scaler, name) for name in SCALER):
            log.warning("RunPod's SDK has no scaler where 1.12 has it: jobs may wait for a second")
            return
        fetch = scaler.jobs_fetcher

        async def take(session: Any, _: int) -> None:
            """Begin what there is room for; if there is none, return once there is."""
            if (room := self._most - held()) <= 0:
                self._room.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._room.wait(), FULL_LOOK_S)
                return
            asked_s, pace_s = time.monotonic(), FAILED_PACE_S
            try:
                taken = await fetch(session, room) or ()
                pace_s = 0.0 if taken else PACE_S
                for job in taken:
                    self._start(scaler, session, job)
            finally:  # the SDK knows no pause, whatever it is answered
                await asyncio.sleep(max(0.0, asked_s + pace_s - time.monotonic()))

        # Never full, or the scaler would wait by itself.
        scaler.current_occupancy = lambda: held() if self._stopped else min(held(), self._most - 1)
        scaler.jobs_fetcher = take

    def _start(self, scaler: Any, session: Any, job: Any) -> None:
        """What the scaler's `run_jobs` does with a job of its queue, at once."""
        if not isinstance(job, dict) or not {"id", "input"} <= job.keys():
            log.error("the platform has sent something that is no job")  # which would end the SDK
            return
        if job["id"] in scaler.jobs_tasks:
            log.error("the platform has sent a job twice", extra={"job": job["id"]})
            return
        scaler.job_progress.add(job)
        scaler.jobs_queue.put_nowait(job)
        scaler.jobs_queue.get_nowait()  # `handle_job` reports to the queue
        task = asyncio.ensure_future(scaler.handle_job(session, job))
        scaler.jobs_tasks[job["id"]] = task
        task.add_done_callback(partial(self._job_ended, scaler, job))

    def _job_ended(self, scaler: Any, job: Any, task: asyncio.Task[Any]) -> None:
        # Once more: a job that was stopped before its first step has not done it itself.
        scaler.job_progress.remove(job)
        scaler.jobs_tasks.pop(job["id"], None)
        self._room.set()
        if not task.cancelled() and (error := task.exception()):
            log.error("the SDK could not report a job", exc_info=error)

    def stop(self, *, at_once: bool = False) -> None:
        """Take no more; any thread may say so, and a signal handler.

        `at_once`: what the outstanding request would bring is not waited for, because nothing
        could be done with it.
        """
        self._at_once |= at_once
        if not self._stopped:
            self._stopped = True
            if self._loop is not None:
                with suppress(RuntimeError):  # it has ended
                    self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self._ending is not None:
            return
        self._room.set()
        self._tell_stopping()
        self._ending = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        assert self._taking is not None, "the SDK has begun"
        loop = asyncio.get_running_loop()
        log.info("draining", extra={"jobs": held()})
        try:
            if not await self._idle(loop.time() + self._drain_timeout_s):
                log.warning("the drain's deadline has passed", extra={"jobs": held()})
                self._at_once = True
                if self._expire is not None:
                    await asyncio.wait_for(self._expire(), LINGER_S)
                await self._idle(loop.time() + LINGER_S)
        except (TimeoutError, RuntimeError):  # the engine's loop hangs, or has ended
            log.exception("what was left could not be ended", extra={"jobs": held()})
        finally:
            self._taking.cancel()

    async def _idle(self, deadline_s: float) -> bool:
        """Whether by the deadline nothing is held and nothing can come."""
        loop = asyncio.get_running_loop()
        while held() or not (self._answered or self._at_once):
            if loop.time() >= deadline_s:
                return False
            await asyncio.sleep(LOOK_S)
        return True


def held() -> int:
    """How many jobs the SDK holds: taken, and not yet reported as done."""
    state: Any = sys.modules["runpod.serverless.modules.worker_state"]
    return int(state.JobsProgress().get_job_count())


def import_sdk(level: str, environ: MutableMapping[str, str]) -> Any:
    """RunPod's SDK, which reads its settings from the environment as it is imported."""
    # By default it logs at DEBUG, where it prints prompts and answers; at INFO it prints five lines a job.
    environ["RUNPOD_LOG_LEVEL"] = {"DEBUG": "INFO", "INFO": "WARN", "WARNING": "WARN"}.get(level, "ERROR")
    if environ.pop("RUNPOD_REALTIME_PORT", None):
        log.warning("RUNPOD_REALTIME_PORT does nothing here: it would serve every route without a key")
    environ.update(dict.fromkeys(CHECKS_OFF, "true"))  # they were made, see `fit`
    try:
        # It asks for the name of the processor, to which py-cpuinfo forks a process that computes
        # for a second: not beside a thread that imports.
        cpuinfo: Any = importlib.import_module("cpuinfo")
        ask, cpuinfo.get_cpu_info = cpuinfo.get_cpu_info, lambda: {"brand_raw": machine.processor()}
        try:
            sdk: Any = importlib.import_module("runpod")
        finally:
            cpuinfo.get_cpu_info = ask
    except ModuleNotFoundError as error:
        raise NoResources(
            f"RunPod's SDK is not installed ({error.name} is missing): pip install 'firsttoken[runpod]' and "
            f"pip install --no-deps runpod=={TESTED}"
        ) from error
    # A key in ~/.runpod/config.toml would win over RUNPOD_AI_API_KEY for jobs, and not for pings.
    credentials: Any = importlib.import_module("runpod.cli.groups.config.functions")
    credentials.CREDENTIAL_FILE = os.devnull
    if sdk.__version__ != TESTED:
        log.warning("this version of RunPod's SDK is not tested", extra={"found": sdk.__version__})
    return sdk


def start_checks(environ: MutableMapping[str, str]) -> subprocess.Popen[bytes] | None:
    """Begin the SDK's fitness checks in a process of their own; None where they are switched off.

    They open the GPU, after which this process could fork no engine. A check that fails is
    reported to the platform by the SDK.
    """
    if all(environ.get(name, "").strip().lower() == "true" for name in CHECKS_OFF):
        return None
    return subprocess.Popen([sys.executable, "-m", "handler.platforms.runpod"], stdin=subprocess.DEVNULL)


def check_fitness() -> None:
    """Make the SDK's fitness checks; one that fails ends this process."""
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")
    fitness: Any = importlib.import_module("runpod.serverless.modules.rp_fitness")
    asyncio.run(fitness.run_fitness_checks())


if __name__ == "__main__":
    check_fitness()
