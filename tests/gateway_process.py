"""`python -m gateway` as a process, with workers that have no engine: scripted ones, or steady ones."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import openai

from tests.scripted_app import Script, answer
from tests.scripted_worker import Director, Worker
from tests.servers import KEY, ROOT

CHAT = "POST /v1/chat/completions"


def chunk(text: str) -> str:
    """One chunk of a chat stream."""
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return json.dumps(body, separators=(",", ":"))


def completion(text: str) -> Script:
    """A whole chat answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return answer({"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})


def main_with(worker: str, before: str = "") -> str:
    """A program that is the command's own `main`; its workers are those of the module `worker`.

    `before` are statements that come first.
    """
    return (
        f"import sys; {before}from gateway.__main__ import main; from {worker} import COMMAND; "
        "sys.exit(main(sys.argv[1:], COMMAND))"
    )


SCRIPTED = main_with("tests.scripted_worker")
RUNPODS_SDK = main_with("tests.runpod_worker")


@asynccontextmanager
async def running(
    program: str,
    folder: Path,
    environ: Mapping[str, str],
    *,
    arguments: Sequence[str] = (),
    stderr: Path | None = None,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`program` (see `main_with`) on a free port, with its data in `folder`; killed at the end if it runs.

    Its stderr is a pipe, or added to the file `stderr`.
    """
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "VIRTUAL_ENV") if name in os.environ}
    own = {
        "PORT": "0",
        "API_KEY": KEY,
        "MODEL_NAME": "org/model",
        "WARM_PARENT": "off",
        "TMPDIR": str(folder),
        "DATA_DIR": str(folder / "data"),
    }
    with ExitStack() as stack:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program, *arguments),
            env={**kept, **own, **environ},
            cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=stack.enter_context(stderr.open("a")) if stderr else asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def root_of(process: asyncio.subprocess.Process, stderr: Path) -> str:
    """`http://127.0.0.1:PORT` of a gateway that starts; fails with the end of `stderr` if it ends instead."""
    assert process.stdout is not None
    while line := await process.stdout.readline():
        if found := re.search(r"(http://\S+)/v2/local/openai/v1", line.decode()):
            return found[1]
    raise AssertionError((await asyncio.to_thread(stderr.read_text))[-4000:])


class Program:
    """A running gateway, as the person who started it sees it."""

    def __init__(self, process: asyncio.subprocess.Process, director: Director) -> None:
        self.process = process
        self.director = director
        self.base_url = ""
        self.out: list[str] = []
        self._client: openai.AsyncOpenAI | None = None

    async def line(self, pattern: str) -> re.Match[str]:
        """The next line of stdout that holds `pattern`."""
        assert self.process.stdout is not None
        while raw := await self.process.stdout.readline():
            self.out.append(raw.decode())
            if found := re.search(pattern, self.out[-1]):
                return found
        raise AssertionError(f"no line with {pattern!r} in {self.out}")

    async def address(self) -> None:
        """Read the one line that says where it is."""
        self.base_url = (await self.line(r"http://127\.0\.0\.1:\d+/v2/local/openai/v1")).group()

    async def errors(self) -> str:
        """Everything on stderr, once it has ended."""
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()

    async def end(self, signum: signal.Signals | None = None) -> int:
        """The exit code, after `signum`."""
        if signum is not None:
            self.process.send_signal(signum)
        return await self.process.wait()

    def client(self) -> openai.AsyncOpenAI:
        """The official client, which tries once only: what we retry, we retry ourselves."""
        return openai.AsyncOpenAI(base_url=self.base_url, api_key=KEY, max_retries=0)


@asynccontextmanager
async def gateway(
    tmp_path: Path,
    *plays: tuple[object, object],
    environ: Mapping[str, str] | None = None,
    program: str = SCRIPTED,
    arguments: Sequence[str] = (),
    director: Director | None = None,
) -> AsyncIterator[Program]:
    """`python -m gateway` whose nth worker plays the nth of `plays`, or by `director`."""
    director = director or Director(tmp_path / "control", *plays)  # type: ignore[arg-type]
    told = {"SCRIPT_CONTROL": str(tmp_path / "control"), **(environ or {})}
    async with director.listening(), running(program, tmp_path, told, arguments=arguments) as process:
        yield Program(process, director)


async def started(program: Program) -> Worker:
    """The next worker, with the gateway's address known."""
    worker = await program.director.worker()
    await program.address()
    return worker


async def command(
    *arguments: str, env: Mapping[str, str], stdin: str = "", file_max_bytes: int | None = None
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python -m gateway ARGUMENTS`, with nothing but `env` set.

    With `file_max_bytes` it has a disk on which no file can be larger.
    """
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (file_max_bytes or 0, -1))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", *arguments),
        env=dict(env),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=None if file_max_bytes is None else full,
    )
    out, errors = await process.communicate(stdin.encode())
    assert process.returncode is not None
    return process.returncode, out.decode(), errors.decode()


def person(folder: Path, **more: str) -> dict[str, str]:
    """The environment of the person who has started the gateway of `folder`."""
    return {"PATH": os.environ["PATH"], "HOME": str(folder), "DATA_DIR": str(folder / "data"), **more}


async def beside(
    folder: Path, *arguments: str, stdin: str = "", file_max_bytes: int | None = None
) -> tuple[int, str, str]:
    """`command` beside the gateway of `folder`."""
    return await command(*arguments, env=person(folder), stdin=stdin, file_max_bytes=file_max_bytes)
