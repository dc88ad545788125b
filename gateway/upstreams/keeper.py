"""Keeps one worker process on this machine: started at once or when asked for, replaced when it dies.

How requests get to the worker is another matter, of those who derive from `Keeper`.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, NotRequired, Self, TypedDict

from gateway.upstreams.events import Ended, Event, Progress, Ready, StartFailed, Starting
from gateway.upstreams.launch import Launcher
from gateway.upstreams.process import PERMANENT, Exit, WorkerProcess
from handler.errors import NotAdmitted
from handler.messages import Call, Reply, Request

STATES = ("stopped", "starting", "ready", "leaving", "failed", "closed")
COLD_START_GUESS_S = 30.0
BACK_OFF_MAX_S = 60.0
KILL_GRACE_S = 1.0
"""What a worker gets beyond the drain deadline, which it keeps itself."""
SOCKET_PATH_MAX_BYTES = 100  # sun_path holds 108 with its end, and our names are short


def back_off_s(failures: int) -> float:
    """How long to wait after the `failures`th failed start in a row: 1, 2, 4, ... 60."""
    return min(BACK_OFF_MAX_S, 2.0 ** (failures - 1))


class Keep(TypedDict):
    """How a worker is kept: the keywords of `Keeper`."""

    at_once: bool
    start_timeout_s: float
    drain_timeout_s: float
    tell: NotRequired[Callable[[Event], None]]
    back_off: NotRequired[Callable[[int], float]]


class Keeper(ABC):
    """At most one worker process at a time, and what is the same for every `Upstream` that has one.

    `launcher` is given a private folder and starts the workers. Used as `async with`: entering
    starts the watch (and the worker, if `at_once`), leaving drains and ends it. `tell` hears what
    happens, on the loop.
    """

    def __init__(
        self,
        launcher: Callable[[Path], Launcher],
        environ: Mapping[str, str],
        *,
        at_once: bool,
        start_timeout_s: float,
        drain_timeout_s: float,
        tell: Callable[[Event], None] = lambda _: None,
        back_off: Callable[[int], float] = back_off_s,
    ) -> None:
        self._environ = environ
        self._at_once = at_once
        self._start_timeout_s = start_timeout_s
        self._drain_timeout_s = drain_timeout_s
        self._tell = tell
        self._back_off = back_off
        self._folder = _private_folder()
        self._launcher = launcher(self._folder)
        self._worker: WorkerProcess | None = None
        self._open = False
        self._failure: StartFailed | None = None
        self._again_at_s = 0.0
        self._started_s = 0.0
        self._cold_start_s = COLD_START_GUESS_S
        self._wanted = asyncio.Event()
        self._news = asyncio.Event()
        self._stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keeper: asyncio.Task[None] | None = None
        self.starts = 0
        self.phase: str | None = None

    async def __aenter__(self) -> Self:
        self._keeper = asyncio.create_task(self._keep())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def state(self) -> str:
        """One of `STATES`."""
        if self._stop.done():
            return "closed"
        if self._failure is not None:
            return "failed"
        if self._worker is None:
            return "stopped"
        if self._worker.left.done():
            return "leaving"
        return "ready" if self._open else "starting"

    @property
    def ready(self) -> bool:
        """Whether a request can be sent at once."""
        return self.state == "ready"

    @property
    def retry_after_s(self) -> float:
        """What is left of a cold start that takes as long as the last one."""
        if self.state != "starting":
            return self._cold_start_s
        return self._cold_start_s - (time.monotonic() - self._started_s)

    @property
    def cold_start_s(self) -> float:
        """How long the last start took; a guess while there was none."""
        return self._cold_start_s

    @property
    def refusal(self) -> NotAdmitted | None:
        """What whoever wants a worker is refused with; None while one is there or may come."""
        if self._failure is not None:
            return NotAdmitted(
                f"The worker could not start: {self._failure.reason}.",
                retry_after_s=self._again_at_s - time.monotonic(),
                code="worker_start_failed",
            )
        if self._stop.done():
            return NotAdmitted("The gateway is stopping.", retry_after_s=1)
        return None

    async def wait_ready(self) -> None:
        """Return once a worker is ready, in order of arrival; have one started if there is none.

        Raises `NotAdmitted` when the gateway is stopping, and with the code
        `worker_start_failed` and the reason while no worker can start.
        """
        while not self.ready:
            if refusal := self.refusal:
                raise refusal
            self._wanted.set()
            await self._news.wait()

    @property
    def in_line(self) -> int:
        """How many requests wait here until a worker takes them."""
        return 0

    @property
    def askable(self) -> Mapping[str, Call]:
        """The ready workers that can be asked for more than what clients want, their metrics say, by name."""
        return {}

    @abstractmethod
    def call(self, request: Request) -> AbstractAsyncContextManager[Reply]:
        """Ask the worker (a `handler.messages.Call`)."""

    @property
    def health(self) -> Mapping[str, Any]:
        """What `/health` shows of it."""
        return {"worker": {"state": self.state, "phase": self.phase, "starts": self.starts}}

    @abstractmethod
    def _told(self, worker: WorkerProcess) -> Mapping[str, str]:
        """What the environment of `worker`, which is about to be started, says of how it is asked."""

    @abstractmethod
    def _opened(self, worker: WorkerProcess) -> None:
        """`worker` takes requests."""

    @abstractmethod
    def _lost(self, worker: WorkerProcess) -> None:
        """`worker` has ended, or could not start."""

    @abstractmethod
    async def _close(self) -> None:
        """The last worker has ended: leave nothing."""

    async def _keep(self) -> None:
        """Start a worker whenever one is wanted, watch it until it ends, and again."""
        failures = 0
        if self._at_once:
            self._wanted.set()
        while await self._unless_stopped(self._wanted.wait()):
            failures += 1
            worker = await self._start(failures)
            if worker is None:
                await self._rest()
                continue
            failures = 0
            await first(worker.left, worker.exited, self._stop)
            expected = worker.left.done() or self._stop.done()
            await worker.end(self._drain_timeout_s + KILL_GRACE_S)
            self._forget(worker)
            self._tell(Ended(worker.exited.result().reason, expected))
            if self._at_once:
                self._wanted.set()

    async def _start(self, attempt: int) -> WorkerProcess | None:
        self.starts += 1
        self._started_s = time.monotonic()
        self._tell(Starting(self.starts))
        worker = WorkerProcess(self._folder / f"worker-{self.starts}", self._progress)
        worker.start(self._launcher, self._environ, self._told(worker))
        self._worker = worker
        await first(worker.ready, worker.exited, self._stop, timeout_s=self._start_timeout_s)
        if not worker.ready.done() or worker.exited.done():
            late = Exit(70, f"it was not ready within {self._start_timeout_s:g} s")
            end = worker.exited.result() if worker.exited.done() else late
            await worker.end(KILL_GRACE_S)
            self._worker = None
            self._lost(worker)
            self._fail(end, attempt)
            return None
        self._open = True
        self._opened(worker)
        self._cold_start_s = time.monotonic() - self._started_s
        self.phase = None
        self._announce()
        self._tell(Ready(self._cold_start_s, worker.ready.result()))
        return worker

    def _progress(self, text: str) -> None:
        self.phase = text
        self._tell(Progress(text))

    def _fail(self, end: Exit, attempt: int) -> None:
        self.phase = None
        if self._stop.done():
            return
        again_in_s = self._back_off(attempt)
        self._again_at_s = time.monotonic() + again_in_s
        self._failure = StartFailed(end.reason, end.code, end.code in PERMANENT, again_in_s)
        self._announce()
        self._tell(self._failure)

    async def _rest(self) -> None:
        """After a failed start: refuse for a while, then try again when somebody asks."""
        if self._failure is not None:
            await first(self._stop, timeout_s=self._failure.again_in_s)
        self._failure = None

    def _forget(self, worker: WorkerProcess) -> None:
        if self._worker is worker:
            self._worker = None
            self._open = False
            self._lost(worker)

    def _announce(self) -> None:
        """Wake whoever waits, in order; who is still not served says so again."""
        self._wanted.clear()
        self._news.set()
        self._news = asyncio.Event()

    async def _unless_stopped(self, waiting: Coroutine[Any, Any, Any]) -> bool:
        task = asyncio.create_task(waiting)
        await first(task, self._stop)
        task.cancel()
        return not self._stop.done()

    def stop_taking(self) -> None:
        """Turn away whoever waits or comes, and have the worker drain."""
        if not self._stop.done():
            self._stop.set_result(None)
            self._announce()

    async def close(self) -> None:
        """Stop taking, let what runs finish within the drain deadline, and leave no process."""
        self.stop_taking()
        if self._keeper is not None:
            await self._keeper
        await self._close()
        await self._launcher.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """End everything now, without waiting for anything."""
        if self._worker is not None:
            self._worker.kill()
        self._launcher.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


async def first(*futures: asyncio.Future[Any], timeout_s: float | None = None) -> None:
    """Return once one of `futures` is done, or after `timeout_s`."""
    await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


def _private_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="firsttoken-"))  # mode 0700
    if len(str(folder)) <= SOCKET_PATH_MAX_BYTES - len("/worker-00000.notify"):
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="firsttoken-", dir="/tmp"))
