"""Endpoints for tests of jobs, in process: their one worker is a scripted application."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from sqlalchemy import Column, Connection, Integer, String, Table, insert, select

from gateway.jobs import Job, Jobs, NewJob, status
from gateway.store import Store, metadata
from handler.asgi import call_app
from handler.errors import RequestError
from handler.messages import Reply, Request
from handler.usage import Usage
from tests.scripted_app import Script, ScriptedApp, answer, stream

CHAT = "POST /v1/chat/completions"
SPENT = Table(
    "test_spent",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("job_id", String),
    Column("key_id", String),
    Column("tokens", Integer),
)
"""What `Till` has counted."""


class Till:
    """The costs of a test's jobs."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def count(self, connection: Connection, job: Job, used: Usage) -> None:
        """Write down."""
        tokens = used.prompt_tokens + used.completion_tokens
        connection.execute(insert(SPENT).values(job_id=job.id, key_id=job.key_id, tokens=tokens))

    def spend(self, job: Job, used: Usage) -> None:
        """It is written down."""
        self.told.append((job.key_id, used.prompt_tokens + used.completion_tokens))


async def spent(store: Store) -> list[tuple[str, int]]:
    """By which jobs, and how many tokens."""
    rows = await store.read(lambda connection: connection.execute(select(SPENT)).all())
    return [(row.job_id, row.tokens) for row in rows]


class ScriptedEndpoint:
    """Works on `capacity` requests at once and answers with `app`, or fails with the next of `failing`.

    With `gate`, whoever asks waits there until the test opens it, and no worker has it.
    """

    def __init__(self, app: ScriptedApp, capacity: int = 8) -> None:
        self._call = call_app(app)
        self.capacity = capacity
        self.failing: list[RequestError] = []
        self.fails_begun = False
        """Whether a worker has what fails."""
        self.asked: list[Request] = []
        self.gate: asyncio.Event | None = None
        self._news = asyncio.Condition()

    @asynccontextmanager
    async def ask(self, request: Request) -> AsyncIterator[Reply]:
        """Answer."""
        async with self._news:
            self.asked.append(request)
            self._news.notify_all()
        if self.gate is not None:
            await self.gate.wait()
        if self.failing:
            if self.fails_begun:
                request.visit.taken()
            raise self.failing.pop(0)
        request.visit.taken()
        async with self._call(replace(request, headers=request.headers)) as reply:
            yield reply

    async def was_asked(self, count: int) -> None:
        """Return once it was, so often."""
        async with self._news:
            await self._news.wait_for(lambda: len(self.asked) >= count)


def chat(key_id: str = "a", *, streams: bool = False, **how: Any) -> NewJob:
    """A job that asks for a chat, as RunPod's OpenAI URL does."""
    body = {"model": "m", "messages": [], **({"stream": True} if streams else {})}
    value = {"openai_route": "/v1/chat/completions", "openai_input": body}
    return NewJob("local", key_id, json.dumps(value).encode(), **how)


def used(prompt: int = 3, completion: int = 2) -> dict[str, Any]:
    """An answer that says what it has used."""
    return {"model": "m", "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def whole(**fields: Any) -> Script:
    """A whole answer."""
    return answer({**used(), **fields})


def frames(*texts: str) -> Script:
    """A stream with a frame for each of `texts`, and what it has used."""
    last = json.dumps({**used(), "choices": []})
    return stream(*(json.dumps({"model": "m", "choices": [{"text": text}]}) for text in texts), last)


async def told(jobs: Jobs, job: Job) -> Mapping[str, Any]:
    """What `/status` says of `job` now; no clock is right."""
    current = await jobs.find(job.id)
    assert current is not None
    shown: dict[str, Any] = json.loads(status.render(current, await jobs.output(current)))
    shown.pop("delayTime", None)
    shown.pop("executionTime", None)
    return shown


class Names(AbstractResolver):
    """A resolver that knows what the test says."""

    def __init__(self, **addresses: Sequence[str]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """What the test says."""
        return [
            ResolveResult(hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0)
            for address in self._addresses[host]
        ]

    async def close(self) -> None:
        """Nothing is held."""
