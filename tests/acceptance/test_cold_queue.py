"""The queue of `python -m gateway` before a cold worker: from none to one and back, who is answered when."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from tests.acceptance.test_gateway_process import CHAT, KEY, Program, gateway
from tests.scripted_app import answer
from tests.scripted_worker import READY

SHARES = {"many": 100, "some": 60, "few": 40}
LIMIT = sum(SHARES.values())
COLD = {"START": "first_request", "QUEUE_LIMIT": str(LIMIT), "IDLE_TIMEOUT_S": "1"}
ONE_AT_A_TIME: Sequence[Sequence[str]] = (("pause", "loading"), ("ready", "1"))


async def asks(
    program: Program, path: str, key: str, body: object = None
) -> tuple[int, Mapping[str, str], Any]:
    """Status, headers and JSON of one answer, to a POST of `body` or a GET, on a connection of its own."""
    url = f"{program.base_url.partition('/v2/')[0]}{path}"
    async with (
        aiohttp.ClientSession(headers={"authorization": f"Bearer {key}"}) as session,
        session.request("GET" if body is None else "POST", url, json=body) as reply,
    ):
        return reply.status, reply.headers, await reply.json()


async def endpoint(program: Program) -> Mapping[str, Any]:
    """Its only endpoint, as an admin sees it."""
    _, _, status = await asks(program, "/admin/status", KEY)
    (only,) = status["endpoints"]
    assert isinstance(only, dict)
    return only


async def waiting(program: Program, count: int) -> None:
    """Return once so many requests wait."""
    while (await endpoint(program))["waiting"] != count:
        pass


def fair(arrivals: Sequence[str]) -> list[int]:
    """Which of `arrivals`, the keys of requests, is when the next: one of each key, and again."""
    lines: dict[str, deque[int]] = {}
    for number, key in enumerate(arrivals):
        lines.setdefault(key, deque()).append(number)
    order = []
    while any(lines.values()):
        order += [line.popleft() for line in lines.values() if line]
    return order


async def test_from_none_to_one_and_back_with_a_full_queue(tmp_path: Path) -> None:
    """All are answered in order of arrival per key and one key after the other; one more is refused."""
    scripts = {CHAT: [answer({"turn": turn}) for turn in range(LIMIT)]}
    async with gateway(
        tmp_path, (ONE_AT_A_TIME, scripts), (READY, {CHAT: answer({})}), environ=COLD
    ) as program:
        await program.address()
        keys = {}
        for name in SHARES:
            _, _, made = await asks(program, "/admin/keys", KEY, {"name": name})
            keys[name] = made["key"]
        arrivals = [name for name, share in SHARES.items() for _ in range(share)]
        random.Random(7).shuffle(arrivals)
        assert (await endpoint(program))["workers"] == []

        async def chats(name: str) -> tuple[int, Mapping[str, str], Any]:
            return await asks(program, "/v2/local/openai/v1/chat/completions", keys[name], {"messages": []})

        clients = []
        for number, name in enumerate(arrivals):
            clients.append(asyncio.create_task(chats(name)))
            await waiting(program, number + 1)
        worker = await program.director.worker()
        await worker.saw("paused", "loading")

        status, headers, refused = await chats("many")
        assert (status, refused["error"]["code"]) == (503, "not_admitted")
        assert refused["error"]["message"] == f"{LIMIT} requests already wait."
        assert 1 <= int(headers["retry-after"]) <= 120

        worker.open("loading")
        answers = await asyncio.gather(*clients)
        assert {status for status, _, _ in answers} == {200}
        assert all(float(headers["x-cold-start"]) > 0 for _, headers, _ in answers)
        turns = [said["turn"] for _, _, said in answers]
        assert [turns.index(turn) for turn in range(LIMIT)] == fair(arrivals)

        await worker.saw("gone")
        while (now := await endpoint(program))["workers"][0]["state"] != "ended":
            pass
        assert (now["waiting"], now["in_flight"], now["capacity"], now["error"]) == (0, 0, 0, None)

        status, headers, _ = await chats("few")
        assert (status, "x-cold-start" in headers) == (200, True)
        assert (await program.director.worker()).pid != worker.pid
        assert await program.end(signal.SIGTERM) == 0
