"""Sockets to serve on, bound before anything slow begins."""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from handler.errors import BadSettings, NoResources

BACKLOG = 2048


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """The family and the address of `host` and `port`. Raises `BadSettings` when `host` is no address."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise BadSettings([f"HOST={host}: {error.strerror}"]) from error
    return family, address


def listen(host: str, port: int, *, setting: str = "PORT") -> socket.socket:
    """A socket bound to `host` and `port`, so that a taken port is known before a worker starts.

    `setting` is where the port comes from. Raises `NoResources` when it can't be bound and
    `BadSettings` when `host` is no address.
    """
    family, address = resolve(host, port)
    # Its connections have the protocol too, by which asyncio knows that they may be told not to hold back
    # what is small. Else the first token on a connection that is kept waits 40 ms for an acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        taken = error.errno == errno.EADDRINUSE
        why = (
            f"is already in use; choose another with {setting}"
            if taken
            else f"can't be bound: {error.strerror}"
        )
        raise NoResources(f"port {port} of {host} {why}") from error
    return listener


def listen_unix(path: Path) -> socket.socket:
    """A socket bound to the file `path`, which only this user can open.

    Raises `NoResources` when it can't be bound.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket():  # a worker that was killed left it behind
            path.unlink()
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise NoResources(f"UDS={path} can't be bound: {error.strerror or error}") from error
    return listener


def close_copies(listeners: Iterable[socket.socket], ports: Collection[int]) -> None:
    """In a fork: close what it has of `listeners`, and of connections to these `ports`.

    A copy would keep a port taken after the server is gone, and a connection open that the server
    has closed.
    """
    for listener in listeners:
        listener.close()
    for path in Path("/proc/self/fd").iterdir():
        try:
            held = socket.socket(fileno=int(path.name))
        except OSError:  # no socket, or the folder that is being read
            continue
        if held.family in {socket.AF_INET, socket.AF_INET6} and held.getsockname()[1] in ports:
            held.close()
        else:
            held.detach()
