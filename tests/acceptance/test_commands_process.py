"""The commands that ask a running gateway, as processes: status, logs, check, and chat in a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import stat
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.test_endpoints_process import Cast, Served, endpoint, served
from tests.gateway_process import CHAT, beside, chunk, command, person
from tests.scripted_app import Pause, answer, stream
from tests.scripted_worker import Scripts
from tests.servers import KEY, ROOT

MODELS = "GET /v1/models"
CLEAR = "\x1b[2K"
IN_FRONT = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Runs a command in front of the terminal that is its standard input, so that Ctrl-C is a signal to it.

A shell's background jobs ignore that, and what they start."""


def usage(tokens: int) -> str:
    """The last chunk of a stream that was asked for usage."""
    used = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
    return json.dumps(
        {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": [], "usage": used}
    )


def talks(*steps: Any) -> Scripts:
    """A model that says `steps`."""
    return {
        MODELS: answer({"object": "list", "data": [{"id": "org/a", "object": "model"}]}),
        CHAT: stream(*steps, usage(3)),
    }


class Terminal:
    """A person at a terminal, in which `python -m gateway` runs."""

    def __init__(self, master: int, process: asyncio.subprocess.Process) -> None:
        self._master = master
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self.process = process
        self.shown = ""
        self._loop.add_reader(master, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._master, 65536)
        except OSError:  # nobody has the other end
            data = b""
        if not data:
            self._loop.remove_reader(self._master)
        self.shown += data.decode(errors="replace")
        self._news.set()

    async def sees(self, text: str) -> str:
        """All that was shown up to `text`, which is then forgotten."""
        while text not in self.shown:
            self._news.clear()
            await self._news.wait()
        seen, _, self.shown = self.shown.partition(text)
        return seen

    def types(self, text: str) -> None:
        """Type, and press return."""
        os.write(self._master, text.encode() + b"\n")

    def presses(self, key: str) -> None:
        """Press one key with Ctrl."""
        os.write(self._master, bytes([ord(key) & 0x1F]))


@asynccontextmanager
async def terminal(*arguments: str, env: Mapping[str, str]) -> AsyncIterator[Terminal]:
    """`python -m gateway` with a terminal of its own."""
    master, slave = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", IN_FRONT, sys.executable, "-m", "gateway", *arguments),
        cwd=ROOT,
        env={**env, "TERM": "xterm", "COLUMNS": "200"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    seen = Terminal(master, process)
    try:
        yield seen
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        seen._loop.remove_reader(master)
        os.close(master)


@asynccontextmanager
async def talking(tmp_path: Path, scripts: Scripts) -> AsyncIterator[tuple[Served, Cast]]:
    """A gateway whose endpoint `chat` has a model that plays `scripts`, and another one."""
    cast = Cast(tmp_path / "control", {"org/a": scripts, "org/b": {}})
    async with served(tmp_path, cast, endpoint("chat", "org/a"), endpoint("code", "org/b")) as running:
        yield running, cast


async def test_chat_streams_remembers_and_stops(tmp_path: Path) -> None:
    """The wait is shown, then the answer and its figures; Ctrl-C stops an answer, a second one leaves."""
    scripts = {
        **talks(),
        CHAT: [
            stream(chunk("Hel"), chunk("lo\x1b[31m!"), usage(2)),
            stream(chunk("again"), usage(1)),
            stream(chunk("for ever"), Pause("never")),
        ],
    }
    async with (
        talking(tmp_path, scripts) as (_, cast),
        terminal("chat", "--system", "Be brief.", env=person(tmp_path)) as user,
    ):
        assert "of endpoint chat" in await user.sees("> ")
        user.types("Hi")
        seen = await user.sees("]\r\n> ")
        assert "Hello\N{REPLACEMENT CHARACTER}[31m!" in seen
        assert re.search(r"\[first token after \d+\.\d\d s, 2 tokens, \d+\.\d tokens/s$", seen)
        user.types("/model nope")
        assert "endpoint chat has no nope; it has org/a\r\n" in await user.sees("> ")
        user.types("/model org/a")
        assert "has no" not in await user.sees("> ")
        user.types("/system Be long.")
        await user.sees("> ")
        user.types("More")
        await user.sees("again")
        await user.sees("> ")
        user.types(f"/save {tmp_path}/said.json")
        await user.sees("> ")
        user.types("And more")
        await user.sees("for ever")
        user.presses("C")
        await user.sees("[stopped]")
        await user.sees("> ")
        await cast.started[0].saw("disconnected", CHAT)
        user.presses("C")
        assert await user.process.wait() == 0
    said = tmp_path / "said.json"
    assert stat.S_IMODE(said.stat().st_mode) == 0o600
    assert json.loads(said.read_text()) == {
        "model": "org/a",
        "messages": [
            {"role": "system", "content": "Be long."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello\x1b[31m!"},
            {"role": "user", "content": "More"},
            {"role": "assistant", "content": "again"},
        ],
    }
    typed = tmp_path / "data" / "chat_history"
    assert stat.S_IMODE(typed.stat().st_mode) == 0o600
    assert "And more" in typed.read_text()


async def test_chat_shows_that_a_worker_starts(tmp_path: Path) -> None:
    """With what it does; and an error is a line, after which the next question may be asked."""

    class Slow(Cast):
        def play_for(self, worker: Any) -> Any:
            _, scripts = super().play_for(worker)
            return [("status", "loading weights"), ("pause", "loading"), ("ready",)], scripts

    scripts = {**talks(chunk("Hello")), MODELS: answer({"object": "list", "data": [{"id": "org/a"}]})}
    cast = Slow(tmp_path / "control", {"org/a": scripts})
    async with (
        served(tmp_path, cast, endpoint("chat", "org/a")) as running,
        terminal("chat", "--model", "org/other", env=person(tmp_path)) as user,
    ):
        await user.sees("> ")
        user.types("Hi")
        await user.sees("[The model `org/other` does not exist.")
        await user.sees("> ")
        user.types("/model org/a")
        await user.sees("> ")
        user.types("Hi")
        await user.sees("[a worker starts: loading weights, ")
        (await cast.worker()).open("loading")
        assert CLEAR in await user.sees("Hello")
        await user.sees("> ")
        user.presses("D")
        assert await user.process.wait() == 0
        assert await running.end(signal.SIGTERM) == 0


async def test_chat_answers_a_pipe_once_without_decoration(tmp_path: Path) -> None:
    """Only the answer is on standard output; the model is the endpoint's own."""
    async with talking(tmp_path, talks(chunk("Hel"), chunk("lo"))) as (running, _):
        assert await beside(tmp_path, "chat", stdin="hi\n") == (0, "Hello\n", "")
        code, out, errors = await beside(tmp_path, "chat", "--endpoint", "other", stdin="hi")
        assert (code, out) == (69, "")
        assert errors == "firsttoken: The endpoint `other` does not exist. (endpoint_not_found)\n"
        assert (await beside(tmp_path, "chat", stdin=" "))[0] == 64
        url = f"{running.root}/v2/chat/openai/v1"
        elsewhere = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MY_KEY": KEY}
        answered = await command("chat", "--url", url, "--key-from-env", "MY_KEY", stdin="hi", env=elsewhere)
        assert answered == (0, "Hello\n", "")
        _, used, _ = await beside(tmp_path, "usage", "--by", "key", "--csv")
        assert [line.split(",")[:3] for line in used.splitlines()[1:]] == [
            ["door", "this machine", "1"],
            ["env", "API_KEY", "1"],
        ]
        code, _, errors = await command("chat", "--url", url, stdin="hi", env=elsewhere)
        assert (code, "API_KEY is not set" in errors) == (78, True)


async def test_status_is_a_table_and_json(tmp_path: Path) -> None:
    """Endpoints, workers and the tokens that were just used, over the door that needs no key."""
    async with talking(tmp_path, talks(chunk("Hello"))) as (running, cast):
        assert (await beside(tmp_path, "chat", stdin="hi"))[0] == 0
        code, out, errors = await beside(tmp_path, "status")
        assert (code, errors) == (0, "")
        lines = [line.split() for line in out.splitlines()]
        assert [" ".join(line) for line in lines[2:5]] == [
            "endpoint model workers running waiting places jobs tokens today",
            "chat org/a 1 ready (of 0 to 1) 0 0 16 0 10",
            "code org/b none (of 0 to 1) 0 0 0 0 0",
        ]
        worker = lines[7]
        assert (worker[0], worker[2], worker[3]) == ("chat", "ready", str(cast.started[0].pid))
        code, out, _ = await beside(tmp_path, "status", "--json")
        told = json.loads(out)
        assert (code, told) == (
            0,
            (await running.admin("GET", "status"))[1] | {"endpoints": told["endpoints"]},
        )
        assert [one["id"] for one in told["endpoints"]] == ["chat", "code"]
        async with terminal("status", "--watch", "--every", "0.05", env=person(tmp_path)) as user:
            await user.sees("\x1b[H\x1b[J")
            await user.sees("\x1b[H\x1b[J")
            user.presses("C")
            assert await user.process.wait() == 0


async def test_logs_show_what_workers_write(tmp_path: Path) -> None:
    """Of all or of one; with --follow also what is yet to come, until the gateway stops."""

    class Loud(Cast):
        def play_for(self, worker: Any) -> Any:
            start, scripts = super().play_for(worker)
            return [("write", f"I am {worker.env['MODEL_NAME']}"), *start], scripts

    cast = Loud(tmp_path / "control", {"org/a": talks(chunk("Hello")), "org/b": talks(chunk("Hi"))})
    tables = [endpoint("chat", "org/a"), endpoint("code", "org/b")]
    async with (
        served(tmp_path, cast, *tables) as running,
        terminal("logs", "--follow", env=person(tmp_path)) as user,
    ):
        assert (await beside(tmp_path, "chat", stdin="hi"))[0] == 0
        await user.sees(" I am org/a")
        assert (await beside(tmp_path, "chat", "--endpoint", "code", stdin="hi"))[0] == 0
        await user.sees(" I am org/b")
        code, out, _ = await beside(tmp_path, "logs")
        assert code == 0
        said = [line.split() for line in out.splitlines() if "I am" in line]
        assert [(line[0], line[-1]) for line in said] == [("chat", "org/a"), ("code", "org/b")]
        name = said[1][1]
        assert (await beside(tmp_path, "logs", "--worker", name))[1].startswith(f"code {name} I am org/b\n")
        assert (await beside(tmp_path, "logs", "--endpoint", "chat", "--lines", "0"))[1] == ""
        code, _, errors = await beside(tmp_path, "logs", "--worker", "nobody")
        assert (code, errors) == (69, "firsttoken: There is no worker `nobody`. (not_found)\n")
        assert await running.end(signal.SIGTERM) == 0
        assert await user.process.wait() == 0


async def test_commands_say_that_no_gateway_runs(tmp_path: Path) -> None:
    """Also after one that was killed, whose socket is still there."""
    code, out, errors = await beside(tmp_path, "status")
    assert (code, out) == (69, "")
    assert errors.startswith(f"firsttoken: no gateway of this user runs with DATA_DIR={tmp_path}/data")
    async with talking(tmp_path, {}) as (running, _):
        door = tmp_path / "data" / "admin.sock"
        assert stat.S_IMODE(door.stat().st_mode) == 0o600
        await running.end(signal.SIGKILL)
        code, _, errors = await beside(tmp_path, "status")
        assert (code, "can't be reached" in errors) == (69, True)
    async with talking(tmp_path, {}) as (running, _):
        assert (await beside(tmp_path, "status"))[0] == 0
        assert await running.end(signal.SIGTERM) == 0
        assert not door.exists()


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"HOST": "999.1.1.1"}, 78, "HOST=999.1.1.1: "),
        ({"MODEL_NAME": "/nope"}, 66, "MODEL_NAME=/nope: there is no such folder"),
        ({"MODEL_NAME": "/nope", "UPSTREAM": "http", "UPSTREAM_URL": "http://127.0.0.1:1/v1"}, 0, ""),
    ],
)
async def test_check_finds_what_a_start_would_end_with(
    tmp_path: Path, settings: dict[str, str], code: int, said: str
) -> None:
    """An address that is none, a model's folder that is not there; what others serve is theirs to find."""
    found, _, errors = await command("check", env=person(tmp_path, **settings))
    assert (found, said in errors) == (code, True)


async def test_check_names_the_endpoint_whose_model_is_not_there(tmp_path: Path) -> None:
    """The others start without it, and all such are told at once."""
    file = tmp_path / "endpoints.toml"
    file.write_text(endpoint("chat", "org/a") + endpoint("code", "/nope") + endpoint("more", str(tmp_path)))
    code, out, errors = await beside(tmp_path, "check", "--endpoints", str(file))
    assert (code, out) == (66, "")
    assert errors.splitlines() == [
        "firsttoken: models are not there:",
        "  - endpoint 'code': MODEL_NAME=/nope: there is no such folder",
        f"  - endpoint 'more': MODEL_NAME={tmp_path}: the folder has no config.json, so it holds no model",
    ]


async def test_check_says_what_is_wrong_and_starts_nothing(tmp_path: Path) -> None:
    """With the exit code that a start would have."""
    file = tmp_path / "endpoints.toml"
    file.write_text(endpoint("chat", "org/a") + endpoint("code", "org/b", 'served_model_name = "b"'))
    code, out, errors = await beside(tmp_path, "check", "--endpoints", str(file))
    assert (code, errors) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["endpoint", "model", "upstream", "workers"],
        ["chat", "org/a", "local", "0", "to", "1"],
        ["code", "b", "local", "0", "to", "1"],
    ]
    file.write_text(endpoint("chat", "org/a", "max_worker = 1", "start = 1"))
    code, out, errors = await command(
        "check", env=person(tmp_path, ENDPOINTS_FILE=str(file), QUEUE_LIMIT="-1")
    )
    assert (code, out) == (78, "")
    assert errors.splitlines() == [
        "firsttoken: bad settings:",
        "  - QUEUE_LIMIT='-1' is not allowed; allowed: a whole number from 0 to 100000",
        f"  - {file}: endpoint 1 'chat': max_worker is no key; the nearest is max_workers",
        f"  - {file}: endpoint 1 'chat': start = 1 is not allowed; allowed: now, first_request",
    ]
    assert not (tmp_path / "data").exists()
