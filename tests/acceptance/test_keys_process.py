"""Keys and usage of `python -m gateway` as processes: what is kept, what is counted when it is killed."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from tests.gateway_process import CHAT, Program, beside, completion, gateway, started
from tests.scripted_app import Pause, Say, Script, answer, stream
from tests.scripted_worker import READY
from tests.servers import KEY
from tests.until import until

WAITS = {"START": "first_request"}
HELD, SHORT, WHOLE = 200, 200, 100
HALF = 4
"""How many tokens a stream has made before it pauses."""
FRAMES = 6


def names(folder: Path) -> list[str]:
    """What is in `folder`."""
    return sorted(path.name for path in folder.iterdir())


async def status_of(program: Program, key: str) -> int:
    """How a request with `key` is answered, by a route that starts no worker."""
    async with (
        aiohttp.ClientSession(headers={"authorization": f"Bearer {key}"}) as session,
        session.get(f"{program.base_url}/nothing") as reply,
    ):
        return reply.status


async def heard(program: Program, key: str, status: int) -> None:
    """Return once a request with `key` is answered so."""
    while (now := await status_of(program, key)) != status:
        assert now in {401, 404}


async def test_keys_outlive_the_gateway_and_are_made_and_revoked_beside_it(tmp_path: Path) -> None:
    """The first start prints one, a later one where to get one; a running gateway hears of each change."""
    environ = {**WAITS, "API_KEY": ""}
    async with gateway(tmp_path, environ=environ) as program:
        first = (await program.line(r"key (ft-\S{43})$")).group(1)
        await program.address()  # the snippet's
        assert await status_of(program, first) == 404

        code, out, errors = await beside(tmp_path, "keys", "create", "--name", "app", "--expires", "30d")
        made = out.strip()
        assert (code, out, made[:3], made in errors) == (0, f"{made}\n", "ft-", False)
        await heard(program, made, 404)
        assert (await beside(tmp_path, "keys", "revoke", "app"))[:2] == (0, "")
        await heard(program, made, 401)

        async with gateway(
            tmp_path / "data", environ={**environ, "DATA_DIR": str(tmp_path / "data")}
        ) as other:
            assert await other.end() == 75
            said = await other.errors()
        assert f"is another gateway's, process {program.process.pid}: end that one, or set DATA_DIR" in said
        assert await program.end(signal.SIGTERM) == 0
    async with gateway(tmp_path, environ=environ) as program:
        await program.line(r"key \$API_KEY$")
        await program.line(r"`python -m gateway keys create --name NAME` makes another$")
        await program.address()
        assert await status_of(program, first) == 404
        assert await status_of(program, made) == 401
        assert await program.end(signal.SIGTERM) == 0
    _, listed, _ = await beside(tmp_path, "keys", "list", "--all")
    head, *rows = listed.splitlines()
    assert head.split()[:2] == ["id", "name"]
    assert {row.split()[1]: row.split()[-1] for row in rows} == {"first": "admin", "app": "revoked"}


async def test_what_is_not_there_is_not_made_by_asking(tmp_path: Path) -> None:
    """A slip in DATA_DIR is no gateway that nobody has asked."""
    for arguments in (("usage",), ("keys", "list"), ("keys", "revoke", "app")):
        code, out, errors = await beside(tmp_path, *arguments)
        assert (code, out) == (74, "")
        kept = f"{tmp_path}/data/gateway.db"
        assert errors == f"firsttoken: nothing is kept in {kept}, there is no such file; see DATA_DIR\n"
    assert names(tmp_path) == []


async def test_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    """A key that could not be kept is not printed either."""
    assert (await beside(tmp_path, "keys", "create", "--name", "app"))[0] == 0
    with closing(sqlite3.connect(tmp_path / "data" / "gateway.db")) as another:  # as a gateway has it open
        another.execute("SELECT count(*) FROM keys")
        code, out, errors = await beside(tmp_path, "keys", "create", "--name", "more", file_max_bytes=0)
    assert (code, out, errors.count("\n")) == (74, "", 1)
    assert errors.startswith("firsttoken: the gateway's database can't be used: ")


async def test_a_key_is_not_lost_with_a_first_start_that_fails(tmp_path: Path) -> None:
    """It is printed before the gateway ends: the next start will print none."""
    play: tuple[object, object] = ((("say_why", "no such model", "66"), ("exit", "66")), {})
    async with gateway(tmp_path, play, environ={"API_KEY": ""}) as program:
        await program.line(r"^no worker was ready  .* key (ft-\S{43})$")
        assert await program.end() == 66


@dataclass
class Client:
    """One client, whose answer names a model of its own; what it saw until its connection ended."""

    model: str
    script: Script
    prompt: int
    tokens: int = 0
    whole: bool = False

    async def ask(self, session: aiohttp.ClientSession, url: str, finished: asyncio.Event) -> None:
        """Ask, and read until the end, whatever that is."""
        streams = self.model[0] != "w"
        try:
            async with session.post(f"{url}/chat/completions", json={"stream": streams}) as reply:
                assert reply.status == 200
                if not streams:
                    self.whole = await reply.json() != {}
                    finished.set()
                    return
                async for line in reply.content:
                    self.tokens += b'"content":"t"' in line
                    if line == b"data: [DONE]\n":
                        self.whole = True
                        finished.set()
        except (aiohttp.ClientError, json.JSONDecodeError):
            return

    def check(self, counted: Mapping[str, Any] | None) -> None:
        """What was counted is what this client saw."""
        names = ("requests", "prompt_tokens", "completion_tokens")
        found = None if counted is None else tuple(counted[name] for name in names)
        everything = (1, self.prompt, FRAMES)
        if self.whole or (
            found == everything and self.model[0] != "h"
        ):  # counted, and killed before it said so
            assert found == everything, self
        elif self.model[0] == "w":
            assert found is None, (self, found)
        else:
            assert found is not None, self
            assert found[:2] == (1, 0), (self, found)
            assert HALF <= found[2] <= self.tokens, (self, found)


def clients() -> list[Client]:
    """Streams that are cut for sure, and streams and whole answers that end when the gateway does."""
    return [
        *(_stream(f"h{number}", "never", number) for number in range(HELD)),
        *(_stream(f"s{number}", "go", number) for number in range(SHORT)),
        *(_whole(f"w{number}", number) for number in range(WHOLE)),
    ]


def _stream(model: str, gate: str, number: int) -> Client:
    def chunk(**delta: str) -> str:
        return json.dumps({"model": model, "choices": [{"delta": delta}]}, separators=(",", ":"))

    token, prompt = chunk(content="t"), 10 + number
    last = {"model": model, "choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": FRAMES}}
    half = [token] * HALF
    rest = [token] * (FRAMES - HALF)
    return Client(model, stream(chunk(role="assistant"), *half, Pause(gate), *rest, json.dumps(last)), prompt)


def _whole(model: str, number: int) -> Client:
    prompt = 100 + number
    body = answer({"model": model, "usage": {"prompt_tokens": prompt, "completion_tokens": FRAMES}})
    return Client(model, Script((Pause("go"), *body.steps), 200, body.headers), prompt)


def checkpoints(folder: Path) -> int:
    """How many streams are written down with all that they have made."""
    kept = sqlite3.connect(folder / "data" / "gateway.db")
    try:
        (number,) = kept.execute(
            "SELECT count(*) FROM open_requests WHERE completion_tokens = ?", (HALF,)
        ).fetchone()
        return int(number)
    finally:
        kept.close()


async def usage(folder: Path) -> dict[str, Any]:
    """What the command says, by model."""
    code, out, errors = await beside(folder, "usage", "--by", "model", "--json")
    assert code == 0, errors
    return {row["model"]: row for row in json.loads(out)["data"]}


async def test_every_answer_is_counted_once_though_the_gateway_is_killed(tmp_path: Path) -> None:
    """500 answers under way, `kill -9` when the first is whole: each counts for what its client saw, once."""
    asked = clients()
    play = ([("ready", str(len(asked)))], {CHAT: [client.script for client in asked]})
    environ = {"PRICE_INPUT": "1.5", "PRICE_OUTPUT": "2"}
    finished = asyncio.Event()
    async with (
        gateway(tmp_path, play, environ=environ) as program,
        aiohttp.ClientSession(
            headers={"authorization": f"Bearer {KEY}"}, connector=aiohttp.TCPConnector(limit=0)
        ) as session,
    ):
        worker = await started(program)
        tasks = []
        for number, client in enumerate(asked, 1):  # in order: the scripts are played as requests come
            tasks.append(asyncio.create_task(client.ask(session, program.base_url, finished)))
            await worker.saw("request", CHAT, number)
        await asyncio.to_thread(until, lambda: checkpoints(tmp_path) == HELD + SHORT)
        worker.open("go")
        await finished.wait()
        await program.end(signal.SIGKILL)
        await asyncio.gather(*tasks)
        await worker.saw("gone")
    assert sum(client.whole for client in asked) >= 1
    for _ in range(2):
        async with gateway(tmp_path, environ={**WAITS, **environ}) as program:
            await program.address()
            counted = await usage(tmp_path)
            await program.end(signal.SIGKILL)
        for client in asked:
            client.check(counted.get(client.model))
        assert all(
            row["cost"] == (row["prompt_tokens"] * 15 + row["completion_tokens"] * 20) / 10**7
            for row in counted.values()
        )
        assert counted.keys() <= {client.model for client in asked}
    assert checkpoints(tmp_path) == 0


async def test_usage_is_a_table_with_totals(tmp_path: Path) -> None:
    """Of what a client was answered a moment ago, beside the gateway that runs."""
    said = Say(json.dumps({"model": "m", "usage": {"prompt_tokens": 1000, "completion_tokens": 500}}))
    script = Script((said,), 200, completion("").headers)
    environ = {"PRICE_INPUT": "1.5", "PRICE_OUTPUT": "2"}
    async with gateway(tmp_path, (READY, {CHAT: script}), environ=environ) as program:
        await started(program)
        async with (
            aiohttp.ClientSession(headers={"authorization": f"Bearer {KEY}"}) as session,
            session.post(f"{program.base_url}/chat/completions", json={}) as reply,
        ):
            assert reply.status == 200
            await reply.read()
        code, out, _ = await beside(tmp_path, "usage", "--by", "key,model")
        assert code == 0
        assert out.splitlines() == [
            "key      model  requests  prompt  completion    cost",
            "API_KEY  m             1    1000         500  0.0025",
            "total                  1    1000         500  0.0025",
        ]
        assert await program.end(signal.SIGTERM) == 0
    code, _, errors = await beside(tmp_path, "usage", "--from", "yesterday")
    assert (code, "`--from` must be a day" in errors) == (64, True)
