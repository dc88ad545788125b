"""Jobs of `python -m gateway`: for RunPod's own client, and whatever it is killed in the middle of."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.gateway_process import CHAT, Program, gateway, started
from tests.hooks import Hooks
from tests.job_endpoints import frames, used, whole
from tests.scripted_app import Pause, Say, Script, stream
from tests.scripted_worker import READY
from tests.servers import KEY, ROOT

TEXT = "POST /v1/completions"
VECTORS = "POST /v1/embeddings"
SLOTS = 16
MANY = 20
"""More chats than the worker works on at once: some wait."""


class Client:
    """Asks the job API of a gateway."""

    def __init__(self, program: Program, session: aiohttp.ClientSession) -> None:
        self._base = program.base_url.removesuffix("/openai/v1")
        self._session = session

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The body of a 200."""
        async with self._session.request(method, f"{self._base}/{path}", json=body) as reply:
            assert reply.status == 200, await reply.text()
            return await reply.json()

    async def run(self, route: str, *, webhook: str | None = None, **fields: Any) -> str:
        """The id of a new job."""
        job_input = {
            "openai_route": route.removeprefix("POST "),
            "openai_input": {"model": "org/model", **fields},
        }
        body = {"input": job_input, **({"webhook": webhook} if webhook else {})}
        return str((await self.ask("POST", "run", body))["id"])

    async def ended(self, job_id: str) -> Any:
        """What came of a job."""
        while (await self.ask("GET", f"stream/{job_id}"))["status"] in {"IN_QUEUE", "IN_PROGRESS"}:
            pass  # it is held while there is nothing new
        return await self.ask("GET", f"status/{job_id}")


@asynccontextmanager
async def client(program: Program) -> AsyncIterator[Client]:
    """One with the gateway's key."""
    async with aiohttp.ClientSession(
        headers={"authorization": f"Bearer {KEY}"}, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        yield Client(program, session)


def kept(folder: Path, query: str) -> list[Any]:
    """Rows of the gateway's database."""
    database = sqlite3.connect(folder / "data" / "gateway.db")
    try:
        return database.execute(query).fetchall()
    finally:
        database.close()


async def test_runpods_own_client_works(tmp_path: Path) -> None:
    """Its synchronous and its asynchronous one, unmodified, with their base URL on the gateway."""
    scripts = {
        TEXT: [whole(id="a")] * 3,
        CHAT: [frames("a", "b")] * 2,
        VECTORS: [Script((Pause("held"),))] * 2,
    }
    environ = {"START": "first_request"}
    async with gateway(tmp_path, (READY, scripts), environ=environ) as program:
        await program.address()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.runpod_client", KEY),
            env={**os.environ, "RUNPOD_ENDPOINT_BASE_URL": program.base_url.removesuffix("/local/openai/v1")},
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        told = json.loads(out.splitlines()[-1])
        assert await program.end(signal.SIGTERM) == 0
    output = [{**used(), "id": "a"}]
    for completed, seen in ((3, told["sync"]), (5, told["asyncio"])):
        first, second, end, _ = "".join(seen.pop("stream")).split("\n\n")
        chunks = [json.loads(part.removeprefix("data: ")) for part in (first, second)]
        assert ([chunk["choices"][0]["text"] for chunk in chunks], end) == (["a", "b"], "data: [DONE]")
        health = seen.pop("health")
        nothing = dict.fromkeys(("failed", "inProgress", "inQueue", "retried"), 0)
        assert health["jobs"] == {"completed": completed, **nothing}
        assert health["workers"]["ready"] == 1
        assert seen.pop("run_sync", output) == output
        assert seen == {
            "output": output,
            "status": "COMPLETED",
            "cancelled": {"id": None, "status": "CANCELLED"},
            "purged": {"removed": 0, "status": "completed"},
        }


async def test_every_job_ends_once_though_the_gateway_is_killed(tmp_path: Path) -> None:
    """One has ended and its webhook is being told, one streams, some run, some wait: then `kill -9`."""
    environ = {"WEBHOOK_HOSTS": "127.0.0.1"}
    never = Script((Pause("never"),))
    half = stream("1", Pause("never"))
    first = ((("ready", str(SLOTS)),), {VECTORS: whole(), TEXT: half, CHAT: [never] * MANY})
    second = (READY, {TEXT: frames("1", "2"), CHAT: [whole()] * MANY})
    async with Hooks().listening() as hooks:
        hooks.hang = True
        async with gateway(tmp_path, first, environ=environ) as program:
            worker = await started(program)
            async with client(program) as asks:
                done = await asks.run(VECTORS, webhook=f"http://127.0.0.1:{hooks.port}/done")
                await hooks.came(1)
                streams = await asks.run(TEXT, stream=True)
                before = await asks.ask("GET", f"stream/{streams}")
                chats = [await asks.run(CHAT) for _ in range(MANY)]
                states: dict[str, int] = {}
                while states.get("IN_PROGRESS") != SLOTS:  # then no other one begins
                    states = dict(kept(tmp_path, "SELECT state, count(*) FROM jobs GROUP BY state"))
                    await asyncio.sleep(0)
                await worker.saw("paused", "never", SLOTS)
            assert await program.end(signal.SIGKILL) == -signal.SIGKILL
        hooks.hang = False
        async with gateway(tmp_path, second, environ=environ) as program:
            await started(program)
            async with client(program) as asks:
                ended = {name: await asks.ended(name) for name in (done, streams, *chats)}
                after = await asks.ask("GET", f"stream/{streams}")
            await hooks.came(2)
            while kept(tmp_path, "SELECT id FROM job_webhooks"):
                assert program.process.returncode is None
            assert await program.end(signal.SIGTERM) == 0
    assert states["COMPLETED"] == 1
    assert states["IN_QUEUE"] > 0
    assert (before["attempt"], before["stream"]) == (1, [{"output": "data: 1\n\n"}])
    assert (after["attempt"], after["stream"]) == (2, [])
    assert {one["status"] for one in ended.values()} == {"COMPLETED"}
    assert all(ended[name]["output"] == [used()] for name in (done, *chats))
    assert (
        "".join(ended[streams]["output"]).count("data: ") == 3
    )  # both frames, and [DONE]: nothing of the first
    assert "retries" not in ended[done]
    assert ended[streams]["retries"] == 1
    assert sum("retries" in ended[name] for name in chats) == SLOTS - 1
    requests, tokens = kept(tmp_path, "SELECT sum(requests), sum(completion_tokens) FROM usage")[0]
    assert (requests, tokens) == (2 + MANY, 2 * (2 + MANY))
    assert [path for path, _ in hooks.got] == ["/done"] * 2
    assert hooks.got[0][1] == hooks.got[1][1]
    assert json.loads(hooks.got[0][1])["id"] == done


async def test_a_job_waits_for_a_worker_that_dies_with_it(tmp_path: Path) -> None:
    """The next worker has it; and a gateway that is told to stop leaves to the next what is not finished."""
    never = Script((Pause("never"),))
    first = (READY, {CHAT: never})
    async with gateway(tmp_path, first, (READY, {CHAT: never}), environ={"DRAIN_TIMEOUT_S": "0"}) as program:
        worker = await started(program)
        async with client(program) as asks:
            job_id = await asks.run(CHAT)
            await worker.saw("paused", "never")
            worker.kill()
            worker = await program.director.worker()
            await worker.saw("paused", "never")
        assert await program.end(signal.SIGTERM) == 0
    async with gateway(tmp_path, (READY, {CHAT: whole()})) as program:
        await started(program)
        async with client(program) as asks:
            assert (await asks.ended(job_id))["status"] == "COMPLETED"
        assert await program.end(signal.SIGTERM) == 0


async def test_a_stream_that_is_cut_by_a_dying_worker_fails_its_job(tmp_path: Path) -> None:
    """Its client has seen a part of it: another one would not fit."""
    cut = Script((Say("data: 1\n\n"), Pause("cut")), headers=(("content-type", "text/event-stream"),))
    async with gateway(tmp_path, (READY, {CHAT: cut}), (READY, {})) as program:
        worker = await started(program)
        async with client(program) as asks:
            job_id = await asks.run(CHAT, stream=True)
            assert (await asks.ask("GET", f"stream/{job_id}"))["stream"] == [{"output": "data: 1\n\n"}]
            worker.kill()
            body = await asks.ended(job_id)
        assert (body["status"], json.loads(body["error"])["code"]) == ("FAILED", "upstream_failed")
        assert await program.end(signal.SIGTERM) == 0
