"""`python -m handler freeze`: from the outside, with the real engine; and what ties a process to others.

Here nobody captures the worker, it is only stopped for a moment. `make test-criu` does.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from handler import explain, ties
from handler.freezable import FreezableEngine, new_loop
from handler.phases import Phases
from handler.settings import Settings
from tests.servers import (
    MODEL,
    START_TIMEOUT_S,
    STOP_TIMEOUT_S,
    Server,
    engine_environ,
    first_line,
    program,
)

Make = Callable[[ExitStack, Path], socket.socket]


def found(held: socket.socket) -> str | None:
    """What `ties` says of an open socket."""
    fd = held.fileno()
    return dict(ties.sockets({fd: str(Path(f"/proc/self/fd/{fd}").readlink())})).get(fd)


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A unix socket that listens at `path`."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield listener


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["stream", "datagram"])
def test_a_pair_of_this_process_is_no_tie(kind: socket.SocketKind) -> None:
    """Event loops wake themselves with one; both ends are in the snapshot."""
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    with one, other:
        assert [found(one), found(other)] == [None, None]


def test_a_socket_that_is_connected_to_nothing_is_no_tie() -> None:
    """Nobody would miss it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as alone:
        assert found(alone) is None


def test_unix_sockets_that_others_can_reach_are_ties(tmp_path: Path) -> None:
    """One that listens, one that is connected to it, and one that tells a parent how it is."""
    path = tmp_path / "s"
    with listening(path) as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert found(listener) == f"a unix stream socket at {path}"
        assert found(client) == f"a unix stream socket connected to {path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as parent:
        parent.bind(f"\0ft-{os.getpid()}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect(parent.getsockname())
            assert found(notify) == f"a unix datagram socket connected to @ft-{os.getpid()}"


def test_a_pair_of_another_process_is_a_tie() -> None:
    """It was inherited, and its other end is where it came from."""
    one, other = socket.socketpair()
    code = "from handler import ties; print(*dict(ties.sockets(ties.open_files())).values(), sep='\\n')"
    with one, other:
        said = subprocess.run(
            [sys.executable, "-c", code],
            pass_fds=[other.fileno()],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    assert said == f"a unix stream socket connected to process {os.getpid()}\n"


def test_sockets_of_the_network_are_ties() -> None:
    """Connected, listening or neither."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            assert found(listener) == f"TCP 127.0.0.1:{port}, listening"
            assert found(client) == f"TCP 127.0.0.1:{client.getsockname()[1]} to 127.0.0.1:{port}"
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as unbound:
        assert found(unbound) == "UDP [::]:0"


def test_a_child_is_a_tie() -> None:
    """As long as it runs."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert any(line.startswith(f"process {child.pid} (") for line in ties.ties(device_released=True))
        child.kill()
    assert not any(str(child.pid) in line for line in ties.children())


def test_the_loop_of_a_frozen_engine_holds_no_ring() -> None:
    """uvloop's has an io_uring wherever the kernel lets it."""
    loop = new_loop()
    assert not list(ties.held_by_kernel(ties.open_files(), device_released=True))
    loop.close()


class Sleeper:
    """What is used of `AsyncLLM` to sleep and to wake, and what it was asked for."""

    def __init__(self, *, sleeps: bool) -> None:
        self.model_config = SimpleNamespace(enable_sleep_mode=sleeps)
        self.output_handler = asyncio.create_task(asyncio.Event().wait())
        self.asked: list[object] = []

    async def reset_prefix_cache(self) -> None:
        """Note it."""
        self.asked.append("reset")

    async def sleep(self, *, level: int) -> None:
        """Note the level."""
        self.asked.append(level)

    async def wake_up(self, *, tags: list[str]) -> None:
        """Note what is woken."""
        self.asked += tags

    async def collective_rpc(self, method: str) -> None:
        """Note what the workers do."""
        self.asked.append(method)

    def shutdown(self, *, timeout: float) -> None:
        """End."""


class Opened(FreezableEngine):
    """An engine with a `Sleeper` in place of vLLM."""

    def __init__(self, *, sleeps: bool) -> None:
        super().__init__(Settings.from_environ({}), Phases(0.0), {})
        self._sleeps = sleeps
        self._thread.start()
        self.wait_open()

    async def _open(self) -> None:
        self._llm = Sleeper(sleeps=self._sleeps)


@pytest.mark.parametrize(
    ("sleeps", "level", "asked"),
    [(True, 2, ["reset", 2, "weights", "reload_weights", "kv_cache"]), (False, None, ["reset"])],
    ids=["with a GPU", "without"],
)
def test_an_engine_sleeps_as_deep_as_it_can(sleeps: bool, level: int | None, asked: list[object]) -> None:
    """And wakes in vLLM's order: the weights have a place, are read, then the KV cache has one."""
    engine = Opened(sleeps=sleeps)
    assert engine.sleep() == level
    if level is not None:
        engine.wake()
    assert engine._llm.asked == asked
    engine.close()


def outside(pid: int) -> dict[str, list[str]]:
    """What the kernel says that a process has: children, sockets of the network, named unix sockets."""
    inodes = {
        str(link.readlink()).removeprefix("socket:[").removesuffix("]")
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if int(link.name) > 2
    }
    network = [
        line
        for table in ("tcp", "tcp6", "udp", "udp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        if line.split()[9] in inodes
    ]
    named = [
        line
        for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]
        if line.split()[6] in inodes and len(line.split()) > 7
    ]
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended while we looked
            if stat.read_text().rpartition(")")[2].split()[1] == str(pid):
                children.append(stat.parent.name)
    return {"children": children, "network": network, "named": named}


def test_a_frozen_worker_is_alone_and_serves_once_resumed(tiny_model: Path) -> None:
    """It waits with all that it needs in one process, through a stop, and is then given its place."""
    with (
        tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as name,  # the path of a socket must be short
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as parent,
    ):
        folder = Path(name)
        parent.bind(f"{name}/notify")
        parent.settimeout(START_TIMEOUT_S)
        environ = {**engine_environ(tiny_model), "PORT": "1", "NOTIFY_SOCKET": f"{name}/nobody"}
        arguments = ("freeze", "--barrier", f"{name}/barrier", "--timeout", "120")
        with program("handler", environ, folder, *arguments) as (process, errors):
            first_line(process, "frozen: ", errors)
            frozen: dict[str, Any] = json.loads((folder / "barrier/frozen.json").read_text())
            assert (frozen["pid"], frozen["model"], frozen["slept"]) == (process.pid, MODEL, None)
            assert frozen["canary"]["token_ids"]
            assert outside(process.pid) == {"children": [], "network": [], "named": []}

            os.kill(process.pid, signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            os.kill(process.pid, signal.SIGCONT)
            late = {"UDS": f"{name}/worker.sock", "NOTIFY_SOCKET": f"{name}/notify"}
            (folder / "barrier/resume").write_text(json.dumps({"environ": late}))
            news = ""
            while "READY=1" not in news:
                news = parent.recv(65536).decode()
                assert "EXIT_STATUS" not in news, errors.read_text()[-4000:]

            resumed = explain.find((folder / "barrier/resumed.json").read_text().splitlines())
            assert resumed["canary"] == frozen["canary"]
            assert [phase["name"] for phase in resumed["phases"]] == ["reseed", "canary"]
            server = Server("http://worker/v1", uds=folder / "worker.sock")
            with server.sync_client() as client:
                reply = client.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=20, temperature=0
                )
            text = reply.choices[0].message.content
            assert text is not None
            assert text.startswith(frozen["canary"]["text"])
            process.terminate()
            assert process.wait(STOP_TIMEOUT_S) == 0, errors.read_text()[-4000:]
