"""`handler.core_thread`: an engine core in a thread, behind the client that `AsyncLLM` knows.

The core here is scripted and strict: it fails the test when it is stepped with nothing to
do, or touched from any other thread than its own.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from handler.core_thread import ThreadCoreClient

WAIT_S = 60.0
"""How long a thread may take for what takes microseconds, before the test fails."""


class Dead(Exception):
    """What requests get when the core has died."""


@dataclass
class Asked:
    """A request for `tokens` outputs, one a step."""

    request_id: str
    tokens: int = 1
    fault: Exception | None = None


@dataclass
class Outputs:
    """What one step made: `(request_id, token)`."""

    outputs: list[tuple[str, int]] = field(default_factory=list)
    scheduler_stats: object = None


class Scheduler:
    """Knows what is to be done."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.closed = 0

    def has_requests(self) -> bool:
        """Whether a step is in order."""
        return bool(self.left)

    def shutdown(self) -> None:
        """Count the call."""
        self.closed += 1


class Executor:
    """Counts how often it was shut down."""

    def __init__(self) -> None:
        self.closed = 0

    def shutdown(self) -> None:
        """Count the call."""
        self.closed += 1


class ScriptedCore:
    """Makes one token a step for each request; `step_gate` holds a step while it is cleared."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.scheduler: Any = Scheduler()
        self.model_executor: Any = Executor()
        self.batch_queue: Any = None
        self.step_fn: Callable[[], tuple[dict[int, Any] | None, bool]] = self._step
        self.aborts_queue: queue.Queue[list[str]] = queue.Queue()
        self.step_gate = threading.Event()
        self.step_gate.set()
        self.in_step = threading.Event()
        self.fail_step: BaseException | None = None
        self.steps: list[bool] = []
        self.stats: object = None

    def preprocess_add_request(self, request: Asked) -> tuple[Asked, int]:
        """Runs beside the step, in the loop's thread, as in vLLM."""
        assert threading.get_ident() != self.thread
        if request.fault is not None:
            raise request.fault
        return request, 0

    def add_request(self, request: Asked, request_wave: int) -> None:
        """Queue it."""
        self._here()
        assert request_wave == 0
        assert request.request_id not in self.scheduler.left
        self.scheduler.left[request.request_id] = request.tokens

    def abort_requests(self, request_ids: list[str]) -> None:
        """Drop them; those that are over already are no fault."""
        self._here()
        for request_id in request_ids:
            self.scheduler.left.pop(request_id, None)

    def _step(self) -> tuple[dict[int, Any] | None, bool]:
        """One token for each, less what was aborted meanwhile."""
        self._here()
        assert self.scheduler.has_requests(), "stepped with nothing to do"
        scheduled = dict(self.scheduler.left)
        self.in_step.set()
        assert self.step_gate.wait(WAIT_S)
        if self.fail_step is not None:
            raise self.fail_step
        while not self.aborts_queue.empty():
            self.abort_requests(self.aborts_queue.get_nowait())
        made = []
        for request_id, left in scheduled.items():
            if request_id in self.scheduler.left:
                made.append((request_id, left))
                self.scheduler.left[request_id] -= 1
                if not self.scheduler.left[request_id]:
                    del self.scheduler.left[request_id]
        return {0: Outputs(made, self.stats)}, True

    def post_step(self, model_executed: bool) -> None:
        """Follows each step."""
        self._here()
        self.steps.append(model_executed)

    def add(self, a: int, *, b: int) -> int:
        """A method of the core that vLLM's client would call as `add_async`."""
        self._here()
        return a + b

    def refuse(self) -> None:
        """One that raises."""
        self._here()
        raise KeyError("refused")

    def _here(self) -> None:
        assert threading.get_ident() == self.thread, "called from another thread"


@asynccontextmanager
async def running() -> AsyncIterator[tuple[ThreadCoreClient, ScriptedCore]]:
    """A client and its core, shut down at the end."""
    client = ThreadCoreClient(ScriptedCore, Dead).opened()
    core = client.core
    assert isinstance(core, ScriptedCore)
    try:
        yield client, core
    finally:
        core.step_gate.set()
        await asyncio.to_thread(client.shutdown, WAIT_S)
        assert not client._thread.is_alive()


async def passed(event: threading.Event) -> None:
    """Wait for something that another thread does."""
    assert await asyncio.to_thread(event.wait, WAIT_S)


async def test_outputs_of_each_step_arrive_in_order() -> None:
    """A request is stepped until it is done, each step is followed by its hook, then all is quiet."""
    async with running() as (client, core):
        await client.add_request_async(Asked("a", tokens=3))
        got = [(await client.get_output_async()).outputs for _ in range(3)]
        assert got == [[("a", 3)], [("a", 2)], [("a", 1)]]
        await client.add_async(0, b=0)  # runs between steps, so after the hook of the last one
        assert core.steps == [True, True, True]


async def test_requests_that_come_together_share_a_step() -> None:
    """Whatever came while a step ran is in the next one."""
    async with running() as (client, core):
        core.step_gate.clear()
        await client.add_request_async(Asked("a", tokens=2))
        await passed(core.in_step)
        await client.add_request_async(Asked("b"))
        await client.add_request_async(Asked("c"))
        core.step_gate.set()
        got = [(await client.get_output_async()).outputs for _ in range(2)]
        assert got == [[("a", 2)], [("a", 1), ("b", 1), ("c", 1)]]


async def test_a_step_that_made_nothing_is_not_passed_on() -> None:
    """Empty outputs would wake the loop for nothing; statistics alone are worth it."""
    async with running() as (client, core):
        core.step_gate.clear()
        await client.add_request_async(Asked("a"))
        await passed(core.in_step)
        await client.abort_requests_async(["a"])
        core.step_gate.set()
        await client.add_async(0, b=0)
        core.stats = "stats"
        await client.add_request_async(Asked("b"))
        output = await client.get_output_async()
        assert (output.outputs, output.scheduler_stats) == ([("b", 1)], "stats")


async def test_what_is_wrong_with_a_request_is_raised_to_its_caller_alone() -> None:
    """The core never hears of it and goes on."""
    async with running() as (client, _):
        with pytest.raises(ValueError, match="grammar"):
            await client.add_request_async(Asked("bad", fault=ValueError("grammar")))
        await client.add_request_async(Asked("good"))
        assert (await client.get_output_async()).outputs == [("good", 1)]


async def test_an_abort_takes_effect_in_the_step_that_runs() -> None:
    """The step's own token is dropped, not only those that would follow."""
    async with running() as (client, core):
        core.step_gate.clear()
        await client.add_request_async(Asked("left", tokens=100))
        await passed(core.in_step)
        await client.add_request_async(Asked("stays", tokens=2))
        await client.abort_requests_async(["left"])
        core.step_gate.set()
        got = [(await client.get_output_async()).outputs for _ in range(2)]
        assert got == [[("stays", 2)], [("stays", 1)]]


async def test_an_abort_before_the_core_took_the_request_is_not_lost() -> None:
    """Adding and aborting keep their order while a step runs."""
    async with running() as (client, core):
        core.step_gate.clear()
        await client.add_request_async(Asked("a"))
        await passed(core.in_step)
        await client.add_request_async(Asked("b", tokens=100))
        await client.abort_requests_async(["b"])
        core.step_gate.set()
        assert (await client.get_output_async()).outputs == [("a", 1)]
        await client.add_async(0, b=0)
        assert core.scheduler.left == {}


async def test_aborting_nothing_is_nothing() -> None:
    """An idle core is not woken for an empty list."""
    async with running() as (client, core):
        await client.abort_requests_async([])
        assert core.aborts_queue.empty()


async def test_a_method_of_the_core_runs_between_steps() -> None:
    """`<method>_async` returns what the method returns, also while requests run."""
    async with running() as (client, core):
        assert await client.add_async(1, b=2) == 3
        core.step_gate.clear()
        await client.add_request_async(Asked("a", tokens=2))
        await passed(core.in_step)
        answer = asyncio.ensure_future(client.add_async(3, b=4))
        core.step_gate.set()
        assert await answer == 7


@pytest.mark.parametrize(
    ("method", "error"), [("refuse_async", KeyError), ("unheard_of_async", AttributeError)]
)
async def test_what_a_method_raises_is_raised_to_its_caller(method: str, error: type[Exception]) -> None:
    """The core goes on."""
    async with running() as (client, _):
        with pytest.raises(error):
            await getattr(client, method)()
        assert await client.add_async(1, b=1) == 2


async def test_a_caller_that_gives_up_a_method_does_no_harm() -> None:
    """Its result has nowhere to go and is dropped."""
    async with running() as (client, core):
        core.step_gate.clear()
        await client.add_request_async(Asked("a"))
        await passed(core.in_step)
        waiting = asyncio.ensure_future(client.add_async(1, b=1))
        await asyncio.sleep(0)
        waiting.cancel()
        core.step_gate.set()
        assert await client.add_async(2, b=2) == 4
        assert waiting.cancelled()


async def test_only_asynchronous_names_are_made_up() -> None:
    """A probe for an attribute that is not there finds none."""
    async with running() as (client, _):
        assert not hasattr(client, "shutdown_everything")
        assert client.dp_engines_running() is False
        assert client.get_kv_event_sources() == {}


async def test_a_core_that_can_not_be_made_is_raised_where_the_client_is() -> None:
    """A start that fails fails at once, with the reason."""

    def make() -> ScriptedCore:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        ThreadCoreClient(make, Dead).opened()


@pytest.mark.parametrize("failure", [RuntimeError("a kernel failed"), SystemExit(1)])
async def test_a_step_that_fails_is_the_end(failure: BaseException) -> None:
    """The client is marked dead and says so to whoever reads, adds or calls; an abort is moot."""
    async with running() as (client, core):
        core.fail_step = failure
        await client.add_request_async(Asked("a"))
        with pytest.raises(Dead):
            await asyncio.wait_for(client.get_output_async(), WAIT_S)
        assert client.resources.engine_dead
        with pytest.raises(Dead):
            await client.add_request_async(Asked("b"))
        with pytest.raises(Dead):
            await client.add_async(1, b=1)
        await client.abort_requests_async(["a"])


async def test_a_method_that_waits_when_the_core_dies_fails() -> None:
    """Nobody waits for ever for an answer that can't come."""
    async with running() as (client, core):
        core.step_gate.clear()
        core.fail_step = RuntimeError("a kernel failed")
        await client.add_request_async(Asked("a"))
        await passed(core.in_step)
        waiting = asyncio.ensure_future(client.add_async(1, b=1))
        await asyncio.sleep(0)
        core.step_gate.set()
        with pytest.raises(Dead):
            await asyncio.wait_for(waiting, WAIT_S)


async def test_a_method_that_waits_at_shutdown_fails() -> None:
    """As above: the thread ends without having come to it."""
    async with running() as (client, core):
        core.step_gate.clear()
        await client.add_request_async(Asked("a", tokens=2))
        await passed(core.in_step)
        client._work.put(None)
        waiting = asyncio.ensure_future(client.add_async(1, b=1))
        await asyncio.sleep(0)
        core.step_gate.set()
        with pytest.raises(Dead):
            await asyncio.wait_for(waiting, WAIT_S)


async def test_shutdown_frees_the_model_once() -> None:
    """The thread ends, the executor and the scheduler are told, and a second call does nothing."""
    client = ThreadCoreClient(ScriptedCore, Dead).opened()
    core = client.core
    assert isinstance(core, ScriptedCore)
    for _ in range(2):
        await asyncio.to_thread(client.shutdown, WAIT_S)
        assert not client._thread.is_alive()
        assert (core.model_executor.closed, core.scheduler.closed) == (1, 1)


async def test_shutdown_ends_what_still_runs() -> None:
    """It does not wait for requests to finish: draining was done before."""
    async with running() as (client, core):
        core.step_gate.clear()
        await client.add_request_async(Asked("a", tokens=10**9))
        await passed(core.in_step)
        client.shutdown(timeout=0)
        core.step_gate.set()
        await asyncio.to_thread(client._thread.join, WAIT_S)
        assert core.model_executor.closed == 1
