"""`handler.listener`: sockets are bound early, and what is in the way is said in a sentence."""

from __future__ import annotations

import asyncio
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from handler.errors import BadSettings, NoResources
from handler.listener import listen, listen_unix


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_address_is_listened_on(host: str) -> None:
    """Port 0 is any that is free; connections queue from the first moment."""
    with listen(host, 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        assert listener.getsockname()[1] > 0


async def test_what_is_small_is_sent_at_once() -> None:
    """On Python's own loop as well, which a frozen worker has."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        connection, _ = listener.accept()
        with connection:
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
                asyncio.Protocol, connection
            )
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            transport.close()
            await asyncio.sleep(0)  # until it has closed


def test_a_taken_port_is_named() -> None:
    """With the setting that changes it."""
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(NoResources) as failed:
            listen("127.0.0.1", port)
    assert str(failed.value) == f"port {port} of 127.0.0.1 is already in use; choose another with PORT"


def test_a_host_that_is_no_address_is_a_bad_setting() -> None:
    """It is the person's slip and not the machine's lack."""
    with pytest.raises(BadSettings, match="HOST=not a host"):
        listen("not a host", 0)


def test_a_unix_socket_belongs_to_this_user(tmp_path: Path) -> None:
    """Its file can be opened by nobody else, from the moment it takes connections."""
    path = tmp_path / "worker.sock"
    with listen_unix(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_socket_of_a_worker_that_was_killed_is_replaced(tmp_path: Path) -> None:
    """Its file stays behind, and nobody listens."""
    path = tmp_path / "worker.sock"
    listen_unix(path).close()
    with listen_unix(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    """A slip in `UDS` must not cost a file."""
    path = tmp_path / "model.safetensors"
    path.write_text("weights")
    with pytest.raises(NoResources, match=r"UDS=.*model\.safetensors"):
        listen_unix(path)
    assert path.read_text() == "weights"


@pytest.mark.parametrize("name", ["missing/worker.sock", "x" * 200])
def test_a_path_that_can_not_be_bound_is_named(tmp_path: Path, name: str) -> None:
    """A folder that is not there, or a name that no socket address holds."""
    with pytest.raises(NoResources, match="UDS="):
        listen_unix(tmp_path / name)


FORK = """
import os, socket
from handler.listener import close_copies, listen

listener = listen("127.0.0.1", 0)
port = listener.getsockname()[1]
client = socket.create_connection(("127.0.0.1", port))
accepted, _ = listener.accept()
other = socket.create_server(("127.0.0.1", 0))
os.register_at_fork(after_in_child=lambda: close_copies([listener], {port}))
if pid := os.fork():
    os.waitpid(pid, 0)
    accepted.sendall(b"still open here")
    print(client.recv(100).decode(), flush=True)
else:
    names = {fd: name for name, fd in (("listener", 3), ("client", 4), ("accepted", 5), ("other", 6))}
    print(*(name for fd, name in names.items() if os.path.exists(f"/proc/self/fd/{fd}")), flush=True)
os._exit(0)
"""


def test_a_fork_keeps_neither_port_nor_connection() -> None:
    """What is not the server's it keeps, and the server has all of its own."""
    said = subprocess.run(
        [sys.executable, "-c", FORK],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert said.stdout == "client other\nstill open here\n"
