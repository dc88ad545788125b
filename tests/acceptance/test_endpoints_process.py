"""`python -m gateway serve --endpoints FILE`: several endpoints, and what a reload does to them."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from tests.gateway_process import CHAT, Program, chunk, completion, gateway
from tests.scripted_app import Pause, answer, stream
from tests.scripted_worker import Director, Scripts, Worker
from tests.servers import KEY

MESSAGES: Any = [{"role": "user", "content": "hi"}]
WHOLE, STREAM = "POST /v1/completions", CHAT
KEYS: Mapping[str, Mapping[str, object]] = {
    "of chat": {"endpoints": ["chat"]},
    "of b": {"models": ["org/b"]},
    "admin": {"admin": True},
}
RELOADS = 10
CLIENTS = 8


class Cast(Director):
    """Gives each worker the scripts of its `MODEL_NAME`, each as often as it is asked, and `slots` places."""

    def __init__(self, path: Path, scripts: Mapping[str, Scripts], slots: int = 16) -> None:
        super().__init__(path, repeat=True)
        self._scripts = scripts
        self._slots = slots
        self.started: list[Worker] = []

    def play_for(self, worker: Worker) -> tuple[Sequence[Sequence[str]], Scripts]:
        """By the model."""
        self.started.append(worker)
        return [("ready", str(self._slots))], self._scripts[worker.env["MODEL_NAME"]]


def endpoint(endpoint_id: str, model: str, *lines: str, settings: Mapping[str, object] | None = None) -> str:
    """One table of endpoints.toml."""
    own = [f"{name} = {json.dumps(value)}" for name, value in (settings or {}).items()]
    table = ["[[endpoint]]", f'id = "{endpoint_id}"', f'model = "{model}"', *lines]
    return "\n".join([*table, "[endpoint.settings]", *own, ""])


class Served(Program):
    """A gateway with an endpoints.toml."""

    file: Path
    root: str

    def write(self, *tables: str) -> None:
        """Have the file hold these."""
        self.file.write_text("\n".join(tables))

    def at(self, endpoint_id: str, key: str = KEY) -> openai.AsyncOpenAI:
        """The official client of an endpoint."""
        return openai.AsyncOpenAI(
            base_url=f"{self.root}/v2/{endpoint_id}/openai/v1", api_key=key, max_retries=0
        )

    async def admin(
        self, method: str, path: str, body: object = None, key: str = KEY
    ) -> tuple[int, dict[str, Any]]:
        """Status and answer of the admin API."""
        headers = {"authorization": f"Bearer {key}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.request(method, f"{self.root}/admin/{path}", json=body) as reply,
        ):
            return reply.status, await reply.json()

    async def until(self, holds: Callable[[Any], bool]) -> None:
        """Return once the status of the endpoints `holds`."""
        while not holds((await self.admin("GET", "status"))[1]["endpoints"]):
            pass

    async def workers(self, endpoint_id: str) -> list[tuple[int, str]]:
        """Process and state of each worker of an endpoint that lives."""
        _, status = await self.admin("GET", "status")
        (shown,) = [one for one in status["endpoints"] if one["id"] == endpoint_id]
        return [(one["pid"], one["state"]) for one in shown["workers"] if one["reason"] is None]


@asynccontextmanager
async def served(
    tmp_path: Path, cast: Cast, *tables: str, environ: Mapping[str, str] | None = None
) -> AsyncIterator[Served]:
    """`python -m gateway serve --endpoints`, with these tables in the file."""
    file = tmp_path / "endpoints.toml"
    file.write_text("\n".join(tables))
    environ = {"MODEL_NAME": "", "START": "first_request", **(environ or {})}
    arguments = ["serve", "--endpoints", str(file)]
    async with gateway(tmp_path, environ=environ, arguments=arguments, director=cast) as program:
        running = Served(program.process, program.director)
        running.file = file
        running.root = (await running.line(r"http://127\.0\.0\.1:\d+")).group()
        yield running


def says(text: str, *gates: str) -> Scripts:
    """Answers with `text`, streamed and whole, the streams with `gates` in their midst."""
    whole = answer({"id": "c", "object": "text_completion", "created": 1, "model": text, "choices": []})
    return {STREAM: stream(chunk(text), *map(Pause, gates), chunk("end")), WHOLE: whole}


async def streamed(client: openai.AsyncOpenAI) -> list[str | None]:
    """The texts of a streamed answer."""
    reply = await client.chat.completions.create(model="", messages=MESSAGES, stream=True)
    return [part.choices[0].delta.content async for part in reply]


async def test_each_endpoint_answers_for_the_keys_that_may_use_it(tmp_path: Path) -> None:
    """Two endpoints and three keys: one for an endpoint, one for a model, one of an admin."""
    models = {"org/a": {CHAT: completion("A")}, "org/b": {CHAT: completion("B")}}
    cast = Cast(tmp_path / "control", models)

    async def asked(endpoint_id: str, model: str, key: str) -> str | tuple[int, str | None]:
        async with running.at(endpoint_id, key) as client:
            try:
                done = await client.chat.completions.create(model=model, messages=MESSAGES)
            except openai.APIStatusError as error:
                return error.status_code, error.code
            return str(done.choices[0].message.content)

    async with served(tmp_path, cast, endpoint("chat", "org/a"), endpoint("code", "org/b")) as running:
        made = {
            name: (await running.admin("POST", "keys", {"name": name, **what}))[1]["key"]
            for name, what in KEYS.items()
        }
        found = {
            name: [await asked("chat", "org/a", key), await asked("code", "org/b", key)]
            for name, key in made.items()
        }
        assert found == {
            "of chat": ["A", (404, "endpoint_not_found")],
            "of b": [(404, "model_not_found"), "B"],
            "admin": ["A", "B"],
        }
        assert await asked("chat", "org/b", made["admin"]) == "A"  # the worker says what it serves
        assert await asked("other", "org/a", made["admin"]) == (404, "endpoint_not_found")
        admitted = {name: (await running.admin("GET", "status", key=key))[0] for name, key in made.items()}
        assert admitted == {"of chat": 403, "of b": 403, "admin": 200}
        assert (await running.admin("GET", "status", key="ft-none"))[0] == 401
        assert {worker.env["MODEL_NAME"] for worker in cast.started} == {"org/a", "org/b"}
        assert await running.end(signal.SIGTERM) == 0


async def test_no_request_is_lost_across_ten_reloads(tmp_path: Path) -> None:
    """Streams and whole answers all the while; one stream is held from the first worker to the last."""
    cast = Cast(
        tmp_path / "control", {"org/a": says("a"), "org/held": says("held", "held"), "org/x": says("x")}
    )
    asked: list[object] = []
    over = asyncio.Event()
    news = asyncio.Condition()

    async def load(ask: Callable[[], Awaitable[object]]) -> None:
        while not over.is_set():
            answered = await ask()
            async with news:
                asked.append(answered)
                news.notify_all()

    async def answered_since(before: int) -> None:
        async with news:
            await news.wait_for(lambda: len(asked) >= before + 2 * CLIENTS)

    first = endpoint("chat", "org/a", settings={"MAX_MODEL_LEN": 0})
    async with (
        served(tmp_path, cast, first, endpoint("held", "org/held")) as running,
        running.at("chat") as client,
        running.at("held") as held,
    ):
        reply = await held.chat.completions.create(model="", messages=MESSAGES, stream=True)
        assert (await anext(reply)).choices[0].delta.content == "held"

        async def whole() -> object:
            return (await client.completions.create(model="", prompt="hi")).model

        tasks = [asyncio.create_task(load(ask)) for ask in (whole, lambda: streamed(client)) * (CLIENTS // 2)]
        for number in range(1, RELOADS + 1):
            await answered_since(len(asked))
            tables = [
                endpoint(
                    "chat", "org/a", f"queue_limit = {100 + number}", settings={"MAX_MODEL_LEN": number // 2}
                ),
                endpoint("held", "org/held", settings={"MAX_MODEL_LEN": number}),
                *([endpoint("extra", "org/x")] if number % 2 else []),
            ]
            running.write(*tables)
            status, changes = await running.admin("POST", "reload")
            assert (status, changes["changed"]) == (200, ["chat", "held"])
            assert (changes["added"], changes["removed"]) == (
                (["extra"], []) if number % 2 else ([], ["extra"])
            )
        await answered_since(len(asked))
        over.set()
        await asyncio.gather(*tasks)
        assert {json.dumps(one) for one in asked} == {'"a"', '["a", "end"]'}
        lengths = [w.env["MAX_MODEL_LEN"] for w in cast.started if w.env["MODEL_NAME"] == "org/a"]
        assert lengths == [str(number) for number in range(RELOADS // 2 + 1)]
        (holder,) = [worker for worker in cast.started if worker.env["MODEL_NAME"] == "org/held"]
        holder.open("held")
        assert [part.choices[0].delta.content async for part in reply] == ["end"]
        await holder.saw("gone")
        assert await running.end(signal.SIGTERM) == 0


async def test_bounds_change_and_no_worker_is_replaced(tmp_path: Path) -> None:
    """Numbers of workers, the queue, prices: the process that was there goes on."""
    cast = Cast(tmp_path / "control", {"org/a": says("a")})
    async with (
        served(tmp_path, cast, endpoint("chat", "org/a")) as running,
        running.at("chat") as client,
    ):
        assert await streamed(client) == ["a", "end"]
        before = await running.workers("chat")
        running.write(
            endpoint(
                "chat",
                "org/a",
                "max_workers = 3",
                "idle_timeout_s = 7",
                "queue_limit = 1",
                "price_input = 0.5",
            )
        )
        _, changes = await running.admin("POST", "reload")
        assert changes == {"added": [], "changed": ["chat"], "removed": [], "unchanged": [], "notes": []}
        assert await running.workers("chat") == before
        _, status = await running.admin("GET", "status")
        shown = status["endpoints"][0]
        assert (shown["max_workers"], shown["idle_timeout_s"]) == (3, 7)
        _, changes = await running.admin("POST", "reload")
        assert (changes["changed"], changes["unchanged"]) == ([], ["chat"])
        assert len(cast.started) == 1


async def test_a_removed_endpoint_serves_whom_it_has_let_in(tmp_path: Path) -> None:
    """Who runs and who waits are answered by its worker, who comes gets a 404, then the worker ends."""
    cast = Cast(tmp_path / "control", {"org/a": says("a", "held"), "org/b": says("b")}, slots=1)
    async with (
        served(tmp_path, cast, endpoint("chat", "org/a"), endpoint("code", "org/b")) as running,
        running.at("chat") as client,
    ):
        first = asyncio.create_task(streamed(client))
        worker = await cast.worker()
        await worker.saw("paused", "held")
        second = asyncio.create_task(streamed(client))
        await running.until(lambda endpoints: endpoints[0]["waiting"] == 1)
        running.write(endpoint("code", "org/b"))
        _, changes = await running.admin("POST", "reload")
        assert changes["removed"] == ["chat"]
        with pytest.raises(openai.NotFoundError) as gone:
            await streamed(client)
        assert gone.value.code == "endpoint_not_found"
        worker.open("held")
        assert [*await asyncio.gather(first, second)] == [["a", "end"]] * 2
        await worker.saw("gone")
        assert len(cast.started) == 1
        assert await running.end(signal.SIGTERM) == 0


async def test_who_waits_for_a_worker_that_can_not_start_is_served_by_its_successor(tmp_path: Path) -> None:
    """The setting is put right while its first worker still starts: the request that waits is answered."""

    class Slow(Cast):
        def play_for(self, worker: Worker) -> tuple[Sequence[Sequence[str]], Scripts]:
            start, scripts = super().play_for(worker)
            return ([("pause", "loading")] if worker.env["MAX_MODEL_LEN"] == "1" else start), scripts

    cast = Slow(tmp_path / "control", {"org/a": says("a")})
    wrong = endpoint("chat", "org/a", settings={"MAX_MODEL_LEN": 1})
    async with served(tmp_path, cast, wrong) as running, running.at("chat") as client:
        waiting = asyncio.create_task(streamed(client))
        await (await cast.worker()).saw("paused", "loading")
        running.write(endpoint("chat", "org/a", settings={"MAX_MODEL_LEN": 2}))
        await running.admin("POST", "reload")
        assert await waiting == ["a", "end"]
        await cast.started[0].saw("gone")
        assert await running.end(signal.SIGTERM) == 0


async def test_a_faulty_file_changes_nothing_and_is_told(tmp_path: Path) -> None:
    """In the answer and in the log, by SIGHUP and by the admin API; the next one that is right counts."""
    cast = Cast(tmp_path / "control", {"org/a": says("a"), "org/b": says("b")})
    async with (
        served(tmp_path, cast, endpoint("chat", "org/a")) as running,
        running.at("chat") as client,
        running.at("code") as code,
    ):
        running.write(endpoint("chat", "org/b", "max_worker = 2"), endpoint("chat", "org/b"))
        status, told = await running.admin("POST", "reload")
        file = running.file
        assert (status, told["error"]["code"]) == (422, "bad_settings")
        assert told["error"]["message"] == (
            f"Nothing has changed: {file}: endpoint 1 'chat': max_worker is no key; "
            "the nearest is max_workers; "
            f"{file}: endpoint 2 'chat': id = 'chat' is another endpoint's too."
        )
        running.process.send_signal(signal.SIGHUP)
        assert await streamed(client) == ["a", "end"]
        running.write(endpoint("chat", "org/a"), endpoint("code", "org/b"))
        running.process.send_signal(signal.SIGHUP)
        await running.until(lambda endpoints: endpoints[-1]["id"] == "code")
        assert await streamed(code) == ["b", "end"]
        assert await running.end(signal.SIGTERM) == 0
        errors = await running.errors()
        assert errors.count("max_worker is no key") == 2
        assert "endpoints reloaded added=('code',)" in errors


async def test_one_endpoint_that_can_not_start_is_no_other_ones_concern(tmp_path: Path) -> None:
    """The gateway stays, the other endpoint answers, and status says what is wrong."""

    class Failing(Cast):
        def play_for(self, worker: Worker) -> tuple[Sequence[Sequence[str]], Scripts]:
            start, scripts = super().play_for(worker)
            return ([("exit", "66")] if worker.env["MODEL_NAME"] == "org/b" else start), scripts

    cast = Failing(tmp_path / "control", {"org/a": says("a"), "org/b": says("b")})
    tables = [endpoint("chat", "org/a"), endpoint("code", "org/b")]
    async with (
        served(tmp_path, cast, *tables, environ={"START": "now"}) as running,
        running.at("chat") as client,
        running.at("code") as code,
    ):
        with pytest.raises(openai.InternalServerError) as failed:
            await streamed(code)
        assert (failed.value.status_code, failed.value.code) == (503, "worker_start_failed")
        assert await streamed(client) == ["a", "end"]
        _, status = await running.admin("GET", "status")
        assert "the model was not found" in status["endpoints"][1]["error"]
        assert status["endpoints"][0]["error"] is None
        assert await running.end(signal.SIGTERM) == 0


async def test_a_gateway_without_a_file_says_that_there_is_nothing_to_reload(tmp_path: Path) -> None:
    """And serves on."""
    environ = {"START": "first_request"}
    async with (
        gateway(tmp_path, environ=environ) as program,
        aiohttp.ClientSession(headers={"authorization": f"Bearer {KEY}"}) as session,
    ):
        await program.address()
        async with session.post(program.base_url.split("/v2")[0] + "/admin/reload") as reply:
            assert reply.status == 422
            assert "no ENDPOINTS_FILE is set" in (await reply.json())["error"]["message"]
        assert await program.end(signal.SIGTERM) == 0


async def test_bad_endpoints_end_a_start_with_78(tmp_path: Path) -> None:
    """Before anything listens."""
    cast = Cast(tmp_path / "control", {})
    file = tmp_path / "endpoints.toml"
    file.write_text(endpoint("chat", "org/a", "zzz = 1"))
    async with gateway(tmp_path, arguments=["serve", "--endpoints", str(file)], director=cast) as program:
        assert await program.end() == 78
        assert "endpoint 1 'chat': zzz is no key; allowed: id, model" in await program.errors()
