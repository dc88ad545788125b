"""Pools of several workers over real processes and sockets, with a scripted worker."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.endpoints.admission import Admission
from gateway.scaling import Scaling
from gateway.upstreams import WorkerLost, WorkerView, pool
from gateway.upstreams.devices import Devices
from gateway.upstreams.events import Ended, Event, Ready, StartFailed, Starting
from gateway.upstreams.failures import TRIES
from gateway.upstreams.launch import Fresh, Launcher, WarmParent
from gateway.upstreams.local import LocalPool
from gateway.upstreams.pool import Keep
from handler import machine
from handler.errors import NotAdmitted, UpstreamFailed
from handler.messages import Request, Visit, read
from tests import scripted_zygote
from tests.ready import until_ready
from tests.scripted_app import Crash, Pause, Script, answer, stream
from tests.scripted_worker import COMMAND, READY, Director, Worker

CHAT = Request("POST", "/v1/chat/completions", (("content-type", "application/json"),), b'{"stream":true}')
ROUTE = "POST /v1/chat/completions"
NEVER = 600.0
ONE_SLOT: tuple[tuple[str, ...], ...] = (("has_slots", "1"), ("ready",))
PAUSED = {ROUTE: stream("1", Pause("midway"), "2")}
REST = b"data: 2\n\ndata: [DONE]\n\n"

LAUNCHERS: dict[str, Callable[[Path], Launcher]] = {
    "fresh": lambda _: Fresh(COMMAND),
    "forked": lambda folder: WarmParent(scripted_zygote.COMMAND, folder / "parent.sock"),
}


def arriving() -> Request:
    """A request that comes now."""
    return replace(CHAT, visit=Visit())


class Stage:
    """A pool, the director of its workers, and what it told."""

    def __init__(self, director: Director) -> None:
        self.director = director
        self.events: list[Event] = []
        self.pool: LocalPool
        self._heard = asyncio.Event()

    def tell(self, event: Event) -> None:
        """Hear `event`."""
        self.events.append(event)
        self._heard.set()

    async def until(self, kind: type[Event], count: int = 1) -> Event:
        """The `count`th event of that kind, once it was told."""
        while len(found := [event for event in self.events if isinstance(event, kind)]) < count:
            self._heard.clear()
            await self._heard.wait()
        return found[count - 1]

    def views(self, *states: str) -> list[WorkerView]:
        """The workers in these states."""
        return [view for view in self.pool.workers if view.state in states]

    def count(self, kind: type[Event]) -> int:
        """How many events of that kind were told."""
        return sum(isinstance(event, kind) for event in self.events)


@asynccontextmanager
async def stage(
    tmp_path: Path,
    *plays: tuple[object, object],
    scaling: Scaling = Scaling(max_workers=3),  # noqa: B008 - frozen
    devices: Devices | None = None,
    launcher: str = "fresh",
    back_off: Callable[[int], float] = lambda _: NEVER,
    hung_s: float = NEVER,
    environ: dict[str, str] | None = None,
    at_once: bool = False,
    start_timeout_s: float = NEVER,
    logs: Path | None = None,
) -> AsyncIterator[Stage]:
    """A pool whose nth worker plays the nth of `plays`."""
    async with AsyncExitStack() as stack:
        control = tmp_path / "control"
        director = await stack.enter_async_context(Director(control, *plays).listening())  # type: ignore[arg-type]
        on = Stage(director)
        keep = Keep(
            at_once=at_once,
            start_timeout_s=start_timeout_s,
            drain_timeout_s=NEVER,
            scaling=scaling,
            devices=devices or Devices(),
            logs=logs,
            tell=on.tell,
            back_off=back_off,
        )
        env = {**os.environ, "SCRIPT_CONTROL": str(control), **(environ or {})}
        on.pool = LocalPool(LAUNCHERS[launcher], env, keep, probe_every_s=0.05, hung_s=hung_s)
        await stack.enter_async_context(on.pool)
        yield on


def _parent(pid: int | None) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]


async def turns(holds: Callable[[], object]) -> None:
    """Let the loop turn until `holds`."""
    while not holds():  # noqa: ASYNC110 - a state has no event
        await asyncio.sleep(0)


async def started(on: Stage, number: int) -> list[Worker]:
    """`number` workers, ready, because so much waits for so long."""
    on.pool.want(number, NEVER)
    workers = [await on.director.worker() for _ in range(number)]
    await on.until(Ready, number)
    on.pool.want(0, 0.0)
    return workers


async def streaming(on: Stage, stack: AsyncExitStack) -> tuple[bytes, AsyncIterator[bytes]]:
    """A stream that has begun: its first frame, and the others."""
    reply = await stack.enter_async_context(on.pool.call(arriving()))
    return await anext(reply.frames), reply.frames


@pytest.mark.parametrize("launcher", LAUNCHERS)
async def test_from_none_to_several_and_back(tmp_path: Path, launcher: str) -> None:
    """The first request has one started, those that it won't take have others; idle, all of them go."""
    scaling = Scaling(max_workers=3, idle_timeout_s=NEVER)
    plays = [(ONE_SLOT, {ROUTE: answer({})})] * 3
    async with stage(tmp_path, *plays, scaling=scaling, launcher=launcher) as on:
        assert (on.pool.capacity, list(on.pool.workers), on.events) == (0, [], [])
        on.pool.want(9, 0.0)
        await on.until(Ready)
        assert on.count(Starting) == 1
        on.pool.want(9, NEVER)  # they have waited for long
        await on.until(Ready, 3)
        assert (on.pool.capacity, on.pool.free, on.count(Starting)) == (3, 3, 3)
        on.pool.want(0, 0.0)
        on.pool.rescale(replace(scaling, idle_timeout_s=0.0))
        for number in (1, 2, 3):
            ended = await on.until(Ended, number)
            assert isinstance(ended, Ended)
            assert ended.expected
        assert [(view.state, view.in_flight, view.log_tail) for view in on.pool.workers] == [
            ("ended", 0, ())
        ] * 3


async def test_the_least_loaded_is_asked(tmp_path: Path) -> None:
    """What it has room for counts; who is full is asked only when all are."""
    two_slots = (("has_slots", "2"), ("ready",))
    plays = [
        (ONE_SLOT, {ROUTE: [stream("a", Pause("x"))] * 2}),
        (two_slots, {ROUTE: [stream("b", Pause("x"))] * 2}),
    ]
    async with stage(tmp_path, *plays) as on, AsyncExitStack() as stack:
        await started(on, 2)
        assert (on.pool.capacity, on.pool.free) == (3, 3)
        said = [(await streaming(on, stack))[0] for _ in range(4)]
        assert on.pool.free == 0
        assert sorted(said[:3]) == [b"data: a\n\n", b"data: b\n\n", b"data: b\n\n"]
        assert [view.in_flight for view in on.pool.workers] == [2, 2]


async def test_a_worker_that_is_retired_finishes_what_it_holds(tmp_path: Path) -> None:
    """It is asked no more, and ends when its last stream has, however long that takes."""
    scaling = Scaling(max_workers=2, idle_timeout_s=NEVER)
    async with stage(tmp_path, (ONE_SLOT, PAUSED), (ONE_SLOT, PAUSED), scaling=scaling) as on:
        workers = await started(on, 2)
        async with AsyncExitStack() as stack:
            streams = [await streaming(on, stack) for _ in workers]
            on.pool.rescale(Scaling(max_workers=1))
            await turns(lambda: on.views("retiring"))
            (retiring,) = on.views("retiring")
            assert (retiring.in_flight, on.pool.capacity) == (1, 1)
            for worker in workers:
                worker.open("midway")
            for first, frames in streams:
                assert (first, b"".join([frame async for frame in frames])) == (b"data: 1\n\n", REST)
        ended = await on.until(Ended)
        assert ended == Ended(retiring.id, "it exited with code 0", expected=True)
        assert [view.state for view in on.pool.workers] == ["ready", "ended"]


async def test_a_worker_that_is_retired_is_taken_back_if_it_is_needed(tmp_path: Path) -> None:
    """Nothing is started for what one that is still there can do."""
    scaling = Scaling(max_workers=2, idle_timeout_s=NEVER)
    async with stage(tmp_path, (ONE_SLOT, PAUSED), (ONE_SLOT, PAUSED), scaling=scaling) as on:
        workers = await started(on, 2)
        async with AsyncExitStack() as stack:
            for _ in workers:
                await streaming(on, stack)
            on.pool.rescale(Scaling(max_workers=1))
            await turns(lambda: on.views("retiring"))
            on.pool.rescale(scaling)
            on.pool.want(1, NEVER)
            await turns(lambda: len(on.views("ready")) == 2)
        assert (on.pool.free, on.count(Starting), on.count(Ended)) == (2, 2, 0)


@pytest.mark.parametrize("launcher", LAUNCHERS)
async def test_a_hung_worker_is_killed_and_replaced(tmp_path: Path, launcher: str) -> None:
    """What had begun there ends with an error, what had not is answered by another; nobody else notices."""
    hangs = {ROUTE: [stream("1", Pause("midway")), Script((Pause("before"),))]}
    plays = [(READY, hangs), (READY, {ROUTE: answer({"id": "b"})})]
    scaling = Scaling(max_workers=1)
    async with (
        stage(tmp_path, *plays, scaling=scaling, launcher=launcher) as on,
        AsyncExitStack() as stack,
    ):
        (worker,) = await started(on, 1)
        _, frames = await streaming(on, stack)
        front = Admission(on.pool, limit=9, queue_timeout_s=NEVER, keep_alive_s=0)

        async def ask() -> bytes:
            async with front.call(arriving()) as reply:
                return await read(reply)

        asking = asyncio.create_task(ask())
        await worker.saw("paused", "before")
        on.pool._hung_s = 2.0  # for this worker: the machine may hold up another one for as long
        await worker.saw("probed", "", worker.events.count(("probed", "")) + 2)  # the second one knows it
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(UpstreamFailed) as failed:
            await anext(frames)
        on.pool._hung_s = NEVER
        assert not isinstance(failed.value, WorkerLost)
        assert await asking == b'{"id": "b"}'
        ended = await on.until(Ended)
        assert ended == Ended(on.views("ended")[0].id, "it has not answered for 2 s", expected=False)


async def test_a_worker_that_is_busy_does_not_hang(tmp_path: Path) -> None:
    """An answer may take as long as it likes: what is looked for is that of the probe."""
    async with stage(tmp_path, (READY, {ROUTE: Script((Pause("computing"),))}), hung_s=20.0) as on:
        (worker,) = await started(on, 1)

        async def ask() -> int:
            async with on.pool.call(arriving()) as reply:
                return reply.status

        asking = asyncio.create_task(ask())
        await worker.saw("paused", "computing")
        await worker.saw("probed", "", worker.events.count(("probed", "")) + 3)
        worker.open("computing")
        assert (await asking, on.count(Ended)) == (200, 0)


async def test_one_bad_start_stops_no_other(tmp_path: Path) -> None:
    """The others serve, nobody is refused, and it is tried again after a while."""
    plays: list[tuple[object, object]] = [(ONE_SLOT, {}), ([("exit", "70")], {}), (ONE_SLOT, {})]
    async with stage(tmp_path, *plays, scaling=Scaling(max_workers=2), back_off=lambda _: 0.05) as on:
        on.pool.want(2, NEVER)
        failed = await on.until(StartFailed)
        assert isinstance(failed, StartFailed)
        assert (failed.reason, failed.again_in_s, failed.permanent) == ("the engine failed", 0.05, False)
        await on.until(Ready, 2)
        assert on.pool.refusal is None
        assert [view.state for view in on.pool.workers] == ["ready", "ready", "failed"]


async def test_after_so_many_failures_only_a_request_has_another_started(tmp_path: Path) -> None:
    """Though one is to be there always: until then the endpoint says what is wrong."""
    waits = dict.fromkeys(range(1, TRIES), 0.0)
    plays: list[tuple[object, object]] = [([("exit", "70")], {})] * TRIES
    scaling = Scaling(min_workers=1, max_workers=2)
    async with stage(
        tmp_path, *plays, (READY, {}), scaling=scaling, back_off=lambda failures: waits.get(failures, 0.2)
    ) as on:
        await on.until(StartFailed, TRIES)
        refusal = on.pool.refusal
        assert refusal is not None
        assert (refusal.code, refusal.message) == (
            "worker_start_failed",
            "The worker could not start: the engine failed.",
        )
        await turns(lambda: on.pool.refusal is None)
        for _ in range(9):
            await asyncio.sleep(0)
        assert on.count(Starting) == TRIES
        await until_ready(on.pool)


async def test_workers_that_die_before_they_have_answered_anything_are_no_loop(tmp_path: Path) -> None:
    """The first is replaced at once, the others after a while, and then those who wait hear why."""
    plays = [(READY, {ROUTE: Script((Crash(),))})] * TRIES
    waits: list[int] = []

    def back_off(failures: int) -> float:
        waits.append(failures)
        return 0.01 if failures < TRIES - 1 else NEVER

    async with stage(tmp_path, *plays, scaling=Scaling(max_workers=1), back_off=back_off) as on:
        for _ in range(TRIES):
            await until_ready(on.pool)
            with pytest.raises(WorkerLost):
                async with on.pool.call(arriving()):
                    pass
        await on.until(StartFailed)
        assert waits == [1, 2, 3, 4]
        with pytest.raises(
            NotAdmitted, match="5 in a row ended before they had answered anything: it was ended by SIGKILL"
        ):
            await until_ready(on.pool)


@pytest.mark.parametrize("launcher", LAUNCHERS)
async def test_the_end_of_its_output_is_in_the_error(tmp_path: Path, launcher: str) -> None:
    """Without secrets; all of it is in the file of that worker."""
    lines = [("write", f"line {number}") for number in range(5)]
    start = [*lines, ("write", "401 for hf_very_secret"), ("exit", "70")]
    async with stage(
        tmp_path,
        (start, {}),
        launcher=launcher,
        environ={"HF_TOKEN": "hf_very_secret"},
        logs=tmp_path / "logs",
    ) as on:
        with pytest.raises(NotAdmitted) as refused:
            await until_ready(on.pool)
        assert refused.value.message == (
            "The worker could not start: the engine failed.\n"
            "Its output ends with:\nline 1\nline 2\nline 3\nline 4\n401 for [hidden]"
        )
        (view,) = on.pool.workers
        assert view.log_tail == (*(f"line {number}" for number in range(5)), "401 for [hidden]")
        assert view.log == tmp_path / "logs" / f"{view.id}.log"
        assert view.log.read_text().splitlines() == list(view.log_tail)


async def test_its_reason_is_told_once(tmp_path: Path) -> None:
    """It has written it too, over several lines and last."""
    said = ("read config.json", "firsttoken: bad settings:", "  - DTYPE='int3'", "  - SEED='x'")
    why = ("say_why", "bad settings: DTYPE='int3'; SEED='x'", "78")
    start = (*(("write", line) for line in said), why, ("exit", "78"))
    async with stage(tmp_path, (start, {})) as on:
        with pytest.raises(NotAdmitted) as refused:
            await until_ready(on.pool)
        assert refused.value.message == (
            "The worker could not start: bad settings: DTYPE='int3'; SEED='x'.\n"
            "Its output ends with:\nread config.json"
        )


async def test_a_parent_that_ends_says_why(tmp_path: Path) -> None:
    """Its output is all that there is of the worker which it has not forked."""
    broken = ("sh", "-c", "echo no module named torch >&2; exit 1")
    keep = Keep(at_once=False, start_timeout_s=NEVER, drain_timeout_s=NEVER)
    async with LocalPool(
        lambda folder: WarmParent(broken, folder / "parent.sock"), os.environ, keep
    ) as broken_one:
        with pytest.raises(NotAdmitted) as refused:
            await until_ready(broken_one)
    assert (
        "the warm parent exited with code 1.\nIts output ends with:\nno module named torch"
        in refused.value.message
    )


async def test_logs_of_those_that_ended_long_ago_go(tmp_path: Path) -> None:
    """Also those of an earlier gateway."""
    logs = tmp_path / "logs"
    logs.mkdir()
    for number in range(8):
        (logs / f"worker-{number}-00000000.log").touch()
        os.utime(logs / f"worker-{number}-00000000.log", (number, number))
    async with stage(tmp_path, logs=logs):
        assert sorted(file.name[:8] for file in logs.iterdir()) == [
            f"worker-{number}" for number in range(3, 8)
        ]


async def test_each_worker_has_devices_of_its_own(tmp_path: Path) -> None:
    """As many as its settings want, out of those of all pools; what is too much to ask for is clamped."""
    devices = Devices("0123")
    async with stage(
        tmp_path,
        (ONE_SLOT, {}),
        (ONE_SLOT, {}),
        scaling=Scaling(max_workers=9),
        devices=devices,
        environ={"TENSOR_PARALLEL_SIZE": "2", "CUDA_VISIBLE_DEVICES": "not these"},
    ) as on:
        assert on.pool.scaling.max_workers == 2
        workers = await started(on, 2)
        assert [worker.env["CUDA_VISIBLE_DEVICES"] for worker in workers] == ["0,1", "2,3"]
        assert [view.devices for view in on.pool.workers] == [("0", "1"), ("2", "3")]
        assert "SHARED_BY" not in workers[0].env
    assert devices.take(4, "whoever comes next") == ("0", "1", "2", "3")


async def test_too_few_devices_are_a_failed_start(tmp_path: Path) -> None:
    """For ever: it is said at once, and nothing is started."""
    environ = {"TENSOR_PARALLEL_SIZE": "8"}
    async with stage(tmp_path, devices=Devices("01"), environ=environ, at_once=True) as on:
        failed = await on.until(StartFailed)
        assert failed == StartFailed(
            "worker-1", "it wants 8 devices, and there are 2 here", 75, permanent=True, again_in_s=NEVER
        )
        with pytest.raises(NotAdmitted, match="it wants 8 devices, and there are 2 here"):
            await until_ready(on.pool)


async def test_two_pools_share_the_devices(tmp_path: Path) -> None:
    """One that finds none waits, and the other lets an idle worker go for it after a cold start."""
    devices = Devices("0")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with (
        stage(tmp_path / "a", (READY, {}), devices=devices) as first,
        stage(tmp_path / "b", (READY, {}), devices=devices) as second,
    ):
        await started(first, 1)
        await until_ready(second.pool)
        assert [view.devices for view in second.pool.workers] == [("0",)]
        ended = await first.until(Ended)
        assert isinstance(ended, Ended)
        assert ended.expected


async def test_on_a_cpu_workers_are_told_that_they_share_it(tmp_path: Path) -> None:
    """One alone is not."""
    plays: Sequence[tuple[object, object]] = [(READY, {})]
    async with stage(tmp_path, *plays, scaling=Scaling(max_workers=3)) as on:
        (worker,) = await started(on, 1)
        assert worker.env["SHARED_BY"] == "3"
        assert worker.env.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")
    async with stage(tmp_path, *plays, scaling=Scaling(max_workers=1)) as on:
        (worker,) = await started(on, 1)
        assert "SHARED_BY" not in worker.env


async def test_all_workers_of_a_pool_are_forked_by_one_parent(tmp_path: Path) -> None:
    """Also those that are started at the same moment."""
    async with stage(
        tmp_path, *[(READY, {})] * 3, scaling=Scaling(min_workers=3, max_workers=3), launcher="forked"
    ) as on:
        await on.until(Ready, 3)
        parents = {_parent(view.pid) for view in on.pool.workers}
        assert len(parents) == 1
        assert parents != {str(os.getpid())}


async def test_a_worker_that_was_started_at_once_goes_when_nobody_needs_it(tmp_path: Path) -> None:
    """And none comes in its place."""
    scaling = Scaling(max_workers=1, idle_timeout_s=0.0)
    async with stage(tmp_path, (READY, {}), scaling=scaling, at_once=True) as on:
        ended = await on.until(Ended)
        assert isinstance(ended, Ended)
        assert ended.expected
        for _ in range(9):
            await asyncio.sleep(0)
        assert ([view.state for view in on.pool.workers], on.count(Starting)) == (["ended"], 1)


async def test_a_parent_that_hangs_is_replaced(tmp_path: Path) -> None:
    """The start that it has held up fails, and the next has another parent."""

    def back_off(_: int) -> float:
        on.pool._how = patient  # only the start that is held up is short of time
        return 0.0

    async with stage(
        tmp_path,
        (ONE_SLOT, {}),
        (ONE_SLOT, {}),
        launcher="forked",
        back_off=back_off,
    ) as on:
        await started(on, 1)
        parent = int(_parent(on.pool.workers[0].pid))
        os.kill(parent, signal.SIGSTOP)
        patient = on.pool._how
        on.pool._how = replace(patient, start_timeout_s=1.0)
        on.pool.want(2, NEVER)
        failed = await on.until(StartFailed)
        assert isinstance(failed, StartFailed)
        assert failed.reason == "it was not ready within 1 s"
        await on.until(Ready, 2)
        assert on.count(StartFailed) == 1
        assert int(_parent(on.views("ready")[1].pid)) != parent
        assert on.count(Ended) == 0


async def test_no_worker_is_started_into_memory_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one takes that is there, the next must find; the first is nobody's measure."""
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 1 << 20)
    monkeypatch.setattr(pool, "MEMORY_RETRY_S", 0.05)
    async with stage(tmp_path, (ONE_SLOT, {}), (ONE_SLOT, {})) as on:
        await started(on, 1)
        on.pool.want(9, NEVER)
        for _ in range(9):
            await asyncio.sleep(0)
        assert on.count(Starting) == 1
        monkeypatch.undo()
        on.pool.want(9, NEVER)
        await on.until(Ready, 2)
