"""Servers that tests ask: where they are, and clients for them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

ROOT = Path(__file__).parents[1]
KEY = "ft-test-key"
MODEL = "tinychat"
"""What clients call the model of the tests."""

MAX_MODEL_LEN = 1024
START_TIMEOUT_S = 170.0
"""A start takes 10 to 30 s, on a busy machine and with empty caches up to three times that."""
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI server at `base_url`, which ends with `/v1`; asked through `uds` if it has one."""

    base_url: str
    key: str = KEY
    uds: Path | None = None

    @property
    def _path(self) -> str | None:
        return str(self.uds) if self.uds else None

    def http(self) -> httpx.AsyncClient:
        """A bare client with the key, for URLs relative to `base_url`."""
        return httpx.AsyncClient(
            base_url=self.base_url,
            headers={"authorization": f"Bearer {self.key}"},
            transport=httpx.AsyncHTTPTransport(uds=self._path),
            timeout=START_TIMEOUT_S,
        )

    def client(self) -> openai.AsyncOpenAI:
        """The official asynchronous client, which tries once only."""
        # Any: the newest clients are typed for httpx2 and still take httpx.
        http: Any = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=self._path), timeout=START_TIMEOUT_S
        )
        return openai.AsyncOpenAI(base_url=self.base_url, api_key=self.key, max_retries=0, http_client=http)

    def sync_client(self) -> openai.OpenAI:
        """The official client, which tries once only."""
        http: Any = httpx.Client(transport=httpx.HTTPTransport(uds=self._path), timeout=START_TIMEOUT_S)
        return openai.OpenAI(base_url=self.base_url, api_key=self.key, max_retries=0, http_client=http)


@dataclass(frozen=True, slots=True)
class Stack:
    """A gateway and a worker behind it, which can also be asked by itself."""

    gateway: Server
    worker: Server
    others: Mapping[str, Server] = field(default_factory=dict)
    """The same gateway for other keys, at other endpoints, by what they are."""


def engine_environ(model: Path) -> dict[str, str]:
    """The environment of a program that loads `model`, without what the tests' own holds."""
    kept = {"PATH", "HOME", "LANG", "VIRTUAL_ENV", "VLLM_CACHE_ROOT", "HF_HOME"}
    return {
        **{name: value for name, value in os.environ.items() if name in kept},
        "HF_HUB_OFFLINE": "1",
        "CXX": "/nonexistent/c++",  # the usual machine has no compiler
        "MODEL_NAME": str(model),
        "SERVED_MODEL_NAME": MODEL,
        "MAX_MODEL_LEN": str(MAX_MODEL_LEN),
        "ENABLE_AUTO_TOOL_CHOICE": "true",
        "TOOL_CALL_PARSER": "hermes",
        "DRAIN_TIMEOUT_S": "5",
    }


@contextmanager
def program(
    module: str, environ: Mapping[str, str], folder: Path, *arguments: str
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """`python -m MODULE ARGUMENTS` and the file of its stderr; ended whole when the block is left."""
    errors = folder / f"{module}.stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    try:
        yield process, errors
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def first_line(process: subprocess.Popen[str], containing: str, errors: Path) -> str:
    """The first line of stdout with `containing`; fails with what stderr says if none comes in time."""
    assert process.stdout is not None
    late = threading.Timer(START_TIMEOUT_S, process.kill)
    late.start()
    try:
        for line in process.stdout:
            if containing in line:
                return line
    finally:
        late.cancel()
    raise AssertionError(f"no line with {containing!r}; stderr ends with\n{errors.read_text()[-4000:]}")


@contextmanager
def stack(model: Path) -> Iterator[Stack]:
    """`python -m gateway` with `model` at two endpoints, three keys, and the socket of the first's worker."""
    # Not pytest's folder: the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as name:
        folder = Path(name)
        (folder / "endpoints.toml").write_text(
            f'''
            [[endpoint]]
            id = "local"
            model = {json.dumps(str(model))}
            served_model_name = "{MODEL}"
            min_workers = 1

            [[endpoint]]
            id = "other"
            model = {json.dumps(str(model))}
            served_model_name = "{MODEL}"
            start = "first_request"
            '''
        )
        data = {"DATA_DIR": f"{folder}/data"}
        bound = key(data, "bound", "--endpoint", "other")
        limited = key(data, "limited", "--model", MODEL, "--rpm", "100000", "--tpm", "100000000")
        with gateway(model, folder, ENDPOINTS_FILE=f"{folder}/endpoints.toml") as (server, _):
            until_ready(server)
            (uds,) = folder.glob("firsttoken-*/worker-1.sock")
            elsewhere = server.base_url.replace("/local/", "/other/")
            others = {"bound": Server(elsewhere, bound), "limited": Server(server.base_url, limited)}
            yield Stack(server, Server("http://worker/v1", uds=uds), others)


def key(environ: Mapping[str, str], name: str, *arguments: str) -> str:
    """A new key of the gateway whose DATA_DIR is in `environ`."""
    command = (sys.executable, "-m", "gateway", "keys", "create", "--name", name, *arguments)
    made = subprocess.run(command, cwd=ROOT, env=dict(environ), capture_output=True, text=True, check=True)
    return made.stdout.strip()


def until_ready(server: Server) -> None:
    """Return once a worker of the first endpoint takes requests."""
    health = server.base_url.partition("/v2/")[0] + "/health"
    own = {"authorization": f"Bearer {server.key}"}
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not httpx.get(health, headers=own, timeout=60).json()["endpoints"][0]["workers"].get("ready"):
        assert time.monotonic() < deadline_s, "no worker is ready"
        time.sleep(0.1)


@contextmanager
def gateway(
    model: Path, folder: Path, *arguments: str, **settings: str
) -> Iterator[tuple[Server, subprocess.Popen[str]]]:
    """`python -m gateway ARGUMENTS` with `model`, ready, and its process."""
    own = {"PORT": "0", "API_KEY": KEY, "TMPDIR": str(folder), "DATA_DIR": f"{folder}/data", **settings}
    environ = {"VLLM_CACHE_ROOT": f"{folder}/cache", **engine_environ(model), **own}
    with program("gateway", environ, folder, *arguments) as (process, errors):
        ready = first_line(process, "/openai/v1", errors)
        yield Server(next(word for word in ready.split() if word.startswith("http://"))), process


@contextmanager
def jobs_stack(model: Path) -> Iterator[Stack]:
    """`python -m gateway serve --upstream runpod`: the worker has no socket of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as folder,
        gateway(model, Path(folder), "serve", "--upstream", "runpod", MIN_WORKERS="1") as (server, _),
    ):
        yield Stack(server, server)


@asynccontextmanager
async def worker_process(environ: Mapping[str, str], said: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m handler`, its output in the file `said`; killed at the end, with all that it started."""
    with said.open("w") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "handler"),
            cwd=ROOT,
            env={name: value for name, value in environ.items() if value},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # the heartbeat of RunPod's SDK outlives a worker that was killed
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


@contextmanager
def function(
    environ: Mapping[str, str], folder: Path, worker: str = "handler"
) -> Iterator[dict[str, Server]]:
    """`python -m WORKER` as a Lambda function, ready; its front doors by name (`tests.lambda_doors`)."""
    command = (sys.executable, "-m", worker)
    with program("tests.lambda_doors", environ, folder, *command) as (process, errors):
        urls: dict[str, str] = json.loads(first_line(process, "/openai/v1", errors))
        yield {name: Server(url) for name, url in urls.items()}


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker of its own: where it is, its process, and the file of what it says on stderr."""

    server: Server
    process: subprocess.Popen[str]
    errors: Path


@contextmanager
def worker(environ: Mapping[str, str]) -> Iterator[Worker]:
    """`python -m handler` on a unix socket, once it has told its parent that it is ready."""
    with (
        tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as parent,
    ):
        parent.bind(f"{folder}/notify")
        parent.settimeout(START_TIMEOUT_S)
        server = Server("http://worker/v1", uds=Path(folder) / "worker.sock")
        told = {"NOTIFY_SOCKET": f"{folder}/notify", "UDS": str(server.uds)}
        environ = {"VLLM_CACHE_ROOT": f"{folder}/cache", **environ, **told}
        with program("handler", environ, Path(folder)) as (process, errors):
            news = ""
            while "READY=1" not in news:
                news = parent.recv(65536).decode()
                assert "EXIT_STATUS" not in news, errors.read_text()[-4000:]
            yield Worker(server, process, errors)
