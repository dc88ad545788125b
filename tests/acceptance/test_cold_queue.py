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

from tests.gateway_process import CHAT, Program, gateway
from tests.scripted_app import answer
from tests.scripted_worker import READY
from tests.servers import KEY

SHARES = {"many": 100, "some": 60, "few": 40}
LIMIT = sum(SHARES.values())
COLD = {"START": "first_request", "QUEUE_LIMIT": str(LIMIT), "IDLE_TIMEOUT_S": "1"}
ONE_AT_A_TIME: Sequence[Sequence[str]] = (("pause", "loading"), ("ready", "1"))


Answer = tuple[int, Mapping[str, str], Any]
"""Status, headers and JSON."""


class Client:
    """Asks a running gateway, as many requests at once as there are."""

    def __init__(self, program: Program, session: aiohttp.ClientSession) -> None:
        self._base = program.base_url.partition("/v2/")[0]
        self._session = session

    async def asks(self, path: str, key: str, body: object = None) -> Answer:
        """The answer to a POST of `body`, or to a GET."""
        method, headers = "GET" if body is None else "POST", {"authorization": f"Bearer {key}"}
        async with self._session.request(method, self._base + path, json=body, headers=headers) as reply:
            return reply.status, reply.headers, await reply.json()

    async def chats(self, key: str) -> Answer:
        """The answer to a chat request."""
        return await self.asks("/v2/local/openai/v1/chat/completions", key, {"messages": []})

    async def endpoint(self) -> Mapping[str, Any]:
        """The only endpoint, as an admin sees it."""
        _, _, status = await self.asks("/admin/status", KEY)
        (only,) = status["endpoints"]
        assert isinstance(only, dict)
        return only

    async def waiting(self, count: int) -> None:
        """Return once so many requests wait."""
        while (await self.endpoint())["waiting"] != count:
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
    second: tuple[object, object] = (READY, {CHAT: answer({})})
    async with (
        gateway(tmp_path, (ONE_AT_A_TIME, scripts), second, environ=COLD) as program,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        await program.address()
        client = Client(program, session)
        keys = {}
        for name in SHARES:
            _, _, made = await client.asks("/admin/keys", KEY, {"name": name})
            keys[name] = made["key"]
        arrivals = [name for name, share in SHARES.items() for _ in range(share)]
        random.Random(7).shuffle(arrivals)
        assert (await client.endpoint())["workers"] == []

        asking = []
        for number, name in enumerate(arrivals):
            asking.append(asyncio.create_task(client.chats(keys[name])))
            await client.waiting(number + 1)
        worker = await program.director.worker()
        await worker.saw("paused", "loading")

        status, headers, refused = await client.chats(keys["many"])
        assert (status, refused["error"]["code"]) == (503, "not_admitted")
        assert refused["error"]["message"] == f"{LIMIT} requests already wait."
        assert 1 <= int(headers["retry-after"]) <= 120

        worker.open("loading")
        answers = await asyncio.gather(*asking)
        assert {status for status, _, _ in answers} == {200}
        assert all(float(headers["x-cold-start"]) > 0 for _, headers, _ in answers)
        turns = [said["turn"] for _, _, said in answers]
        assert [turns.index(turn) for turn in range(LIMIT)] == fair(arrivals)

        await worker.saw("gone")
        while (now := await client.endpoint())["workers"][0]["state"] != "ended":
            pass
        assert (now["waiting"], now["in_flight"], now["capacity"], now["error"]) == (0, 0, 0, None)

        status, headers, _ = await client.chats(keys["few"])
        assert (status, "x-cold-start" in headers) == (200, True)
        assert (await program.director.worker()).pid != worker.pid
        assert await program.end(signal.SIGTERM) == 0
