"""`gateway.accounts.metering`: every answer is counted once, whenever its gateway ends."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, select, text
from sqlalchemy.exc import OperationalError, ProgrammingError

from gateway.accounts.keys import Key, Keys
from gateway.accounts.limits import Limits
from gateway.accounts.metering import Metering
from gateway.accounts.usage import USAGE, Prices
from gateway.store import Store
from handler import sse
from handler.messages import Call, Headers, Reply, Request, Visit, once, read

EVENTS: Headers = (("content-type", "text/event-stream; charset=utf-8"),)
JSON: Headers = (("content-type", "application/json"),)
PRICES = Prices(input_nano=1_000_000_000, output_nano=2_500_000_000)  # 1 and 2.50 per million
KEY = Key("key_a", "a", b"", tokens_per_minute=1000)
ROLE = sse.event({"model": "m", "choices": [{"delta": {"role": "assistant", "content": ""}}]})
USAGE_CHUNK = sse.event(
    {"model": "m", "choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": 3, "total_tokens": 23}}
)


def chunk(said: str) -> bytes:
    """A chunk of a chat stream."""
    return sse.event({"model": "m", "choices": [{"delta": {"content": said}}]})


class Gates:
    """A stream whose frames come when the test says so."""

    def __init__(self, *frames: bytes) -> None:
        self.frames = asyncio.Queue[bytes]()
        for frame in frames:
            self.frames.put_nowait(frame)

    async def _read(self) -> AsyncIterator[bytes]:
        while frame := await self.frames.get():
            yield frame

    @asynccontextmanager
    async def call(self, _: Request) -> AsyncIterator[Reply]:
        """The stream."""
        yield Reply(200, EVENTS, self._read())


def request(**body: Any) -> Request:
    """What a client of the key asks."""
    raw = json.dumps({"model": "m", "messages": [], **body}).encode()
    return Request("POST", "/v1/chat/completions", JSON, raw, visit=Visit(caller=KEY.id))


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """An open database."""
    store = Store.open(database_url)
    yield store
    store.close()


def gateway(store: Store, limits: Limits | None = None) -> Metering:
    """A gateway's account; each is of an instance of its own."""
    return Metering(store, Keys(stored=[KEY]), limits or Limits())


def metered(metering: Metering, call: Call) -> Call:
    """What clients ask."""
    return metering.metered(call, endpoint_id="e", model_id="base", prices=PRICES)


def counted(connection: Connection) -> list[tuple[Any, ...]]:
    """The account: key, endpoint, model, requests, tokens and cost."""
    return [tuple(row)[1:] for row in connection.execute(select(USAGE))]


def open_rows(connection: Connection) -> list[tuple[Any, ...]]:
    """What is written down of streams that run."""
    rows = connection.execute(text("SELECT completion_tokens FROM open_requests WHERE instance <> ''"))
    return [tuple(row) for row in rows]


ONE = ("key_a", "e", "m", 1, 20, 3, 27_500)


async def test_a_stream_is_counted_before_its_last_frame(store: Store) -> None:
    """Who has `[DONE]` has been counted; nothing before it waits, and what nobody asked for is not shown."""
    stream = Gates(ROLE, chunk("a"), chunk("b"))
    async with gateway(store) as metering:
        async with metered(metering, stream.call)(request(stream=True)) as reply:
            assert [await anext(reply.frames) for _ in range(3)] == [ROLE, chunk("a"), chunk("b")]
            assert await store.read(counted) == []
            for frame in (chunk("c"), USAGE_CHUNK, sse.DONE):
                stream.frames.put_nowait(frame)
            assert await anext(reply.frames) == chunk("c")
            assert await anext(reply.frames) == sse.DONE
            assert store.read_now(counted) == [ONE]
        assert await store.read(counted) == [ONE]


async def test_a_whole_answer_is_counted_before_its_last_bytes(store: Store) -> None:
    """It comes in as many pieces as its worker made."""
    body = json.dumps({"model": "m", "usage": {"prompt_tokens": 20, "completion_tokens": 3}}).encode()

    @asynccontextmanager
    async def call(_: Request) -> AsyncIterator[Reply]:
        async def pieces() -> AsyncIterator[bytes]:
            yield body[:9]
            yield body[9:]

        yield Reply(200, JSON, pieces())

    async with gateway(store) as metering, metered(metering, call)(request()) as reply:
        assert await anext(reply.frames) == body[:9]
        assert store.read_now(counted) == []
        assert await anext(reply.frames) == body[9:]
        assert store.read_now(counted) == [ONE]


async def test_an_answer_without_usage_is_one_request(store: Store) -> None:
    """Of the endpoint's own model; a refusal is none."""
    for status in (200, 404):

        @asynccontextmanager
        async def call(_: Request, status: int = status) -> AsyncIterator[Reply]:
            yield Reply(status, (), once(b"Hi"))

        async with gateway(store) as metering, metered(metering, call)(request()) as reply:
            await read(reply)
    assert await store.read(counted) == [("key_a", "e", "base", 1, 0, 0, 0)]


async def test_a_client_that_leaves_has_used_what_was_made(store: Store) -> None:
    """Each frame is a token; who speaks is none, and who left before anything was said has used nothing."""
    async with gateway(store) as metering:
        for frames in ([ROLE, chunk("a"), chunk("b")], [ROLE], [sse.KEEP_ALIVE]):
            async with metered(metering, Gates(*frames).call)(request(stream=True)) as reply:
                for _ in frames:
                    await anext(reply.frames)
    assert await store.write(counted) == [("key_a", "e", "m", 1, 0, 2, 5_000)]


async def test_a_killed_gateways_streams_are_counted_once_by_the_next(store: Store) -> None:
    """With what was last written down, however often a next one starts."""
    stream = Gates(ROLE, chunk("a"))
    killed = gateway(store)
    async with metered(killed, stream.call)(request(stream=True)) as reply:
        await anext(reply.frames)
        await killed.checkpoint()
        assert store.read_now(open_rows) == []  # nothing was said yet
        await anext(reply.frames)
        await killed.checkpoint()
        stream.frames.put_nowait(chunk("b") + chunk("c"))
        await anext(reply.frames)
        await killed.checkpoint()
        await killed.checkpoint()
        assert store.read_now(open_rows) == [(3,)]
        for _ in range(2):  # the one that was killed says nothing any more
            async with gateway(store):
                assert store.read_now(counted) == [("key_a", "e", "m", 1, 0, 3, 7_500)]
        assert store.read_now(open_rows) == []


async def test_the_end_of_a_stream_takes_its_row_away(store: Store) -> None:
    """What was written down on the way is not counted beside the whole."""
    stream = Gates(ROLE, chunk("a"))
    metering = gateway(store)
    async with metered(metering, stream.call)(request(stream=True)) as reply:
        await anext(reply.frames)
        await anext(reply.frames)
        await metering.checkpoint()
        for frame in (USAGE_CHUNK, sse.DONE, b""):
            stream.frames.put_nowait(frame)
        await read(reply)
    await metering.checkpoint()
    assert store.read_now(open_rows) == []
    assert store.read_now(counted) == [ONE]


async def test_a_stream_that_ends_while_its_checkpoint_waits_is_counted_once(store: Store) -> None:
    """What is counted together is written at the place of the first: its own row must not come after that."""
    busy = threading.Event()
    streams = [Gates(ROLE, chunk("a")), Gates(ROLE, chunk("a"))]
    async with gateway(store) as metering, AsyncExitStack() as stack:
        replies = []
        for stream in streams:
            call = metered(metering, stream.call)(request(stream=True))
            replies.append(await stack.enter_async_context(call))
            assert [await anext(replies[-1].frames) for _ in range(2)] == [ROLE, chunk("a")]
        blocked = asyncio.create_task(store.write(lambda _: busy.wait(60)))
        await asyncio.sleep(0)
        ends = []
        for number, (stream, reply) in enumerate(zip(streams, replies, strict=True)):
            if number:  # the other one's end waits for the database by now
                checkpoint = asyncio.create_task(metering.checkpoint())
                await asyncio.sleep(0)
            for frame in (USAGE_CHUNK, sse.DONE):
                stream.frames.put_nowait(frame)
            ends.append(asyncio.ensure_future(anext(reply.frames)))
            for _ in range(5):
                await asyncio.sleep(0)
        busy.set()
        assert await asyncio.gather(*ends) == [sse.DONE] * 2
        await asyncio.gather(blocked, checkpoint)
        assert store.read_now(open_rows) == []
    async with gateway(store):
        assert await store.read(counted) == [(*ONE[:3], 2, 40, 6, 55_000)]


async def test_a_client_that_leaves_at_the_last_frame_is_counted_once(store: Store) -> None:
    """Cancelled while the account is being written: it is written all the same."""
    stream = Gates(chunk("a"), USAGE_CHUNK, sse.DONE)
    async with gateway(store) as metering, metered(metering, stream.call)(request(stream=True)) as reply:
        await anext(reply.frames)
        last = asyncio.ensure_future(anext(reply.frames))
        await asyncio.sleep(0)
        last.cancel()
        with pytest.raises(asyncio.CancelledError):
            await last
    assert await store.write(counted) == [ONE]  # after whatever was asked for before


async def test_a_database_that_fails_holds_no_answer_up_and_is_tried_again(store: Store) -> None:
    """The client has its answer, and the next checkpoint the account."""
    async with gateway(store) as metering:
        store.write_now(lambda c: c.execute(text("ALTER TABLE usage RENAME TO away")))
        stream = Gates(chunk("a"), USAGE_CHUNK, sse.DONE, b"")
        async with metered(metering, stream.call)(request(stream=True)) as reply:
            assert await read(reply) == chunk("a") + sse.DONE
        with pytest.raises((OperationalError, ProgrammingError)):
            store.read_now(counted)
        store.write_now(lambda c: c.execute(text("ALTER TABLE away RENAME TO usage")))
        await metering.checkpoint()
        assert await store.write(counted) == [ONE]
    assert await store.write(counted) == [ONE]


@pytest.mark.sqlite
async def test_a_database_that_is_locked_holds_no_answer_up(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client has its answer though another process has the database, which counts it after that."""
    monkeypatch.setattr("gateway.accounts.metering.SETTLE_MAX_S", 0.01)
    async with gateway(store) as metering:
        stream = Gates(chunk("a"), USAGE_CHUNK, sse.DONE, b"")
        with closing(sqlite3.connect(tmp_path / "gateway.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            async with metered(metering, stream.call)(request(stream=True)) as reply:
                assert await read(reply) == chunk("a") + sse.DONE
            assert store.read_now(counted) == []
        assert await store.write(counted) == [ONE]


async def test_a_database_that_is_away_is_tried_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that was not even begun is not waited for by all that end later."""

    def away() -> None:
        raise OperationalError("BEGIN", None, Exception("away"))

    async with gateway(store) as metering:
        with monkeypatch.context() as patched:
            patched.setattr(store._engine, "begin", away)
            stream = Gates(chunk("a"), USAGE_CHUNK, sse.DONE, b"")
            async with metered(metering, stream.call)(request(stream=True)) as reply:
                await read(reply)
        await metering.checkpoint()
        assert await store.write(counted) == [ONE]


async def test_tokens_come_out_of_the_keys_limit_while_they_are_made(store: Store) -> None:
    """At each checkpoint, and at the end what is still missing: never twice."""
    limits = Limits(lambda: 0.0)
    metering = gateway(store, limits)

    def left() -> str:
        return dict(limits.headers(KEY))["x-ratelimit-remaining-tokens"]

    stream = Gates(chunk("a"), chunk("b"))
    async with metered(metering, stream.call)(request(stream=True)) as reply:
        await anext(reply.frames)
        await metering.checkpoint()
        assert left() == "999"
        await anext(reply.frames)
        await metering.checkpoint()
        assert left() == "998"
        for frame in (USAGE_CHUNK, sse.DONE, b""):
            stream.frames.put_nowait(frame)
        await read(reply)
    assert left() == "977"


@dataclass
class Life:
    """One stream of a test, and what its key owes for it by now."""

    stream: Gates
    stack: AsyncExitStack
    reply: Reply
    said: int = 0
    kept: int = 0


class Lives:
    """Streams of one gateway after another, and beside them what the account has to say."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._metering = gateway(store)
        self._lives: list[Life] = []
        self.requests = self.prompt = self.completion = 0

    async def begin(self) -> None:
        """A stream begins."""
        stack = AsyncExitStack()
        stream = Gates()
        call = metered(self._metering, stream.call)
        self._lives.append(Life(stream, stack, await stack.enter_async_context(call(request(stream=True)))))

    async def say(self, number: int) -> None:
        """One of them makes a token."""
        if life := self._one(number):
            life.stream.frames.put_nowait(chunk("a"))
            await anext(life.reply.frames)
            life.said += 1

    async def end(self, number: int) -> None:
        """One of them ends by itself."""
        if life := self._one(number):
            for frame in (USAGE_CHUNK, sse.DONE):
                life.stream.frames.put_nowait(frame)
            assert await anext(life.reply.frames) == sse.DONE
            await self._leave(life, prompt=20, completion=3)

    async def leave(self, number: int) -> None:
        """The client of one of them leaves."""
        if life := self._one(number):
            await self._leave(life, completion=life.said)

    async def checkpoint(self, _: int = 0) -> None:
        """A second passes."""
        await self._metering.checkpoint()
        for life in self._lives:
            life.kept = life.said

    async def kill(self, _: int = 0) -> None:
        """The gateway is killed, and the next one starts."""
        for life in self._lives:
            self._owe(completion=life.kept)
        self._metering._open.clear()  # the dead write nothing
        while self._lives:
            await self._lives.pop().stack.aclose()
        self._metering = gateway(self._store)
        async with self._metering:
            pass

    def _one(self, number: int) -> Life | None:
        return self._lives[number % len(self._lives)] if self._lives else None

    async def _leave(self, life: Life, *, completion: int, prompt: int = 0) -> None:
        self._lives.remove(life)
        await life.stack.aclose()
        self._owe(completion=completion, prompt=prompt)

    def _owe(self, *, completion: int, prompt: int = 0) -> None:
        self.requests += completion > 0
        self.completion += completion
        self.prompt += prompt


STEPS = ("begin", "begin", "say", "say", "say", "checkpoint", "checkpoint", "end", "leave", "kill")


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # emptied each time
)
@given(
    st.lists(
        st.tuples(st.sampled_from(STEPS), st.integers(0, 9)),
        min_size=25,
        max_size=60,
    )
)
async def test_whatever_happens_in_which_order_everything_is_counted_once(
    store: Store,
    steps: list[tuple[str, int]],
) -> None:
    """Streams that end, are left or are cut by the death of their gateway, between any two checkpoints."""
    for table in ("usage", "open_requests"):
        await store.write(lambda c, table=table: c.execute(text(f"DELETE FROM {table}")))  # type: ignore[misc]
    lives = Lives(store)
    for name, number in steps:
        await (lives.begin() if name == "begin" else getattr(lives, name)(number))
    await lives.kill()
    found = await store.write(counted)
    requests, prompt, completion = (sum(row[column] for row in found) for column in (3, 4, 5))
    assert (requests, prompt, completion) == (lives.requests, lives.prompt, lives.completion)
    assert await store.write(open_rows) == []
