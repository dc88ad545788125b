"""Two gateway processes over one real PostgreSQL, while either and the database itself are killed.

Nothing that was accepted is lost, nothing is done or counted twice, and nothing hangs.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
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
from tests.servers import KEY, ROOT
from tests.steady_worker import PROMPT_TOKENS
from tests.until import LOOK_S

LEASE_S = 8.0
"""Less than the shipped one, so that a test need not wait so long, and more than a machine may stall."""
WITH_STEADY_WORKERS = (
    "import sys; from gateway import instances; "
    f"instances.LEASE_S, instances.BEAT_S = {LEASE_S}, 0.4; "
    "from gateway.__main__ import main; from tests.steady_worker import COMMAND; "
    "sys.exit(main(sys.argv[1:], COMMAND))"
)
TOKENS = 30
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

    async def submit(self, model: str, tokens: int = TOKENS) -> str:
        """The id of a job, handed in until it is accepted."""
        asked = {"model": model, "messages": [], "max_tokens": tokens}
        body = {"input": {"openai_route": "/v1/chat/completions", "openai_input": asked}}
        while True:
            status, told = await self.ask(
                "POST", "/v2/local/run", json=body, headers={"idempotency-key": model}
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
async def gateway(name: str, folder: Path, url: str, *, per_s: float = 15) -> AsyncIterator[Gateway]:
    """One with a worker of its own; `files` are those of all in `folder`."""
    (folder / name).mkdir(exist_ok=True)
    (folder / "files").mkdir(exist_ok=True)
    with suppress(FileExistsError):
        (folder / name / "files").symlink_to(folder / "files")
    environ = {
        **{key: os.environ[key] for key in ("PATH", "HOME", "VIRTUAL_ENV") if key in os.environ},
        "PORT": "0",
        "API_KEY": KEY,
        "MODEL_NAME": "org/model",
        "WARM_PARENT": "off",
        "TMPDIR": str(folder / name),
        "DATA_DIR": str(folder / name),
        "DATABASE_URL": url,
        "MIN_WORKERS": "1",
        "MAX_CONCURRENCY": str(SLOTS),
        "QUEUE_LIMIT": "1000",
        "STEADY_TOKENS_PER_S": str(per_s),
        "VLLM_SKIP_MODEL_NAME_VALIDATION": "true",
    }
    stderr = folder / f"{name}.stderr"
    with stderr.open("a") as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", WITH_STEADY_WORKERS),
            env=environ,
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    connector = aiohttp.TCPConnector(limit=0)
    session = aiohttp.ClientSession(headers={"authorization": f"Bearer {KEY}"}, connector=connector)
    try:
        assert process.stdout is not None
        line = b""
        while b"/openai/v1" not in line:
            line = await process.stdout.readline()
            assert line, stderr.read_text()[-4000:]
        found = re.search(r"(http://\S+)/v2/local/openai/v1", line.decode())
        assert found
        at = Gateway(process, found[1], session, stderr)
        await at.in_flight(0)
        yield at
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    finally:
        await session.close()
        if process.returncode is None:
            process.kill()
        await process.communicate()
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
async def two(folder: Path, url: str) -> AsyncIterator[tuple[Gateway, Gateway]]:
    """Two gateways over the database at `url`."""
    async with AsyncExitStack() as stack:
        a = await stack.enter_async_context(gateway("a", folder, url))
        yield a, await stack.enter_async_context(gateway("b", folder, url))


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


async def written_down(url: str, models: set[str]) -> None:
    """Return once the database has heard of a stream of each of `models` that is on its way."""
    database = create_async_engine(url)
    try:
        async with database.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")

            async def told() -> bool:
                return models <= set(await connection.scalars(text("SELECT model FROM open_requests")))

            await come(told)
    finally:
        await database.dispose()


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
        assert (await a.ask("DELETE", f"/admin/keys/{made['id']}"))[0] == 200
        print(f"a key revoked on one gateway was refused by the other after {await heard(401):.2f} s")

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
