"""Two gateway processes over one real PostgreSQL, while either and the database itself are killed.

Nothing that was accepted is lost, nothing is done or counted twice, and nothing hangs.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from tests import postgres
from tests.gateway_process import main_with, root_of, running
from tests.servers import KEY
from tests.steady_worker import PROMPT_TOKENS
from tests.until import LOOK_S

LEASE_S = 8.0
"""Less than the shipped one, so that a test need not wait so long, and more than a machine may stall."""
LONG_LEASE_S = 3600.0
"""Longer than any test: only a gateway's lock can tell that it is gone."""
QUICKER = (
    "import os; from gateway import instances; "
    "instances.LEASE_S, instances.BEAT_S = float(os.environ['LEASE_S']), 0.4; "
)
TOKENS = 30
CUT_TOKENS = 90
"""Of what is to be cut, and is waited for after that: long enough to be written down on its way."""
ENDLESS = 100_000
SLOTS = 10
"""Of each worker."""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}


@dataclass
class Gateway:
    """A process, and where it answers."""

    process: asyncio.subprocess.Process
    root: str
    session: aiohttp.ClientSession
    stderr: Path

    async def ask(self, method: str, path: str, **how: Any) -> tuple[int, Any]:
        """Status and body of an answer."""
        async with self.session.request(method, self.root + path, **how) as reply:
            body = await (reply.json() if reply.content_type == "application/json" else reply.read())
            if reply.status == 503:
                assert "retry-after" in reply.headers
            return reply.status, body

    async def submit(self, model: str, tokens: int = TOKENS, headers: Mapping[str, str] | None = None) -> str:
        """The id of a job, handed in until it is accepted."""
        asked = {"model": model, "messages": [], "max_tokens": tokens}
        body = {"input": {"openai_route": "/v1/chat/completions", "openai_input": asked}}
        while True:
            status, told = await self.ask(
                "POST", "/v2/local/run", json=body, headers={"idempotency-key": model, **(headers or {})}
            )
            if status == 200:
                return str(told["id"])
            assert status == 503, told
            await asyncio.sleep(LOOK_S)

    async def job(self, job_id: str) -> Mapping[str, Any]:
        """How a job stands."""
        while True:
            status, told = await self.ask("GET", f"/v2/local/status/{job_id}")
            if status == 200:
                found: Mapping[str, Any] = told
                return found
            assert status == 503, told
            await asyncio.sleep(LOOK_S)

    async def ended(self, job_id: str) -> Mapping[str, Any]:
        """How a job has ended."""
        job: Mapping[str, Any] = {}

        async def over() -> bool:
            nonlocal job
            job = await self.job(job_id)
            return job["status"] in ENDED

        await come(over)
        return job

    async def usage(self) -> list[Mapping[str, Any]]:
        """What was used, by model."""
        status, told = await self.ask("GET", "/admin/usage?group=model")
        assert status == 200, told
        rows: list[Mapping[str, Any]] = told["data"]
        return rows

    async def in_flight(self, number: int) -> None:
        """Return once its worker has so many."""
        await come(lambda: self._has(lambda busy: busy >= number))

    async def idle(self) -> None:
        """Return once its worker has none."""
        await come(lambda: self._has(lambda busy: not busy))

    async def _has(self, wanted: Callable[[int], bool]) -> bool:
        _, told = await self.ask("GET", "/admin/status")
        return wanted(told["endpoints"][0]["in_flight"])

    async def counted(self, models: int) -> list[Mapping[str, Any]]:
        """What was used, once it is on the account of so many models."""

        async def all_of_them() -> bool:
            return len(await self.usage()) >= models

        await come(all_of_them)
        return await self.usage()


async def come(holds: Callable[[], Awaitable[bool]]) -> None:
    """Return once `holds()`: another process has no event to wait for."""
    while not await holds():  # noqa: ASYNC110 - as above
        await asyncio.sleep(LOOK_S)


@asynccontextmanager
async def gateway(
    name: str, folder: Path, url: str, *, per_s: float = 15, lease_s: float = LEASE_S
) -> AsyncIterator[Gateway]:
    """One with a worker of its own; `files` are those of all in `folder`."""
    (folder / name).mkdir(exist_ok=True)
    (folder / "files").mkdir(exist_ok=True)
    with suppress(FileExistsError):
        (folder / name / "files").symlink_to(folder / "files")
    environ = {
        "DATA_DIR": str(folder / name),
        "DATABASE_URL": url,
        "MIN_WORKERS": "1",
        "MAX_CONCURRENCY": str(SLOTS),
        "QUEUE_LIMIT": "1000",
        "STEADY_TOKENS_PER_S": str(per_s),
        "VLLM_SKIP_MODEL_NAME_VALIDATION": "true",
        "LEASE_S": str(lease_s),
    }
    stderr = folder / f"{name}.stderr"
    program = main_with("tests.steady_worker", QUICKER)
    connector = aiohttp.TCPConnector(limit=0)
    try:
        async with (
            running(program, folder / name, environ, stderr=stderr) as process,
            aiohttp.ClientSession(headers={"authorization": f"Bearer {KEY}"}, connector=connector) as session,
        ):
            at = Gateway(process, await root_of(process, stderr), session, stderr)
            await at.in_flight(0)
            yield at
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                assert await process.wait() == 0
    finally:
        assert postgres.PASSWORD not in stderr.read_text()


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    """A server that these tests may stop."""
    try:
        with postgres.serving() as server:
            yield server
    except postgres.Missing as why:
        pytest.skip(str(why))


@asynccontextmanager
async def two(folder: Path, url: str, *, per_s: float = 15) -> AsyncIterator[tuple[Gateway, Gateway]]:
    """Two gateways over the database at `url`."""
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(gateway("a", folder, url, per_s=per_s))
        yield a, await stack.enter_async_context(gateway("b", folder, url, per_s=per_s))


@dataclass
class Stream:
    """One client's stream, of a model of its own, so that its tokens can be told from others'."""

    model: str
    tokens: int = TOKENS
    seen: int = 0
    whole: bool = False
    began: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self, at: Gateway, key: str = KEY) -> None:
        """Read to the end, whatever that is."""
        body = {"model": self.model, "messages": [], "max_tokens": self.tokens, "stream": True}
        url = f"{at.root}/v2/local/openai/v1/chat/completions"
        with suppress(aiohttp.ClientError):
            async with at.session.post(url, json=body, headers={"authorization": f"Bearer {key}"}) as reply:
                assert reply.status == 200
                async for line in reply.content:
                    self.seen += b'"content":"t"' in line
                    self.whole = self.whole or line == b"data: [DONE]\n"
                    if self.seen == self.tokens // 2:
                        self.began.set()
        self.began.set()


@asynccontextmanager
async def asking(url: str) -> AsyncIterator[Callable[[str], Awaitable[list[tuple[Any, ...]]]]]:
    """Answers statements with what is in the database at `url` then."""
    database = create_async_engine(url, isolation_level="AUTOCOMMIT")
    try:
        async with database.connect() as connection:

            async def ask(statement: str) -> list[tuple[Any, ...]]:
                return [tuple(row) for row in await connection.execute(text(statement))]

            yield ask
    finally:
        await database.dispose()


async def written_down(url: str, models: set[str]) -> None:
    """Return once the database has heard of a stream of each of `models` that is on its way."""
    async with asking(url) as ask:

        async def told() -> bool:
            return {(model,) for model in models} <= set(await ask("SELECT model FROM open_requests"))

        await come(told)


async def test_usage_is_exact_and_jobs_go_on_after_either_is_killed(
    tmp_path: Path, server: postgres.Server
) -> None:
    """Streams of the killed one are counted as far as they came, its jobs are finished by the other, once."""
    url = server.database()
    async with two(tmp_path, url) as (a, b):
        jobs = [await a.submit(f"job-{n}") for n in range(6)]
        streams = [Stream(f"stream-{n}", ENDLESS if n % 2 else TOKENS) for n in range(6)]
        reading = [asyncio.create_task(one.read(a if n % 2 else b)) for n, one in enumerate(streams)]
        await written_down(url, {one.model for one in streams[1::2]})
        a.process.kill()
        await asyncio.gather(*reading)
        ended = [await b.ended(job) for job in jobs]
        assert [job["status"] for job in ended] == ["COMPLETED"] * len(jobs)
        rows = {row["model"]: row for row in await b.counted(len(jobs) + len(streams))}
        for n in range(len(jobs)):
            row = rows[f"job-{n}"]
            assert (row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (
                1,
                PROMPT_TOKENS,
                TOKENS,
            )
        for stream in streams:
            row = rows[stream.model]
            assert row["requests"] == 1
            if stream.whole:
                assert (row["prompt_tokens"], row["completion_tokens"]) == (PROMPT_TOKENS, TOKENS)
            else:
                assert 0 < row["completion_tokens"] <= stream.seen + 1
        assert [stream.whole for stream in streams] == [True, False] * 3


async def test_a_gateway_that_is_killed_is_known_at_once_and_one_that_stands_still_is_not_taken_for_it(
    tmp_path: Path, server: postgres.Server
) -> None:
    """However long leases are, and though neither says a word; nor is one whose session the server ended."""
    url = server.database()
    async with AsyncExitStack() as stack:
        ask = await stack.enter_async_context(asking(url))
        known: set[str] = set()
        gateways: list[tuple[str, Gateway]] = []
        for name in ("killed", "still", "other"):
            at = await stack.enter_async_context(gateway(name, tmp_path, url, lease_s=LONG_LEASE_S))
            (instance,) = {row[0] for row in await ask("SELECT id FROM instances")} - known
            known.add(instance)
            gateways.append((instance, at))
        (killed_id, killed), (still_id, still), (_, other) = gateways

        async def held(instance: str) -> set[str]:
            begun = "SELECT id, instance FROM jobs WHERE state = 'IN_PROGRESS'"
            return {job for job, its in await ask(begun) if its == instance}

        async def all_begun() -> bool:
            return bool(await held(killed_id) and await held(still_id)) and not await ask(
                "SELECT id FROM jobs WHERE state <> 'IN_PROGRESS'"
            )

        async def locked() -> bool:
            locks = "SELECT classid::bigint << 32 | objid::bigint FROM pg_locks WHERE locktype = 'advisory'"
            wanted = {(int.from_bytes(bytes.fromhex(one), signed=True),) for one in known}
            return wanted <= set(await ask(locks))

        await come(locked)
        await ask(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'firsttoken'"
        )
        await come(locked)
        for at in (killed, still):  # now, so that none ends before it is to
            for number in range(3):
                await at.submit(f"{at.stderr.stem}-{number}", 2 * CUT_TOKENS)
        await come(all_begun)
        still.process.send_signal(signal.SIGSTOP)
        killed.process.kill()
        killed_at_s = asyncio.get_running_loop().time()
        lost, kept = await held(killed_id), await held(still_id)
        assert lost, "it had work to do"
        assert kept, "it has work to do"

        async def taken_off() -> bool:
            return (killed_id,) not in await ask("SELECT id FROM instances")

        await come(taken_off)
        waited_s = asyncio.get_running_loop().time() - killed_at_s
        print(f"a killed gateway was taken off the list after {waited_s:.2f} s")
        ended = [await other.ended(job) for job in lost]
        assert [(job["status"], job["retries"]) for job in ended] == [("COMPLETED", 1)] * len(lost)
        assert await held(still_id) == kept
        still.process.send_signal(signal.SIGCONT)
        ended = [await other.ended(job) for job in kept]
        assert [(job["status"], job.get("retries")) for job in ended] == [("COMPLETED", None)] * len(kept)


async def test_a_gateway_that_is_killed_and_started_again_goes_on_at_once(
    tmp_path: Path, server: postgres.Server
) -> None:
    """Its jobs are done and its streams counted, whatever lease its former self had."""
    url = server.database()
    async with gateway("a", tmp_path, url, lease_s=LONG_LEASE_S) as killed:
        jobs = [await killed.submit(f"job-{n}", CUT_TOKENS) for n in range(2)]
        stream = Stream("stream", CUT_TOKENS)
        reading = asyncio.create_task(stream.read(killed))
        await killed.in_flight(len(jobs) + 1)
        await written_down(url, {stream.model})
        killed.process.kill()
        await asyncio.gather(killed.process.wait(), reading)
    async with gateway("a", tmp_path, url, lease_s=LONG_LEASE_S) as again:
        started_at_s = asyncio.get_running_loop().time()
        counted = (await again.counted(1))[0]
        print(f"usage was counted {asyncio.get_running_loop().time() - started_at_s:.2f} s after the start")
        assert (counted["model"], counted["requests"]) == (stream.model, 1)
        assert 0 < counted["completion_tokens"] <= stream.seen + 1
        assert [(await again.ended(job))["status"] for job in jobs] == ["COMPLETED"] * len(jobs)


async def test_both_work_on_one_queue_and_hear_of_each_other(tmp_path: Path, server: postgres.Server) -> None:
    """Each job is done once; a key that one revokes the other refuses; a cancelled job stops anywhere."""
    async with two(tmp_path, server.database()) as (a, b):
        jobs = [await a.submit(f"shared-{n}") for n in range(40)]
        await asyncio.gather(a.in_flight(1), b.in_flight(1))
        ended = [await b.ended(job) for job in jobs]
        assert Counter(job["status"] for job in ended) == {"COMPLETED": len(jobs)}
        rows = await a.usage()
        assert Counter(row["requests"] for row in rows) == {1: len(jobs)}
        assert sum(row["completion_tokens"] for row in rows) == len(jobs) * TOKENS
        held = await asyncio.gather(*(a.job(job) for job in jobs))
        assert not any(job.get("retries") for job in held)

        status, made = await a.ask("POST", "/admin/keys", json={"name": "shared"})
        assert status == 201
        headers = {"authorization": f"Bearer {made['key']}"}
        loop = asyncio.get_running_loop()

        async def heard(wanted: int) -> float:
            began_s = loop.time()

            async def so() -> bool:
                return (await b.ask("GET", "/v2/local/health", headers=headers))[0] == wanted

            await come(so)
            return loop.time() - began_s

        await heard(200)
        theirs = [await b.submit(f"theirs-{n}", tokens=100_000, headers=headers) for n in range(40)]
        await asyncio.gather(a.in_flight(1), b.in_flight(1))
        assert (await a.ask("DELETE", f"/admin/keys/{made['id']}"))[0] == 200
        print(f"a key revoked on one gateway was refused by the other after {await heard(401):.2f} s")
        ended = [await b.ended(job) for job in theirs]
        assert Counter(job["status"] for job in ended) == {"CANCELLED": len(theirs)}
        assert {job["error"] for job in ended} == {"The key of the job is valid no more."}
        await asyncio.gather(a.idle(), b.idle())

        long = await a.submit("long", tokens=ENDLESS)

        async def runs() -> bool:
            return bool((await b.job(long))["status"] == "IN_PROGRESS")

        await come(runs)
        for one in (a, b):  # one of them runs it
            assert (await one.ask("POST", f"/v2/local/cancel/{long}"))[1]["status"] == "CANCELLED"
        await asyncio.gather(a.idle(), b.idle())


async def test_a_restart_of_the_database_under_load_loses_nothing(
    tmp_path: Path, server: postgres.Server
) -> None:
    """Who asks for something of it gets a 503; streams and jobs go on, and are counted once."""
    async with two(tmp_path, server.database()) as (a, b):
        jobs = [await a.submit(f"job-{n}") for n in range(10)]
        streams = [Stream(f"stream-{n}") for n in range(6)]
        reading = [asyncio.create_task(one.read(a if n % 2 else b)) for n, one in enumerate(streams)]
        await asyncio.gather(*(one.began.wait() for one in streams))
        await asyncio.to_thread(server.stop, crash=True)
        status, told = await a.ask("GET", f"/v2/local/status/{jobs[0]}")
        assert (status, told["error"]["code"]) == (503, "storage_unavailable")
        await asyncio.gather(*reading)
        assert all(stream.whole for stream in streams), "no answer waits for the database for ever"
        await asyncio.sleep(LEASE_S)  # every lease has run out
        await asyncio.to_thread(server.start)
        late = [await b.submit(f"late-{n}") for n in range(4)]
        ended = [await a.ended(job) for job in jobs + late]
        assert Counter(job["status"] for job in ended) == {"COMPLETED": len(jobs + late)}
        assert not any(job.get("retries") for job in ended), "both have lived all the time"
        rows = await b.counted(len(jobs) + len(late) + len(streams))
        assert Counter(row["requests"] for row in rows) == {1: len(jobs) + len(late) + len(streams)}
        assert {row["completion_tokens"] for row in rows} == {TOKENS}
        assert {row["prompt_tokens"] for row in rows} == {PROMPT_TOKENS}


@dataclass
class Limited:
    """A client with a key of so many requests in a minute, which counts what it gets."""

    key: str
    per_minute: int
    got: int = 0
    began_s: float = field(default_factory=time.monotonic)

    @property
    def may_have(self) -> float:
        """How many requests it may have had by now, if all gateways count together."""
        return self.per_minute * (1 + (time.monotonic() - self.began_s) / 60)

    async def known(self, at: Gateway) -> bool:
        """Whether a gateway says of it what is true of all together."""
        async with at.session.get(f"{at.root}/v2/local/health", headers=self.headers) as reply:
            left, rest = int(reply.headers["x-ratelimit-remaining-requests"]), self.may_have - self.got
            if rest > 0:
                return left <= rest
        wait_s = await self.ask(at)
        return wait_s >= (1 - self.may_have + self.got) / self.per_minute * 60

    async def ask(self, at: Gateway) -> int:
        """Ask for one token; returns how long to wait, 0 if it was answered."""
        url, body = f"{at.root}/v2/local/openai/v1/chat/completions", {"model": "m", "messages": []}
        asking = at.session.post(url, json={**body, "max_tokens": 1}, headers=self.headers)
        async with asking as reply:
            assert reply.status in {200, 429}, await reply.text()
            self.got += reply.status == 200
            return int(reply.headers.get("retry-after", 0))

    async def ask_until_refused(self, at: Gateway) -> int:
        """Returns how long to wait then."""
        while not (wait_s := await self.ask(at)):
            pass
        return wait_s

    @property
    def headers(self) -> dict[str, str]:
        """Those of each request."""
        return {"authorization": f"Bearer {self.key}"}


async def limited(a: Gateway, b: Gateway, name: str, per_minute: int) -> Limited:
    """One whom both know."""
    asked = {"name": name, "requests_per_minute": per_minute}
    status, made = await a.ask("POST", "/admin/keys", json=asked)
    assert status == 201
    one = Limited(made["key"], per_minute)

    async def comes_in() -> bool:
        return (await b.ask("GET", "/v2/local/health", headers=one.headers))[0] == 200

    await come(comes_in)
    return one


async def test_a_limit_is_that_of_all_gateways(tmp_path: Path, server: postgres.Server) -> None:
    """Also of a new one, and of those that were without a database, for which nobody was refused."""
    url = server.database()
    async with two(tmp_path, url, per_s=1000) as (a, b):
        one = await limited(a, b, "in turn", 30)
        for _ in range(20):
            assert not await one.ask(a)
        await come(lambda: one.known(b))
        wait_s = await one.ask_until_refused(b)
        assert 30 <= one.got <= one.may_have
        await come(lambda: one.known(a))
        await asyncio.sleep(wait_s)  # as it was told
        assert not await one.ask(a)

        both = await limited(a, b, "at once", 600)
        await asyncio.gather(*(both.ask_until_refused(at) for at in (a, b) for _ in range(4)))
        over = max(0, both.got - both.may_have)
        print(f"{both.got} requests of 600 a minute at two gateways, {over:.0f} too many")
        assert over < 300

        away = await limited(a, b, "away", 20)
        await asyncio.to_thread(server.stop, crash=True)
        await asyncio.gather(*(away.ask(at) for at in (a, b) for _ in range(30)))
        assert 40 <= away.got <= 2 * away.may_have, "each may let in what it could alone"
        await asyncio.to_thread(server.start)
        for at in (a, b):
            await come(lambda at=at: away.known(at))  # type: ignore[misc]
    async with gateway("c", tmp_path, url, per_s=1000) as c:
        assert await both.known(c)
        assert await away.known(c)
