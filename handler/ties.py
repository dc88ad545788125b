"""What ties this process to things outside it, so that a snapshot can't hold it whole.

A snapshot (of CRIU, of gVisor) has the memory, threads and files of a process. The other end of
a connection, another process, a ring of the kernel or a device it does not have.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

DEVICES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/")
FABRIC = "/dev/infiniband/"
STANDARD = (0, 1, 2)


def ties(*, device_released: bool) -> list[str]:
    """A line for each tie of this process, empty if a snapshot can hold it.

    `device_released`: the engine sleeps, so that a device which is still open holds nothing.
    Standard streams don't count: whoever captures the process has given them to it.
    """
    files = open_files()
    return [
        *children(),
        *(f"fd {fd}: {what}" for fd, what in sockets(files)),
        *held_by_kernel(files, device_released=device_released),
    ]


def children(proc: Path = Path("/proc"), pid: int | None = None) -> Iterator[str]:
    """A line for each child of the process `pid` (this one) that runs."""
    pid = pid or os.getpid()
    for stat in sorted(proc.glob("[0-9]*/stat")):
        with suppress(OSError):  # it ended while we looked
            name, _, fields = stat.read_text().rpartition(")")
            state, parent, *_ = fields.split()
            if int(parent) == pid and state not in "ZX":
                yield f"process {stat.parent.name} ({name.partition('(')[2]}) is a child of this one"


def open_files(proc: Path = Path("/proc/self")) -> dict[int, str]:
    """What each descriptor of this process leads to, without standard streams and copies of them."""
    found: dict[int, str] = {}
    for link in (proc / "fd").iterdir():
        with suppress(OSError):  # the descriptor with which we look
            found[int(link.name)] = str(link.readlink())
    # A file may well be open twice, so only what is no file is taken for a copy.
    copies = {found[fd] for fd in STANDARD if fd in found and not found[fd].startswith("/")}
    return {fd: to for fd, to in sorted(found.items()) if fd not in STANDARD and to not in copies}


def held_by_kernel(files: dict[int, str], *, device_released: bool) -> Iterator[str]:
    """A line for each of `files` whose state is in the kernel or on a device."""
    for fd, to in files.items():
        if "io_uring" in to:
            yield f"fd {fd}: an io_uring, which the kernel does not give out"
        elif to.startswith(FABRIC):
            yield f"fd {fd}: {to}"
        elif to.startswith(DEVICES) and not device_released:
            yield f"fd {fd}: {to} is in use; the engine can leave it with ENABLE_SLEEP_MODE=true"


def sockets(files: dict[int, str]) -> Iterator[tuple[int, str]]:
    """The descriptor and a line for each of `files` that is a socket with an end outside."""
    for fd, to in files.items():
        if not to.startswith("socket:"):
            continue
        with socket.socket(fileno=os.dup(fd)) as copy:  # asks the kernel for family and type
            if what := leads_out(copy):
                yield fd, what


def leads_out(open_socket: socket.socket) -> str | None:
    """What connects `open_socket` to the outside, or None for an end of a pair of this process."""
    kind = "stream" if open_socket.type == socket.SOCK_STREAM else "datagram"
    if open_socket.family in {socket.AF_INET, socket.AF_INET6}:
        protocol = "TCP" if kind == "stream" else "UDP"
        return f"{protocol} {_address(open_socket.getsockname())}{_peer(open_socket)}"
    if open_socket.family != socket.AF_UNIX:
        return f"a socket of family {open_socket.family}"
    return _unix_leads_out(open_socket, f"a unix {kind} socket")


def _unix_leads_out(open_socket: socket.socket, what: str) -> str | None:
    # The kernel keeps who made the other end (SO_PEERCRED, unix(7)). A pair of this process has both
    # ends in it, for a child that could hold one is a tie of its own.
    if name := _address(open_socket.getsockname()):
        return f"{what} at {name}"
    if open_socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return f"{what} that listens"
    try:
        peer = _address(open_socket.getpeername())
    except OSError:
        return None  # connected to nothing
    pid, _, _ = struct.unpack("3i", open_socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if pid == os.getpid() and not peer:
        return None
    return f"{what} connected to {peer or f'process {pid}'}"


def _peer(open_socket: socket.socket) -> str:
    try:
        return f" to {_address(open_socket.getpeername())}"
    except OSError:
        listens = open_socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return ", listening" if listens else ""


def _address(address: object) -> str:
    if isinstance(address, tuple):
        host, port, *_ = address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    name = address.decode(errors="replace") if isinstance(address, bytes) else str(address)
    return name.replace("\0", "@")
