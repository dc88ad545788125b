"""`python -m handler` on a port from its first moment: what clients and load balancers see of a start."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from judge.servers import free_port
from tests.servers import KEY, MODEL, START_TIMEOUT_S, STOP_TIMEOUT_S, engine_environ, program

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="no engine is installed")

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Starting:
    """A worker that has just begun to start; `ask` asks it as the official client does."""

    port: int
    process: subprocess.Popen[str]
    errors: Path
    pool: ThreadPoolExecutor

    def get(self, path: str, port: int | None = None) -> httpx.Response:
        """The answer on a connection of its own; the first one waits until somebody listens."""
        transport = httpx.HTTPTransport(retries=8)
        with httpx.Client(transport=transport, timeout=60) as client:
            return client.get(f"http://{HOST}:{port or self.port}{path}")

    def ask(self) -> Future[Any]:
        """A chat completion with its headers, being waited for."""

        def ask() -> Any:
            http: Any = httpx.Client(transport=httpx.HTTPTransport(retries=8))
            with openai.OpenAI(
                base_url=f"http://{HOST}:{self.port}/v1",
                api_key=KEY,
                max_retries=0,
                timeout=START_TIMEOUT_S,
                http_client=http,
            ) as client:
                return client.chat.completions.with_raw_response.create(
                    model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=4, temperature=0
                )

        return self.pool.submit(ask)

    def held(self) -> None:
        """Return once a request is held: its connection is there, and what came after it was answered."""
        while not any(state == "01" for state, _ in sockets(self.port)):
            assert self.process.poll() is None, self.errors.read_text()[-4000:]
        self.get("/health")

    def said(self) -> str:
        """The end of its log."""
        return self.errors.read_text()[-4000:]


@contextmanager
def starting(tmp_path: Path, model: Path, **environ: str) -> Iterator[Starting]:
    """`python -m handler` with `model` on a free port."""
    env = {
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        **engine_environ(model),
        "API_KEY": KEY,
        "PORT": str(free_port()),
        **environ,
    }
    with (
        ThreadPoolExecutor() as pool,
        program("handler", env, tmp_path) as (process, errors),
    ):
        yield Starting(int(env["PORT"]), process, errors, pool)


def sockets(port: int) -> list[tuple[str, str]]:
    """State (01 is connected, 0A listens) and inode of each of this machine's sockets at `port`."""
    found = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].rpartition(":")[2], 16) == port:
            found.append((fields[3], fields[9]))
    return found


def holders(inodes: set[str], group: int) -> set[int]:
    """The processes of a group that have one of these sockets."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended while we looked
            if os.getpgid(int(folder.name)) == group:
                open_files = {str(fd.readlink()) for fd in (folder / "fd").iterdir()}
                if open_files & {f"socket:[{inode}]" for inode in inodes}:
                    found.add(int(folder.name))
    return found


@pytest.mark.parametrize("mode", ["thread", "fork"])
def test_a_request_sent_during_the_start_is_answered(mode: str, tmp_path: Path, tiny_model: Path) -> None:
    """The probe goes from 204 to 200, and whoever asked meanwhile is told how long it took.

    The engine core, where it is a process, holds neither the port nor a connection.
    """
    health = free_port()
    environ = {"PORT_HEALTH": str(health), "ENGINE_MODE": mode}
    with starting(tmp_path, tiny_model, **environ) as worker:
        assert worker.get("/ping", health).status_code == 204
        assert worker.get("/ping").status_code == 204
        assert worker.get("/ready").json() == {"status": "starting"}
        asking = worker.ask()
        worker.held()
        assert not asking.done()
        while (status := worker.get("/ping").status_code) != 200:
            assert (status, worker.process.poll()) == (204, None), worker.said()
        asked = asking.result(START_TIMEOUT_S)
        assert asked.parse().usage.completion_tokens == 4
        assert 1 < float(asked.headers["x-cold-start"]) < START_TIMEOUT_S
        late = worker.ask().result(START_TIMEOUT_S)
        assert "x-cold-start" not in late.headers
        assert worker.get("/ping", health).status_code == 200
        inodes = {inode for port in (worker.port, health) for _, inode in sockets(port) if inode != "0"}
        assert holders(inodes, worker.process.pid) == {worker.process.pid}
        worker.process.terminate()
        assert worker.process.wait(STOP_TIMEOUT_S) == 0, worker.said()


def refusal(asking: Future[Any]) -> tuple[int, str | None, str]:
    """Status, code and message of what was refused."""
    with pytest.raises(openai.APIStatusError) as refused:
        asking.result(START_TIMEOUT_S)
    return refused.value.status_code, refused.value.code, refused.value.message


def test_a_worker_that_cannot_start_stays_and_says_why(tmp_path: Path) -> None:
    """With START_FAILURE=answer, until it is told to stop."""
    nowhere = tmp_path / "no-such-model"
    with starting(tmp_path, nowhere, START_FAILURE="answer") as worker:
        status, code, message = refusal(worker.ask())
        assert (status, code) == (503, "worker_start_failed")
        assert "The worker could not start: " in message
        assert str(nowhere) in message
        probe = worker.get("/ping")
        assert (probe.status_code, probe.json()) == (503, {"status": "failed"})
        worker.process.terminate()
        assert worker.process.wait(STOP_TIMEOUT_S) == 0, worker.said()


def test_bad_settings_are_told_too(tmp_path: Path, tiny_model: Path) -> None:
    """Though nothing was begun with them."""
    with starting(tmp_path, tiny_model, START_FAILURE="answer", MAX_MODEL_LEN="many") as worker:
        status, code, message = refusal(worker.ask())
        assert (status, code) == (503, "worker_start_failed")
        assert "MAX_MODEL_LEN" in message
        worker.process.send_signal(signal.SIGINT)
        assert worker.process.wait(STOP_TIMEOUT_S) == 0, worker.said()


def test_a_start_that_fails_is_told_to_who_waited(tmp_path: Path, tiny_model: Path) -> None:
    """Before the process exits with its code."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    for weights in broken.glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1000])
    with starting(tmp_path, broken) as worker:
        asking = worker.ask()
        worker.held()
        status, code, message = refusal(asking)
        assert (status, code) == (503, "worker_start_failed")
        assert "The worker could not start: the engine failed to start: " in message
        assert worker.process.wait(STOP_TIMEOUT_S) == 70, worker.said()


def test_a_worker_that_is_stopped_while_it_starts_tells_who_waits(tmp_path: Path, tiny_model: Path) -> None:
    """And ends at once."""
    with starting(tmp_path, tiny_model) as worker:
        asking = worker.ask()
        worker.held()
        worker.process.terminate()
        assert refusal(asking)[:2] == (503, "worker_stopping")
        assert worker.process.wait(STOP_TIMEOUT_S) == 0, worker.said()
