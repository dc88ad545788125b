"""Keeps the workers of one endpoint on this machine: as many as the policy says, each watched to its end.

How requests get to a worker is another matter, of those who derive from `WorkerPool`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from gateway.scaling import Scaler, Scaling, Seen
from gateway.upstreams import WorkerView
from gateway.upstreams.devices import VISIBLE, Devices
from gateway.upstreams.events import Ended, Event, Progress, Ready, StartFailed, Starting
from gateway.upstreams.failures import Failures, back_off_s
from gateway.upstreams.folder import PrivateFolder
from gateway.upstreams.launch import Launcher
from gateway.upstreams.output import is_held, secrets_of
from gateway.upstreams.process import SLOTS_GUESS, Exit
from gateway.upstreams.waits import first
from gateway.upstreams.worker import Worker
from handler import machine
from handler.errors import NotAdmitted
from handler.messages import Call, Reply, Request
from handler.parallel import devices_per_engine

log = logging.getLogger("gateway")

COLD_START_GUESS_S = 30.0
BUSY_RETRY_S = 5.0
"""When a pool whose workers are full may have room again: a guess, for nobody knows how long answers get."""
KILL_GRACE_S = 1.0
"""What a worker gets beyond the drain deadline, which it keeps itself."""
ENDED_SHOWN = 5
TOLD_LINES = 5
"""How many lines of a worker's output are in the error of those who wanted it."""
MEMORY_RETRY_S = 10.0


@dataclass(frozen=True, slots=True)
class Keep:
    """How a pool keeps its workers.

    They run on `devices`, if the machine has any, and what they write is kept in `logs`, a folder of this
    pool's own (None: in its private one, and gone with it). On a CPU they are told that `shared_by` workers
    share the machine (None: as many as there may be of this pool). `tell` hears what happens, on the loop.
    """

    at_once: bool
    """The first worker is started before anybody asks, and one that dies is replaced at once."""
    start_timeout_s: float
    drain_timeout_s: float
    scaling: Scaling = field(default_factory=Scaling)
    devices: Devices = field(default_factory=Devices)
    logs: Path | None = None
    shared_by: int | None = None
    tell: Callable[[Event], None] = lambda _: None
    back_off: Callable[[int], float] = back_off_s


class WorkerPool(ABC):
    """Up to `keep.scaling.max_workers` worker processes, and what is the same for every `Pool` that has some.

    `launcher` is given a private folder and starts the workers. Used as `async with`: entering has what is
    wanted started, leaving drains and ends all.
    """

    def __init__(self, launcher: Callable[[Path], Launcher], environ: Mapping[str, str], keep: Keep) -> None:
        self._environ = environ
        self._how = keep
        self._tell = keep.tell
        self._devices = keep.devices
        self._devices_each = devices_per_engine(environ) if self._devices.total else 0
        self._hidden = secrets_of(environ)
        self._scaler = Scaler(self._bounded(keep.scaling))
        self._folder = PrivateFolder()
        self._logs = keep.logs or self._folder.path
        self._launcher = launcher(self._folder.path)
        self._workers: dict[str, Worker] = {}
        self._ended: deque[WorkerView] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listeners: list[Callable[[], None]] = []
        self._loop = asyncio.get_running_loop()
        self._stop: asyncio.Future[None] = self._loop.create_future()
        self._entered = False
        self._looking: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waiting = 0
        self._waiting_since_s = 0.0
        self._asked_for = 0
        self._failures = Failures(keep.back_off)
        self._cold_start_s = COLD_START_GUESS_S
        self._slots = SLOTS_GUESS
        self.starts = 0

    async def __aenter__(self) -> Self:
        ended = [file for file in self._logs.glob("worker-*.log") if not is_held(file)]
        for file in sorted(ended, key=_changed_at)[:-ENDED_SHOWN]:
            _remove_log(file)
        self._devices.join(self, self._look_soon)
        self._entered = True
        self._asked_for = int(self._how.at_once)
        self._look_soon()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- as others see it ---------------------------------------------------------------------

    @property
    def workers(self) -> Sequence[WorkerView]:
        """Those that live, in order of their starts, and after them the last few that have ended."""
        return [*(worker.view for worker in self._workers.values()), *self._ended]

    @property
    def scaling(self) -> Scaling:
        """Its bounds, as the machine allows them."""
        return self._scaler.scaling

    def rescale(self, scaling: Scaling) -> None:
        """Keep to other bounds from now on; no request is dropped for it."""
        self._scaler.scaling = self._bounded(scaling)
        self._look_soon()

    @property
    def ready(self) -> bool:
        """Whether a request can be sent at once."""
        return not self._stop.done() and any(worker.takes for worker in self._workers.values())

    @property
    def free(self) -> int:
        """How many more requests the ready workers take at once."""
        return 0 if self._stop.done() else sum(worker.free for worker in self._workers.values())

    @property
    def capacity(self) -> int:
        """How many requests the ready workers work on at once, in all."""
        return sum(worker.slots for worker in self._workers.values() if worker.takes)

    @property
    def cold_start_s(self) -> float:
        """How long the last start took; a guess while there was none."""
        return self._cold_start_s

    @property
    def retry_after_s(self) -> float:
        """What is left of a cold start that takes as long as the last one."""
        if self.ready:
            return BUSY_RETRY_S
        begun_s = [worker.started_s for worker in self._workers.values() if worker.starting]
        return self._cold_start_s - (time.monotonic() - min(begun_s) if begun_s else 0.0)

    @property
    def refusal(self) -> NotAdmitted | None:
        """What whoever wants a worker is refused with; None while one is there or may come."""
        if self._stop.done():
            return NotAdmitted("The gateway is stopping.", retry_after_s=1)
        failure = self._failures.last
        if failure is None or any(worker.starting or worker.serves for worker in self._workers.values()):
            return None
        return NotAdmitted(
            f"The worker could not start: {failure.reason}.{self._said(failure)}",
            retry_after_s=self._failures.rest_s(time.monotonic()),
            code="worker_start_failed",
        )

    def _said(self, failure: StartFailed) -> str:
        """What the worker that failed has written last, but for its reason, which is told already."""
        tail = next((view.log_tail for view in self._ended if view.id == failure.worker), ())
        reason, last = _words(failure.reason), list[str]()
        for n in reversed(range(len(tail))):
            last = _words(tail[n]) + last
            if len(last) >= len(reason):
                tail = tail[:n] if last == reason else tail
                break
        return "\nIts output ends with:\n" + "\n".join(tail[-TOLD_LINES:]) if tail else ""

    def listen(self, heard: Callable[[], None]) -> None:
        """Have `heard` called on the loop whenever `free` may have grown or `refusal` has changed."""
        self._listeners.append(heard)

    def want(self, waiting: int, oldest_wait_s: float) -> None:
        """`waiting` requests wait now, the oldest for so long."""
        self._waiting = waiting
        self._waiting_since_s = time.monotonic() - oldest_wait_s
        self._look_soon()

    @property
    def in_line(self) -> int:
        """How many requests wait here until a worker takes them."""
        return 0

    @property
    def askable(self) -> Mapping[str, Call]:
        """The ready workers that can be asked for more than what clients want, their metrics say, by id."""
        return {}

    # --- how requests get there ---------------------------------------------------------------

    @abstractmethod
    def call(self, request: Request) -> AbstractAsyncContextManager[Reply]:
        """Ask a worker (a `handler.messages.Call`)."""

    @abstractmethod
    def _told(self, worker: Worker) -> Mapping[str, str]:
        """What the environment of `worker`, which is about to be started, says of how it is asked."""

    @abstractmethod
    def _opened(self, worker: Worker) -> None:
        """`worker` takes requests."""

    @abstractmethod
    async def _watch(self, worker: Worker) -> None:
        """Look after `worker`, which is ready, until it leaves: then this is cancelled."""

    @abstractmethod
    def _retire(self, worker: Worker, *, retired: bool) -> None:
        """`worker` gets no more requests; or again some, if it is not `retired` any more."""

    @abstractmethod
    def _lost(self, worker: Worker) -> None:
        """`worker` has ended, or could not start."""

    @abstractmethod
    async def _close(self) -> None:
        """The last worker has ended: leave nothing."""

    def _freed(self, worker: Worker) -> None:
        """`worker` holds less than before, or takes requests again."""
        if worker.retiring and not worker.in_flight:
            worker.process.terminate()
        self._look_soon()
        self._announce()

    # --- how many there are -------------------------------------------------------------------

    def _look_soon(self) -> None:
        """Something has changed: ask the policy, once for all that changes in this turn of the loop."""
        if self._looking is None and self._entered and not self._stop.done():
            self._looking = self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._looking = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._stop.done():
            return
        now_s = time.monotonic()
        if self._failures.forget(now_s):
            self._announce()
        seen = self._seen(now_s)
        decision = self._scaler.decide(now_s, seen)
        alive = seen.ready + seen.starting
        again_in_s = math.inf if decision.again_in_s is None else decision.again_in_s
        if decision.workers > alive:
            again_in_s = min(again_in_s, self._grow(decision.workers - alive, now_s))
        else:
            self._devices.forgo(self)
            self._shrink(alive - decision.workers)
        again_in_s = min(again_in_s, self._failures.look_in_s(now_s))
        if again_in_s != math.inf:
            self._timer = self._loop.call_later(again_in_s, self._look)

    def _seen(self, now_s: float) -> Seen:
        counted = [worker for worker in self._workers.values() if worker.takes or worker.starting]
        waiting = self._waiting + self.in_line
        return Seen(
            waiting=waiting,
            oldest_wait_s=now_s - self._waiting_since_s if self._waiting else 0.0,
            in_flight=sum(worker.in_flight for worker in counted),
            ready=sum(worker.takes for worker in counted),
            starting=sum(worker.starting for worker in counted),
            capacity=self.capacity,
            slots=self._slots,
            cold_start_s=self._cold_start_s,
            newest_s=min((now_s - worker.opened_s for worker in counted if worker.takes), default=math.inf),
            asked_for=self._asked_for,
            given_up=self._failures.given_up,
            pressed=self._devices.wanted_beside(self),
        )

    def _grow(self, number: int, now_s: float) -> float:
        """Have `number` workers more; returns in how many seconds to look again if that was not to be."""
        for worker in self._workers.values():
            if number and worker.retiring and worker.serves:
                worker.retiring = False
                self._retire(worker, retired=False)
                number -= 1
        number = min(number, self.scaling.max_workers - len(self._workers))
        for _ in range(number):
            if (rest_s := self._failures.rest_s(now_s)) > 0:
                return rest_s
            if self._devices_each > self._devices.total:
                why = f"it wants {self._devices_each} devices, and there are {self._devices.total} here"
                self.starts += 1
                self._fail(f"worker-{self.starts}", Exit(75, why), permanent=True)
                return math.inf
            if self._lacks_memory():
                self._failures.postpone(now_s, MEMORY_RETRY_S)
                return MEMORY_RETRY_S
            devices = self._devices.take(self._devices_each, self)
            if devices is None:
                return math.inf  # it is told when some are free
            self._start(devices)
        return math.inf

    def _shrink(self, number: int) -> None:
        """Let the least needed `number` of the ready workers go, once they have finished what they hold."""
        ready = [worker for worker in self._workers.values() if worker.takes]
        for worker in sorted(ready, key=lambda worker: (worker.in_flight, -worker.number))[:number]:
            worker.retiring = True
            self._retire(worker, retired=True)
            if not worker.in_flight:
                worker.process.terminate()

    def _bounded(self, scaling: Scaling) -> Scaling:
        """`scaling`, as far as there are devices for it."""
        if not self._devices.total:
            return scaling
        most = max(1, self._devices.total // self._devices_each)
        if scaling.max_workers > most:
            log.warning(
                "fewer workers than MAX_WORKERS: each wants devices of its own",
                extra={"workers": most, "devices": self._devices.total, "each": self._devices_each},
            )
        return replace(
            scaling,
            min_workers=min(scaling.min_workers, most),
            max_workers=min(scaling.max_workers, most),
        )

    def _lacks_memory(self) -> bool:
        """Whether there is no room for a worker like those here; a GPU's memory is a worker's own."""
        pids = [worker.process.pid for worker in self._workers.values() if worker.serves]
        if self._devices.total or not any(pids):
            return False
        needed = max(machine.memory_bytes(pid) for pid in pids if pid)
        if lacks := machine.free_memory_bytes() < needed:
            log.warning("no memory for another worker", extra={"needed_mib": needed >> 20})
        return lacks

    # --- one worker, from start to end --------------------------------------------------------

    def _start(self, devices: tuple[str, ...]) -> None:
        self.starts += 1
        try:
            self._logs.mkdir(mode=0o700, parents=True, exist_ok=True)
            worker = Worker(
                self.starts,
                self._folder.path,
                devices,
                logs=self._logs,
                hidden=self._hidden,
                progress=self._progress,
            )
        except OSError as error:
            self._devices.give_back(devices)
            self._fail(f"worker-{self.starts}", Exit(70, f"{error.filename}: {error.strerror}"))
            return
        self._workers[worker.id] = worker
        task = self._loop.create_task(self._keep(worker))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep(self, worker: Worker) -> None:
        process = worker.process
        self._tell(Starting(worker.id, worker.number))
        process.start(self._launcher, self._environ_of(worker), self._told(worker))
        await first(process.ready, process.exited, self._stop, timeout_s=self._how.start_timeout_s)
        if not process.ready.done() or process.exited.done():
            late = Exit(70, f"it was not ready within {self._how.start_timeout_s:g} s")
            end = process.exited.result() if process.exited.done() else late
            await process.end(KILL_GRACE_S)
            self._remove(worker, end.reason)
            if not self._stop.done():
                self._fail(worker.id, end)
            return
        self._open(worker)
        watching = self._loop.create_task(self._watch(worker))
        await first(process.left, process.exited, self._stop)
        watching.cancel()
        expected = process.left.done() or self._stop.done()
        await process.end(self._how.drain_timeout_s + KILL_GRACE_S)
        reason = process.exited.result().reason
        self._remove(worker, reason)
        self._tell(Ended(worker.id, reason, expected))
        if not expected:
            self._died(worker, reason)
        self._look_soon()

    def _environ_of(self, worker: Worker) -> Mapping[str, str]:
        """What all workers are told of the machine, and this one of its part."""
        if worker.devices:
            return {**self._environ, VISIBLE: ",".join(worker.devices)}
        sharing = self._how.shared_by or self.scaling.max_workers
        return self._environ if sharing == 1 else {**self._environ, "SHARED_BY": str(sharing)}

    def _open(self, worker: Worker) -> None:
        worker.open()
        self._asked_for = 0
        self._failures.opened()
        self._cold_start_s = worker.took_s or 0.0
        self._slots = worker.slots
        self._opened(worker)
        self._announce()
        self._look_soon()
        self._tell(Ready(worker.id, self._cold_start_s, worker.cold_start))

    def _progress(self, worker: Worker, text: str) -> None:
        worker.phase = text
        self._tell(Progress(worker.id, text))

    def _remove(self, worker: Worker, reason: str) -> None:
        """`worker` has ended: nothing of it is left but what is shown."""
        del self._workers[worker.id]
        worker.end(reason)
        self._ended.append(worker.view)
        while len(self._ended) > ENDED_SHOWN:
            _remove_log(self._ended.popleft().log)
        self._devices.give_back(worker.devices)
        self._lost(worker)

    def _fail(self, worker_id: str, end: Exit, *, permanent: bool = False) -> None:
        self._rest(self._failures.start_failed(worker_id, end, time.monotonic(), permanent=permanent))

    def _died(self, worker: Worker, reason: str) -> None:
        """A worker that was ready has ended, and nobody had told it to."""
        self._asked_for = int(self._how.at_once)
        failure = self._failures.died(worker.id, reason, time.monotonic(), answered=worker.answered)
        if failure is not None:
            self._rest(failure)

    def _rest(self, failure: StartFailed) -> None:
        """None is started for a while, and those who wait are refused if no other worker is there."""
        self._announce()
        self._look_soon()
        self._tell(failure)

    def _announce(self) -> None:
        """Tell those for whom there may be room, or none."""
        for heard in self._listeners:
            heard()

    # --- the end ------------------------------------------------------------------------------

    def stop_taking(self) -> None:
        """Turn away whoever waits or comes, and have the workers drain."""
        if not self._stop.done():
            self._stop.set_result(None)
            self._devices.leave(self)
            self._announce()

    async def close(self) -> None:
        """Stop taking, let what runs finish within the drain deadline, and leave no process."""
        self.stop_taking()
        for handle in (self._looking, self._timer):
            if handle is not None:
                handle.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._close()
        await self._launcher.close()
        self._folder.remove()

    def kill(self) -> None:
        """End everything now, without waiting for anything."""
        for worker in self._workers.values():
            worker.process.kill()
        self._launcher.kill()
        self._folder.remove()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.removeprefix("firsttoken:"))


def _changed_at(file: Path) -> float:
    return file.stat().st_mtime


def _remove_log(file: Path | None) -> None:
    assert file is not None, "each worker of a pool has one"
    for part in (file, file.with_name(f"{file.name}.1")):
        part.unlink(missing_ok=True)
