"""Streams and jobs through one gateway of steady workers, and what has to be true of them in the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.gateway_process import main_with, root_of, running
from tests.memory import resident_bytes
from tests.steady_worker import PROMPT_TOKENS
from tests.until import LOOK_S, until

TOKENS = 40
TOKENS_PER_S = 20
WORKERS = 3
SUBMITS = 50
"""At once; RunPod takes no more than 200, and so does the gateway."""
TERMINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"}


@dataclass
class Gateway:
    """A process, and where it answers."""

    process: asyncio.subprocess.Process
    root: str

    def files(self) -> int:
        """How many file descriptors it has."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def memory_bytes(self) -> int:
        """What it holds of the machine's memory."""
        return resident_bytes(self.process.pid)

    async def status(self, session: aiohttp.ClientSession) -> Mapping[str, Any]:
        """Its only endpoint, as its admin sees it."""
        async with session.get(f"{self.root}/admin/status") as reply:
            shown: Mapping[str, Any] = (await reply.json())["endpoints"][0]
            return shown

    async def usage(self, session: aiohttp.ClientSession) -> list[Mapping[str, Any]]:
        """What was counted, by key and model."""
        async with session.get(f"{self.root}/admin/usage?group=key,model") as reply:
            rows: list[Mapping[str, Any]] = (await reply.json())["data"]
            return rows

    async def workers(self, session: aiohttp.ClientSession) -> list[Mapping[str, Any]]:
        """The workers that are ready, the busiest first."""
        ready = [one for one in (await self.status(session))["workers"] if one["state"] == "ready"]
        return sorted(ready, key=lambda one: -int(one["in_flight"]))


@asynccontextmanager
async def gateway(folder: Path) -> AsyncIterator[Gateway]:
    """`python -m gateway` with up to `WORKERS` steady workers; killed at the end if it still runs."""
    environ = {
        "MIN_WORKERS": str(WORKERS),
        "MAX_WORKERS": str(WORKERS),
        "QUEUE_LIMIT": "1000",
        "STEADY_TOKENS_PER_S": str(TOKENS_PER_S),
        "VLLM_SKIP_MODEL_NAME_VALIDATION": "true",
    }
    stderr = folder / "gateway.stderr"
    async with running(main_with("tests.steady_worker"), folder, environ, stderr=stderr) as process:
        yield Gateway(process, await root_of(process, stderr))


@dataclass
class Stream:
    """One client's stream, of a model name of its own, so that its tokens can be told from others'."""

    model: str
    seen: int = 0
    whole: bool = False
    told: str | None = None
    """The code of the error that ended it."""

    async def read(self, session: aiohttp.ClientSession, root: str) -> None:
        """Read to the end, whatever that is."""
        body = {"model": self.model, "messages": [], "max_tokens": TOKENS, "stream": True}
        with suppress(aiohttp.ClientError):
            async with session.post(f"{root}/v2/local/openai/v1/chat/completions", json=body) as reply:
                if reply.status != 200:
                    self.told = (await reply.json())["error"]["code"]
                    return
                async for line in reply.content:
                    self.seen += b'"content":"t"' in line
                    self.whole = self.whole or line == b"data: [DONE]\n"
                    if line.startswith(b'data: {"error"'):
                        self.told = json.loads(line[6:])["error"]["code"]


@dataclass
class Job:
    """One job, handed in with an idempotency key: whoever is not sure of the answer asks again."""

    model: str
    id: str = ""
    last: Mapping[str, Any] = field(default_factory=dict)

    async def submit(self, session: aiohttp.ClientSession, root: str) -> None:
        """Hand it in; `id` is empty if the gateway did not accept it."""
        streams = int(self.model.rpartition("-")[2]) % 2 == 0
        body = {"model": self.model, "messages": [], "max_tokens": TOKENS, "stream": streams}
        what = {"input": {"openai_route": "/v1/chat/completions", "openai_input": body}}
        headers = {"idempotency-key": self.model}
        with suppress(aiohttp.ClientError):
            async with session.post(f"{root}/v2/local/run", json=what, headers=headers) as reply:
                assert reply.status == 200, await reply.text()
                self.id = (await reply.json())["id"]

    async def ended(self, session: aiohttp.ClientSession, root: str) -> bool:
        """Whether it has ended, and how."""
        async with session.get(f"{root}/v2/local/status/{self.id}") as reply:
            assert reply.status == 200, await reply.text()
            self.last = await reply.json()
        return self.last["status"] in TERMINAL


@dataclass
class Load:
    """Who asks, and with which keys."""

    streams: list[Stream] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    stream_key: str = ""
    job_key: str = ""

    def session(self, key: str) -> aiohttp.ClientSession:
        """Connections for one key, as many as it wants."""
        return aiohttp.ClientSession(
            headers={"authorization": f"Bearer {key}"}, connector=aiohttp.TCPConnector(limit=0)
        )

    async def wave(self, at: Gateway, streams: list[Stream], jobs: list[Job]) -> None:
        """All of them at once; returns once every stream has ended and every job was handed in."""
        self.streams += streams
        self.jobs += jobs
        few = asyncio.Semaphore(SUBMITS)

        async def hand_in(job: Job) -> None:
            async with few:
                await job.submit(theirs, at.root)

        async with (
            self.session(self.stream_key) as mine,
            self.session(self.job_key) as theirs,
            asyncio.TaskGroup() as all_of_them,
        ):
            for stream in streams:
                all_of_them.create_task(stream.read(mine, at.root))
            for job in jobs:
                all_of_them.create_task(hand_in(job))

    async def finish(self, at: Gateway) -> None:
        """Return once every job has ended; what the gateway has not said it has is handed in again."""
        async with self.session(self.job_key) as session:
            for job in self.jobs:
                if not job.id:
                    await job.submit(session, at.root)
            for job in self.jobs:
                while not await job.ended(session, at.root):  # noqa: ASYNC110 - another process has no event
                    await asyncio.sleep(LOOK_S)


def made(kind: str, first: int, number: int) -> list[str]:
    """Names of models that nobody else has."""
    return [f"{kind}-{n}" for n in range(first, first + number)]


async def begun(streams: list[Stream], number: int) -> None:
    """Return once so many of `streams` have said something."""
    await until_true(lambda: sum(stream.seen > 0 for stream in streams) >= number)


async def until_true(what: Any) -> None:
    """Wait beside the load, which needs the loop."""
    await asyncio.to_thread(until, what)


def check_all(load: Load, rows: Sequence[Mapping[str, Any]]) -> None:
    """What was counted is what clients have."""
    counted = {(row["key_name"], row["model"]): row for row in rows}
    assert len(counted) == len(rows)
    for stream in load.streams:
        check(counted.pop(("streams", stream.model), None), whole=stream.whole, seen=stream.seen)
    for job in load.jobs:
        whole = job.last["status"] == "COMPLETED"
        assert whole or job.last["status"] == "FAILED", job.last
        assert whole or "worker" in str(job.last["error"]).lower(), job.last
        check(counted.pop(("jobs", job.model), None), whole=whole, seen=0)
    assert not counted


def check(row: Mapping[str, Any] | None, *, whole: bool, seen: int) -> None:
    """A whole answer is counted once, with all it took; of one that was cut at most what there was of it."""
    if whole:
        counted = row and (row["requests"], row["prompt_tokens"], row["completion_tokens"])
        assert counted == (1, PROMPT_TOKENS, TOKENS), (row, seen)
    elif row is not None:
        assert row["requests"] == 1
        assert 0 <= row["completion_tokens"] <= TOKENS, (row, seen)
