"""RunPod serverless: jobs in, outputs out, through RunPod's own SDK, which only this file imports.

The SDK takes jobs, posts what the handler yields and listens for stops, on a loop of its own in the
main thread. It is started through its public `start`, with a handler, a concurrency and
`return_aggregate_stream`; what is changed beyond that, while it runs, is in
`handler.platforms.intake` and in `import_sdk`. docs/runpod.md lists what it does by itself.

`python -m handler.platforms.runpod` makes the SDK's fitness checks and exits: `fit` waits for it.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import logging
import multiprocessing
import os
import platform as machine
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

from handler import edge, jobs
from handler.asgi import refuse
from handler.bridge import across
from handler.drain import Drain
from handler.engine import Engine
from handler.errors import EngineFailed, NoResources, StartError, StartFailed, Unfit
from handler.messages import Call
from handler.phases import Phases
from handler.platforms.intake import Intake
from handler.settings import Settings
from handler.supervision import Notifier

log = logging.getLogger(__name__)

TESTED = "1.12.0"
CHECKS_OFF = ("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS", "RUNPOD_SKIP_GPU_CHECK")

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h; the parent is the thread that forks, here the main one."""
CHECKS_TIMEOUT_S = 300.0
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
        call = across(drain.wrap(openai), engine.loop)
        intake = Intake(
            most,
            settings.drain_timeout_s,
            stopping=notifier.stopping,
            expire=lambda: asyncio.wrap_future(engine.submit(drain.finish(0))),
        )
        engine.dead.add_done_callback(lambda _: intake.stop(at_once=True))
        notifier.ready(phases.report(), most)
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
        os.register_at_fork(after_in_child=end_with_parent)  # the SDK forks one process, which pings
        try:
            with suppress(asyncio.CancelledError):  # how `Intake` ends the SDK's loop
                self._sdk.serverless.start(config)
        finally:
            for ping in set(multiprocessing.active_children()) - engines:
                ping.kill()  # this process ends without Python's own end, which would do it


def make_handler(call: Call) -> Callable[[dict[str, Any]], AsyncIterator[Any]]:
    """The SDK's handler: a job's outputs, as `handler.jobs.render` has them.

    An asynchronous generator function, and no callable object: the SDK asks `inspect`. On each
    pull it yields all whole frames that are ready. The work behind it ends with the SDK's task: a
    stop may come while the SDK posts a chunk, and then nobody closes the generator.
    """
    closing: set[asyncio.Task[None]] = set()

    def close(work: AsyncExitStack, _: asyncio.Task[Any]) -> None:
        task = asyncio.ensure_future(work.aclose())  # nothing is left to close, as a rule
        closing.add(task)
        task.add_done_callback(closing.discard)

    async def handler(job: dict[str, Any]) -> AsyncIterator[Any]:
        job_task = asyncio.current_task()
        assert job_task is not None, "the SDK runs each job in a task"

        def opened(work: AsyncExitStack) -> None:
            job_task.add_done_callback(partial(close, work))

        async for output in jobs.outputs(call, str(job["id"]), job["input"], opened=opened):
            yield output

    return handler


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


def end_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


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
