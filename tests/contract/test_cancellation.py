"""A client that leaves stops its generation: streamed or not, waiting or in mid-stream, on each hop."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import httpx
import pytest

from tests.servers import MAX_MODEL_LEN, MODEL, Server, Stack

WITHIN_S = 0.2
"""The engine's count is back to 0 this long after the client has gone."""
TRIES = 10
"""One of so many is within it: a machine that stalls is late now and then, an engine that works on always."""

SEQUENCES = 2

LONG = {  # seconds of work, which no stop token ends
    "model": MODEL,
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": MAX_MODEL_LEN - 64,
    "ignore_eos": True,
    "temperature": 1,
    "n": SEQUENCES,
}


@dataclass(frozen=True)
class Engine:
    """The worker's engine, as its /metrics show it."""

    http: httpx.AsyncClient

    async def metrics(self) -> str:
        """All of them."""
        return (await self.http.get("http://worker/metrics")).text

    async def held(self) -> float:
        """How many requests the engine holds, waiting and running."""
        return value(await self.metrics(), "firsttoken_engine_requests")

    async def finished(self) -> float:
        """How many requests it has brought to their end, whatever that was."""
        return value(await self.metrics(), "vllm:request_success_total")

    async def holds(self, requests: int) -> None:
        """Return as soon as the engine holds so many sequences or more."""
        held = 0.0
        while held < requests:
            held = await self.held()

    async def idle(self) -> None:
        """Return as soon as it holds nothing."""
        while await self.held():
            pass

    async def idle_after_s(self, left_s: float) -> float:
        """How long after `left_s` the poll began that found the engine idle."""
        while True:
            asked_s = time.monotonic()
            if await self.held() == 0:
                return asked_s - left_s


async def soonest(leave: Callable[[], Awaitable[float]]) -> float:
    """The least that `leave` took, which is tried until it is within `WITHIN_S`."""
    took_s = [await leave()]
    while took_s[-1] > WITHIN_S and len(took_s) < TRIES:
        took_s.append(await leave())
    return min(took_s)


def value(metrics: str, name: str) -> float:
    """The sum of a metric over its labels."""
    found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", metrics, re.MULTILINE)
    assert found, f"no {name} in the metrics"
    return sum(map(float, found))


@pytest.fixture
async def engine(stack: Stack) -> AsyncIterator[Engine]:
    """The engine, idle."""
    async with stack.worker.http() as http:
        engine = Engine(http)
        await engine.idle()  # what another test has left is about to end
        yield engine


@pytest.fixture(params=["worker", "gateway"])
def asked(request: pytest.FixtureRequest, stack: Stack) -> Server:
    """The server that the client asks and leaves."""
    server: Server = getattr(stack, request.param)
    return server


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_leaving_while_waiting_stops_the_engine(stream: bool, asked: Server, engine: Engine) -> None:
    """The client gives up before it has an answer, as one with a short timeout does."""

    async def leave() -> float:
        async with asked.http() as http:
            asking = asyncio.create_task(http.post("chat/completions", json={**LONG, "stream": stream}))
            await engine.holds(SEQUENCES)
            asking.cancel()
            await asyncio.wait({asking})
            assert asking.cancelled()
            return await engine.idle_after_s(time.monotonic())

    finished = await engine.finished()
    assert await soonest(leave) <= WITHIN_S
    assert await engine.finished() == finished


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
async def test_leaving_in_mid_stream_stops_the_engine(path: str, asked: Server, engine: Engine) -> None:
    """The client has read a part and closes the connection."""
    body = {**LONG, "stream": True, "prompt": "Hi"}
    if path == "completions":
        del body["messages"]

    async def leave() -> float:
        async with asked.http() as http:
            async with http.stream("POST", path, json=body) as reply:
                assert reply.status_code == 200
                await anext(reply.aiter_bytes())
                await engine.holds(1)
            return await engine.idle_after_s(time.monotonic())

    finished = await engine.finished()
    assert await soonest(leave) <= WITHIN_S
    assert await engine.finished() == finished


async def test_leaving_ends_the_client_of_the_sdk_too(asked: Server, engine: Engine) -> None:
    """`break` out of a stream, then close it, is how programs leave."""

    async def leave() -> float:
        async with asked.client() as client:
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Hi"}],
                max_tokens=MAX_MODEL_LEN - 64,
                extra_body={"ignore_eos": True},
                stream=True,
            )
            async for _ in stream:
                break
            await engine.holds(1)
            await stream.close()
            return await engine.idle_after_s(time.monotonic())

    assert await soonest(leave) <= WITHIN_S


async def test_one_client_that_leaves_stops_nobody_else(asked: Server, engine: Engine) -> None:
    """Of several streams only its own ends early."""
    finished = await engine.finished()
    short = {**LONG, "max_tokens": 200, "n": 1}
    async with asked.http() as http:
        staying = asyncio.create_task(http.post("chat/completions", json=short))
        async with http.stream("POST", "chat/completions", json={**LONG, "stream": True}) as reply:
            await anext(reply.aiter_bytes())
        answer = await staying
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 200
    await engine.idle()
    assert await engine.finished() == finished + 1


async def test_many_that_leave_at_once_leave_nothing_behind(asked: Server, engine: Engine) -> None:
    """As when a page is closed."""
    finished = await engine.finished()
    assert await soonest(lambda: eight_leave(asked, engine)) <= WITHIN_S
    assert await engine.finished() == finished


async def eight_leave(asked: Server, engine: Engine) -> float:
    """How long the engine is busy after eight clients have gone, in seconds."""
    async with asked.http() as http:
        asking = [
            asyncio.create_task(http.post("chat/completions", json={**LONG, "stream": number % 2 == 0}))
            for number in range(8)
        ]
        await engine.holds(8 * SEQUENCES)
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
        return await engine.idle_after_s(time.monotonic())
