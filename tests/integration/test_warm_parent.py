"""The warm parent with the real engine: the next worker starts without importing, and says the same."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gateway.upstreams import launch
from gateway.upstreams.launch import Launched, WarmParent
from gateway.upstreams.output import Output
from handler.explain import find
from tests.servers import MODEL, START_TIMEOUT_S, Server, engine_environ
from tests.until import until

ASKED = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 24,
    "temperature": 0,
    "seed": 7,
}


class Place:
    """Where one worker listens and what it tells."""

    def __init__(self, folder: Path, number: int) -> None:
        self.server = Server("http://worker/v1", uds=folder / f"{number}.sock")
        self._news = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._address = folder / f"{number}.notify"
        self._news.bind(str(self._address))
        self._news.settimeout(START_TIMEOUT_S)
        self.output = Output(folder / f"{number}.out", folder / f"{number}.log", ())

    def environ(self) -> dict[str, str]:
        """What a worker needs to know of it."""
        return {"UDS": str(self.server.uds), "NOTIFY_SOCKET": str(self._address)}

    def ready(self) -> Mapping[str, Any]:
        """The worker's cold start, once it is ready."""
        news = ""
        while "READY=1" not in news:
            news = self._news.recv(65536).decode()
            assert "EXIT_STATUS" not in news, news
        return find([next(line for line in news.splitlines() if "X_COLD_START" in line).partition("=")[2]])

    async def says(self) -> str:
        """The text of one chat."""
        async with self.server.http() as client:
            reply = await client.post("chat/completions", json=ASKED)
        text: str = reply.json()["choices"][0]["message"]["content"]
        return text

    def close(self) -> None:
        """Listen no more."""
        self._news.close()
        self.output.close()


async def start(parent: WarmParent, place: Place, environ: Mapping[str, str]) -> tuple[Launched, Any]:
    """A worker from `parent`, ready, and its cold start."""
    launched = await parent.launch({**environ, **place.environ()}, place.output)
    return launched, await asyncio.to_thread(place.ready)


@pytest.mark.timeout(300)
async def test_the_next_worker_does_not_import(tiny_model: Path) -> None:
    """Nor configure; both say the same, and a killed one is nothing to the other."""
    with tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as name:
        folder = Path(name)
        environ = {**engine_environ(tiny_model), "VLLM_CACHE_ROOT": f"{folder}/cache"}
        environ["XDG_CACHE_HOME"] = f"{folder}/own"
        lists = folder / "own/firsttoken/readahead"
        parent = WarmParent([sys.executable, "-m", "handler"], folder / "parent.sock")
        places = [Place(folder, number) for number in range(3)]
        try:
            first, cold = await start(parent, places[0], environ)
            assert {"import vllm", "config"} <= {phase["name"] for phase in cold["phases"]}
            expected = await places[0].says()
            await asyncio.to_thread(until, lambda: any(lists.glob("*.txt")))
            (listed,) = lists.glob("*.txt")
            assert any("/vllm/" in file for file in listed.read_text().splitlines())
            os.kill(first.pid, signal.SIGKILL)
            assert await first.wait() == -signal.SIGKILL

            second, warm = await start(parent, places[1], environ)
            steps = {phase["name"] for phase in warm["phases"]}
            assert warm["facts"]["parent"] == "warm"
            assert {"engine", "first token"} <= steps
            assert not steps & {"interpreter", "import vllm", "config"}
            assert await places[1].says() == expected

            # Another engine than the parent's is configured by the worker itself.
            other, own = await start(parent, places[2], {**environ, "MAX_MODEL_LEN": "512"})
            assert "config" in {phase["name"] for phase in own["phases"]}
            assert await places[2].says() == expected == await places[1].says()
            for launched in (second, other):
                launched.let_go()  # its lifeline: it drains and goes
        finally:
            await parent.close()
            for place in places:
                place.close()
        for launched in (first, second, other):
            await asyncio.to_thread(until, lambda pid=launched.pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]


async def test_a_worker_that_can_never_start_says_so_itself(tmp_path: Path) -> None:
    """The parent is not warm then; its workers find the fault again, and tell who asked for them."""
    with tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as name:
        parent = WarmParent([sys.executable, "-m", "handler"], Path(name) / "parent.sock")
        try:
            environ = {**engine_environ(tmp_path / "nothing"), "UDS": f"{name}/worker.sock"}
            output = Output(Path(name) / "worker.out", Path(name) / "worker.log", ())
            assert await (await parent.launch(environ, output)).wait() == 66
            assert await (await parent.launch({**environ, "PORT": "none"}, output)).wait() == 78
            output.close()
            assert "PORT='none' is not allowed" in "".join(output.tail)
        finally:
            await parent.close()


async def test_a_worker_ends_though_nobody_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent is gone, and something that it started holds its connection open."""
    monkeypatch.setattr(launch, "NEWS_S", 0.05)
    ours, held = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    process = await asyncio.create_subprocess_exec("sleep", "600")
    waiting = asyncio.create_task(launch._Forked(process.pid, reader, writer).wait())
    await asyncio.sleep(0)
    process.kill()
    assert await asyncio.wait_for(waiting, START_TIMEOUT_S) == -signal.SIGKILL
    await process.wait()
    held.close()
    await writer.wait_closed()
