"""vLLM's engine core in a thread of this process: no second import, no IPC per token.

vLLM's own asynchronous client always starts the core in another process. This one has the
methods that `AsyncLLM` calls and passes objects where the other passes messages. It is
used on the CPU and for snapshots; on a GPU a forked core leaves the interpreter to the
front end (docs/decisions/0004-engine-in-process.md). It imports nothing of vLLM.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

log = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 10.0
IDLE_STEP_S = 0.001


class Core(Protocol):
    """What is used of `vllm.v1.engine.core.EngineCore`; the seam test holds it to that."""

    scheduler: Any
    model_executor: Any
    batch_queue: Any
    aborts_queue: queue.Queue[list[str]]
    step_fn: Callable[[], tuple[dict[int, Any] | None, bool]]

    def preprocess_add_request(self, request: Any) -> tuple[Any, int]:
        """Make the scheduler's request of the front end's."""

    def add_request(self, request: Any, request_wave: int) -> None:
        """Queue a request."""

    def abort_requests(self, request_ids: list[str]) -> None:
        """Drop requests."""

    def post_step(self, model_executed: bool) -> None:
        """What follows each step."""


@dataclass
class Resources:
    """What `AsyncLLM` reads of a client's resources."""

    engine_dead: bool = False


Work = Callable[[], None] | None
"""Something to do between two steps; None ends the thread."""


class ThreadCoreClient:
    """Runs a `Core` in a thread and speaks `AsyncLLM`'s client protocol.

    `make_core` is called in that thread at once, because the model and the thread that runs it
    belong together; `opened` waits for it. `make_dead_error` makes the exception that requests
    get when the core dies.
    """

    engine_ranks_managed = (0,)

    def __init__(self, make_core: Callable[[], Core], make_dead_error: Callable[[], Exception]) -> None:
        self.resources = Resources()
        self._make_core = make_core
        self._make_dead_error = make_dead_error
        self._work: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[Any] = asyncio.Queue()
        self._unanswered: set[asyncio.Future[Any]] = set()
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self.core: Core | None = None
        self._thread = threading.Thread(target=self._run, name="engine-core", daemon=True)
        self._thread.start()

    def opened(self) -> Self:
        """Wait until the core is made. Raises what `make_core` raised."""
        self._started.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def _run(self) -> None:
        try:
            core = self.core = self._make_core()
        except BaseException as failure:  # noqa: BLE001 - raised again where the client is made
            self._failure = failure
            self._started.set()
            return
        self._started.set()
        try:
            while self._between_steps(core):
                self._step(core)
            # Not `core.shutdown()`: it ends with a collection over the whole heap, which takes
            # seconds and frees what the end of the process frees anyway.
            core.model_executor.shutdown()
            core.scheduler.shutdown()
        except BaseException:  # the boundary of the engine: its requests fail, the worker exits
            log.exception("engine core died")
            self.resources.engine_dead = True
            self._emit(self._make_dead_error())
        finally:
            self.resources.engine_dead = True  # as vLLM's client does when it is shut down
            self._tell(self._abandon)

    def _between_steps(self, core: Core) -> bool:
        """Do the work that came, waiting for some if there is no step to take."""
        while True:
            busy = core.scheduler.has_requests() or bool(core.batch_queue)
            try:
                work = self._work.get(block=not busy)
            except queue.Empty:
                return True
            if work is None:
                return False
            work()

    def _step(self, core: Core) -> None:
        outputs, executed = core.step_fn()
        for output in (outputs or {}).values():
            if output.outputs or output.scheduler_stats:
                self._emit(output)
        core.post_step(executed)
        if not executed and core.scheduler.has_requests():
            time.sleep(IDLE_STEP_S)  # a grammar compiles or a connector loads: leave them the interpreter

    def _emit(self, output: object) -> None:
        self._tell(self._outputs.put_nowait, output)

    def _tell(self, hear: Callable[..., object], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(hear, *args)
        except RuntimeError:  # the loop was closed before this thread had ended: nobody listens
            log.debug("no loop to tell")

    def _abandon(self) -> None:
        """Fail the calls that the thread did not come to before it ended."""
        for answer in self._unanswered:
            if not answer.done():
                answer.set_exception(self._make_dead_error())

    async def get_output_async(self) -> Any:
        """The next batch of outputs; raises once the core is dead."""
        output = await self._outputs.get()
        if isinstance(output, Exception):
            raise output
        return output

    async def add_request_async(self, request: Any) -> None:
        """Hand a request to the core; what is wrong with it is raised here."""
        core = self._alive()
        prepared, wave = core.preprocess_add_request(request)
        self._work.put(lambda: core.add_request(prepared, wave))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Stop generating for `request_ids`, in the step that runs if there is one."""
        if not request_ids or self.resources.engine_dead:
            return
        core = self._alive()
        core.aborts_queue.put_nowait(request_ids)
        self._work.put(lambda: core.abort_requests(request_ids))

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        """Every other `<method>_async` runs `<method>` of the core between two steps."""
        if not name.endswith("_async"):
            raise AttributeError(name)
        method = name.removesuffix("_async")

        async def call(*args: Any, **kwargs: Any) -> Any:
            core = self._alive()
            return await self._between(lambda: getattr(core, method)(*args, **kwargs))

        return call

    async def _between(self, function: Callable[[], Any]) -> Any:
        done = self._loop.create_future()
        self._unanswered.add(done)
        done.add_done_callback(self._unanswered.discard)

        def settle(result: Any, failure: Exception | None) -> None:
            if done.done():  # cancelled by its caller
                return
            if failure is None:
                done.set_result(result)
            else:
                done.set_exception(failure)

        def work() -> None:
            try:
                result, failure = function(), None
            except Exception as error:  # noqa: BLE001 - raised again in the caller's task
                result, failure = None, error
            self._tell(settle, result, failure)

        self._work.put(work)
        return await done

    def _alive(self) -> Core:
        if self.resources.engine_dead or self.core is None:
            raise self._make_dead_error()
        return self.core

    def dp_engines_running(self) -> bool:
        """There are no data-parallel engines."""
        return False

    def get_kv_event_sources(self) -> dict[int, Any]:
        """No KV events are published."""
        return {}

    def shutdown(self, timeout: float | None = None) -> None:
        """End the thread and free the model; waits `timeout` seconds, or ten."""
        if self._thread.is_alive():
            self._work.put(None)
            self._thread.join(JOIN_TIMEOUT_S if timeout is None else timeout)
