"""The local pool over real worker processes and sockets, with a scripted worker."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.endpoints.admission import Admission
from gateway.upstreams import WorkerLost
from gateway.upstreams.events import Ended, Event, Progress, Ready, StartFailed, Starting
from gateway.upstreams.launch import Fresh, Launcher, WarmParent
from gateway.upstreams.local import LocalPool
from gateway.upstreams.pool import Keep
from handler.errors import NotAdmitted, UpstreamFailed
from handler.messages import Request, Visit, read
from tests import scripted_zygote
from tests.ready import until_ready
from tests.scripted_app import Crash, Pause, Say, Script, answer, stream
from tests.scripted_worker import COLD_START, COMMAND, READY, Director, Worker

CHAT = Request("POST", "/v1/chat/completions", (("content-type", "application/json"),), b'{"stream":true}')


def arriving(request: Request) -> Request:
    """`request`, as if it came now: what it may wait counts from its arrival."""
    return replace(request, visit=Visit())


ROUTE = "POST /v1/chat/completions"
NEVER = 60.0


class Launching:
    """How the workers of this test come to be; the fixture below says it."""

    begin: Callable[[Path], Launcher]


@pytest.fixture(autouse=True, params=["fresh", "forked"])
def _both_launchers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a worker is started from nothing or forked makes no difference to anybody."""
    kinds: dict[str, Callable[[Path], Launcher]] = {
        "fresh": lambda _: Fresh(COMMAND),
        "forked": lambda folder: WarmParent(scripted_zygote.COMMAND, folder / "parent.sock"),
    }
    monkeypatch.setattr(Launching, "begin", staticmethod(kinds[request.param]), raising=False)


class Stage:
    """An upstream, the director of its workers, and what it told."""

    def __init__(
        self, upstream: LocalPool, director: Director, events: list[Event], heard: asyncio.Event
    ) -> None:
        self.upstream = upstream
        self.director = director
        self.events = events
        self._heard = heard

    async def until(self, holds: Callable[[Event], bool]) -> Event:
        """The first event for which `holds`, once it was told."""
        while True:
            for event in self.events:
                if holds(event):
                    return event
            self._heard.clear()
            await self._heard.wait()


@asynccontextmanager
async def stage(
    tmp_path: Path,
    *plays: tuple[object, object],
    at_once: bool = False,
    start_timeout_s: float = NEVER,
    drain_timeout_s: float = NEVER,
    back_off: Callable[[int], float] = lambda _: NEVER,
    environ: dict[str, str] | None = None,
) -> AsyncIterator[Stage]:
    """An upstream whose nth worker plays the nth of `plays`."""
    events: list[Event] = []
    heard = asyncio.Event()

    def tell(event: Event) -> None:
        assert event.worker.startswith("worker-")
        events.append(replace(event, worker=""))
        heard.set()

    async with AsyncExitStack() as stack:
        director = await stack.enter_async_context(Director(tmp_path / "control", *plays).listening())  # type: ignore[arg-type]
        upstream = LocalPool(
            Launching.begin,
            {**os.environ, "SCRIPT_CONTROL": str(director.path), **(environ or {})},
            Keep(
                at_once=at_once,
                start_timeout_s=start_timeout_s,
                drain_timeout_s=drain_timeout_s,
                tell=tell,
                back_off=back_off,
            ),
        )
        await stack.enter_async_context(upstream)
        yield Stage(upstream, director, events, heard)


async def ready(on: Stage) -> Worker:
    """The next worker, once it is ready."""
    waiting = asyncio.create_task(until_ready(on.upstream))
    worker = await on.director.worker()
    await waiting
    return worker


async def turns(holds: Callable[[], bool]) -> None:
    """Let the loop turn until `holds`."""
    while not holds():  # noqa: ASYNC110 - a state has no event
        await asyncio.sleep(0)


async def readable(fd: int) -> None:
    """Return once `fd` can be read."""
    event = asyncio.Event()
    asyncio.get_running_loop().add_reader(fd, event.set)
    await event.wait()
    asyncio.get_running_loop().remove_reader(fd)


def gone(pid: int) -> bool:
    """Whether no process has that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


async def test_worker_starts_on_the_first_request_and_answers(tmp_path: Path) -> None:
    """Nothing is started until somebody waits; then status, headers and bytes pass unchanged."""
    script = answer({"id": "a"}, 201, (("x-worker", "1"), ("connection", "keep-alive")))
    async with stage(tmp_path, (READY, {"GET /v1/models": script})) as on:
        assert (on.upstream.workers, on.events) == ([], [])
        await ready(on)
        assert on.upstream.ready
        async with on.upstream.call(Request("GET", "/v1/models")) as reply:
            assert (reply.status, reply.header("x-worker"), await read(reply)) == (201, "1", b'{"id": "a"}')
            assert not {"connection", "transfer-encoding", "date", "server"} & {
                name for name, _ in reply.headers
            }
    assert not on.upstream.ready


async def test_start_is_told_step_by_step(tmp_path: Path) -> None:
    """What the worker says of its start is heard, and what it measured."""
    async with stage(tmp_path, (READY, {}), at_once=True) as on:
        done = await on.until(lambda event: isinstance(event, Ready))
        assert on.events[:2] == [Starting("", 1), Progress("", "loading weights")]
        assert isinstance(done, Ready)
        assert done.cold_start == COLD_START
    assert on.events[3:] == [Ended("", "it exited with code 0", expected=True)]


async def test_worker_has_the_environment_but_not_what_is_the_gateways(tmp_path: Path) -> None:
    """A worker gets its socket in a private folder, and neither key nor port."""
    environ = {"HOST": "0.0.0.0", "PORT": "1", "API_KEY": "secret", "MODEL_NAME": "m"}
    async with stage(tmp_path, (READY, {}), environ=environ) as on:
        worker = await ready(on)
        env = worker.env
        assert {"HOST", "PORT", "API_KEY"}.isdisjoint(env)
        assert (env["PLATFORM"], env["MODEL_NAME"]) == ("http", "m")
        folder = Path(env["UDS"]).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not folder.exists()


async def test_credentials_and_hop_by_hop_headers_stay_in_the_gateway(tmp_path: Path) -> None:
    """The worker sees what it needs: type, length, body, path and query as they were."""
    scripts = {"POST /v1/a b%2F": answer({}), ROUTE: answer({})}
    async with stage(tmp_path, (READY, scripts)) as on:
        worker = await ready(on)
        headers = (
            ("authorization", "Bearer k"),
            ("cookie", "c"),
            ("x-api-key", "k"),
            ("origin", "o"),
            ("te", "t"),
        )
        request = Request(
            "POST", "/v1/a b%2F", (*headers, ("x-request-id", "r")), b"x" * 1_000_000, "q=1%202"
        )
        async with on.upstream.call(request) as reply:
            assert await read(reply) == b"{}"
        await worker.saw("request", "POST /v1/a b%2F")


async def test_stream_arrives_frame_by_frame(tmp_path: Path) -> None:
    """A frame is passed on when it is made, not when the next one is."""
    async with stage(tmp_path, (READY, {ROUTE: stream("1", Pause("between"), "2")})) as on:
        worker = await ready(on)
        async with on.upstream.call(arriving(CHAT)) as reply:
            assert (reply.streams, await anext(reply.frames)) == (True, b"data: 1\n\n")
            worker.open("between")
            assert await read(reply) == b"data: 2\n\ndata: [DONE]\n\n"


async def test_workers_have_precedence_over_the_loop(tmp_path: Path) -> None:
    """It does not push them off their cores as it wakes; they are as any other process, the second too."""
    async with stage(tmp_path, (READY, {}), (READY, {})) as on:
        first = await ready(on)
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
        assert os.sched_getscheduler(first.pid) == os.SCHED_OTHER
        first.kill()
        await on.until(lambda event: isinstance(event, Ended))
        second = await ready(on)
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
        assert os.sched_getscheduler(second.pid) == os.SCHED_OTHER


async def test_a_large_frame_arrives_whole(tmp_path: Path) -> None:
    """One that takes many reads leaves in one piece."""
    async with stage(tmp_path, (READY, {ROUTE: stream("1", Pause("between"), "h" * 300_000)})) as on:
        worker = await ready(on)
        async with on.upstream.call(arriving(CHAT)) as reply:
            assert await anext(reply.frames) == b"data: 1\n\n"
            worker.open("between")
            assert (await anext(reply.frames)).startswith(b"data: " + b"h" * 300_000 + b"\n\n")


async def test_leaving_a_stream_is_seen_by_the_worker_at_once(tmp_path: Path) -> None:
    """Generation stops because the connection is closed."""
    async with stage(tmp_path, (READY, {ROUTE: stream("1", Pause("generating"))})) as on:
        worker = await ready(on)
        async with on.upstream.call(arriving(CHAT)) as reply:
            await anext(reply.frames)
        await worker.saw("disconnected", ROUTE)


async def test_leaving_before_the_answer_is_seen_by_the_worker_at_once(tmp_path: Path) -> None:
    """So it is for a request without a stream, which says nothing until it is done."""
    async with stage(tmp_path, (READY, {ROUTE: Script((Pause("generating"),))})) as on:
        worker = await ready(on)

        async def ask() -> None:
            async with on.upstream.call(arriving(CHAT)):
                raise AssertionError("the worker has answered nothing")

        task = asyncio.create_task(ask())
        await worker.saw("paused", "generating")
        task.cancel()
        await worker.saw("disconnected", ROUTE)


async def test_worker_killed_in_mid_stream_fails_what_it_held(tmp_path: Path) -> None:
    """The stream ends with an error, and the next request gets a new worker."""
    plays = [(READY, {ROUTE: stream("1", Pause("generating"))}), (READY, {ROUTE: stream("2")})]
    async with stage(tmp_path, *plays) as on:
        first = await ready(on)
        async with on.upstream.call(arriving(CHAT)) as reply:
            assert await anext(reply.frames) == b"data: 1\n\n"
            first.kill()
            with pytest.raises(UpstreamFailed) as failed:
                await anext(reply.frames)
        assert not isinstance(failed.value, WorkerLost)
        await on.until(lambda event: isinstance(event, Ended))
        assert on.events[-1] == Ended("", "it was ended by SIGKILL", expected=False)
        assert (on.upstream.ready, on.upstream.refusal) == (False, None)
        second = await ready(on)
        assert second.pid != first.pid
        async with on.upstream.call(arriving(CHAT)) as reply:
            assert await read(reply) == b"data: 2\n\ndata: [DONE]\n\n"


@pytest.mark.parametrize("before", [Script((Crash(),)), stream(Crash())], ids=["before status", "stream"])
async def test_worker_killed_before_the_first_byte_is_replaced_silently(
    tmp_path: Path, before: Script
) -> None:
    """Admission asks the next worker, and the client sees an answer."""
    async with stage(tmp_path, (READY, {ROUTE: before}), (READY, {ROUTE: answer({"id": "b"})})) as on:
        admission = Admission(on.upstream, limit=9, queue_timeout_s=NEVER, keep_alive_s=0)
        async with admission.call(arriving(CHAT)) as reply:
            assert (reply.status, await read(reply)) == (200, b'{"id": "b"}')
        assert [type(event) for event in on.events if not isinstance(event, Progress)] == [
            Starting,
            Ready,
            Ended,
            Starting,
            Ready,
        ]


async def test_worker_that_dies_is_replaced_at_once_if_it_started_at_once(tmp_path: Path) -> None:
    """`START=now` keeps one warm."""
    async with stage(tmp_path, (READY, {}), (READY, {}), at_once=True) as on:
        worker = await on.director.worker()
        await on.until(lambda event: isinstance(event, Ready))
        worker.kill()
        await on.until(lambda event: event == Starting("", 2))


async def test_workers_own_processes_end_with_it(tmp_path: Path) -> None:
    """The whole group is killed: an engine core does not outlive its worker."""
    start = [("child",), *READY]
    async with stage(tmp_path, (start, {})) as on:
        worker = await ready(on)
        child = os.pidfd_open(next(int(name) for what, name in worker.events if what == "child"))
        worker.kill()
        await readable(child)  # says pidfd_open(2) of a process that has ended
        os.close(child)


async def test_failed_start_is_told_to_all_who_wait_and_then_rests(tmp_path: Path) -> None:
    """The reason reaches everyone at once; until the rest is over nobody is kept waiting."""
    start = [("status", "loading weights"), ("exit", "66")]
    async with stage(tmp_path, (start, {})) as on:
        waits = [asyncio.create_task(until_ready(on.upstream)) for _ in range(3)]
        for refused in await asyncio.gather(*waits, return_exceptions=True):
            assert isinstance(refused, NotAdmitted)
            assert (refused.status, refused.code) == (503, "worker_start_failed")
            assert refused.message == "The worker could not start: the model was not found."
            assert refused.headers == (("retry-after", str(int(NEVER))),)
        assert on.upstream.refusal is not None
        with pytest.raises(NotAdmitted):
            await until_ready(on.upstream)
        assert on.events[-1] == StartFailed(
            "", "the model was not found", 66, permanent=True, again_in_s=NEVER
        )
        assert on.upstream.starts == 1


async def test_workers_own_words_are_the_reason(tmp_path: Path) -> None:
    """What the worker says with `EXIT_STATUS` is better than what its exit code means."""
    start = [("say_why", "no model `nope` on the hub.", "66"), ("exit", "66")]
    async with stage(tmp_path, (start, {})) as on:
        with pytest.raises(NotAdmitted, match=r"could not start: no model `nope` on the hub\.$"):
            await until_ready(on.upstream)


async def test_start_is_tried_again_after_the_rest(tmp_path: Path) -> None:
    """One failure is not for ever."""
    async with stage(tmp_path, ([("exit", "75")], {}), (READY, {}), back_off=lambda _: 0.0) as on:
        with pytest.raises(NotAdmitted):
            await until_ready(on.upstream)
        await turns(lambda: on.upstream.refusal is None)
        await ready(on)


async def test_command_that_cannot_be_run_is_a_failed_start(tmp_path: Path) -> None:
    """Not a crash of the gateway."""
    upstream = LocalPool(
        lambda _: Fresh([str(tmp_path / "nothing")]),
        {},
        Keep(at_once=False, start_timeout_s=NEVER, drain_timeout_s=NEVER),
    )
    async with upstream:
        with pytest.raises(NotAdmitted, match="nothing: No such file or directory"):
            await until_ready(upstream)


async def test_start_has_a_deadline(tmp_path: Path) -> None:
    """A worker that hangs is killed, and who waits hears of it."""
    async with stage(tmp_path, ([("pause", "for ever")], {}), start_timeout_s=1.5) as on:
        with pytest.raises(NotAdmitted, match=r"it was not ready within 1\.5 s"):
            await until_ready(on.upstream)


async def test_closing_lets_a_stream_finish(tmp_path: Path) -> None:
    """SIGTERM reaches the worker as a drain; what runs ends whole."""
    async with stage(tmp_path, (READY, {ROUTE: stream("1", Pause("generating"), "2")})) as on:
        worker = await ready(on)
        async with on.upstream.call(arriving(CHAT)) as reply:
            await anext(reply.frames)
            closing = asyncio.create_task(on.upstream.close())
            await worker.saw("stopping")
            with pytest.raises(NotAdmitted):
                await until_ready(on.upstream)
            worker.open("generating")
            assert await read(reply) == b"data: 2\n\ndata: [DONE]\n\n"
        await closing
        assert gone(worker.pid)


async def test_closing_kills_what_does_not_drain(tmp_path: Path) -> None:
    """The drain has a deadline."""
    async with stage(tmp_path, (READY, {ROUTE: stream("1", Pause("for ever"))}), drain_timeout_s=0) as on:
        worker = await ready(on)
        async with on.upstream.call(arriving(CHAT)) as reply:
            await anext(reply.frames)
            await on.upstream.close()
            assert gone(worker.pid)
            with pytest.raises(UpstreamFailed):
                await read(reply)


async def test_closing_while_starting_turns_waiters_away(tmp_path: Path) -> None:
    """Nobody is left waiting for a worker that never comes."""
    async with stage(tmp_path, ([("pause", "loading")], {})) as on:
        waiting = asyncio.create_task(until_ready(on.upstream))
        worker = await on.director.worker()
        await worker.saw("paused", "loading")
        await on.upstream.close()
        with pytest.raises(NotAdmitted, match="stopping"):
            await waiting
        assert gone(worker.pid)


async def test_worker_that_leaves_on_its_own_gets_no_more(tmp_path: Path) -> None:
    """Who comes while it drains waits for the next one."""
    plays = [(READY, {ROUTE: stream("1", Pause("generating"))}), (READY, {ROUTE: answer({"id": "b"})})]
    async with stage(tmp_path, *plays) as on:
        first = await ready(on)
        async with on.upstream.call(arriving(CHAT)) as reply:
            await anext(reply.frames)
            os.kill(first.pid, signal.SIGTERM)
            await turns(lambda: not on.upstream.ready)
            second = asyncio.create_task(ready(on))
            first.open("generating")
            assert await read(reply) == b"data: [DONE]\n\n"
        await second
        async with on.upstream.call(arriving(CHAT)) as reply:
            assert json.loads(await read(reply)) == {"id": "b"}


async def test_request_that_a_leaving_worker_refuses_goes_to_the_next(tmp_path: Path) -> None:
    """It was sent before the worker said that it stops: the client need not know."""
    refusal = Script((Pause("asked"), Say("{}")), 503)
    async with stage(tmp_path, (READY, {ROUTE: refusal}), (READY, {ROUTE: answer({"id": "b"})})) as on:
        worker = await ready(on)
        admission = Admission(on.upstream, limit=9, queue_timeout_s=NEVER, keep_alive_s=0)

        async def ask() -> bytes:
            async with admission.call(arriving(CHAT)) as reply:
                return await read(reply)

        asking = asyncio.create_task(ask())
        await worker.saw("paused", "asked")
        os.kill(worker.pid, signal.SIGTERM)
        await worker.saw("stopping")
        worker.open("asked")
        assert await asking == b'{"id": "b"}'
