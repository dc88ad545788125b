"""The listening end of systemd's notification protocol.

A worker sends datagrams of `NAME=value` lines to the socket that `NOTIFY_SOCKET` names
(https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

DATAGRAM_MAX_BYTES = 64 * 1024


def parse(datagram: bytes) -> dict[str, str]:
    """The fields of one datagram; lines without `=` are ignored, as systemd does."""
    lines = datagram.decode(errors="replace").split("\n")
    return {name: value for name, found, value in (line.partition("=") for line in lines) if found}


class NotifySocket:
    """Listens at `path` and gives each datagram's fields to `tell`, in order of arrival.

    The running loop's reader is used instead of a datagram endpoint: uvloop's knows no
    unix sockets. Whoever can write to the folder of `path` can speak: keep it private.
    """

    def __init__(self, path: Path, tell: Callable[[Mapping[str, str]], None]) -> None:
        self._path = path
        self._tell = tell
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.fileno(), self.drain)

    def drain(self) -> None:
        """Give on what has arrived. A dead worker's last words may still be in the socket."""
        with suppress(BlockingIOError):
            while True:
                self._tell(parse(self._socket.recv(DATAGRAM_MAX_BYTES)))

    def close(self) -> None:
        """Listen no more, and remove the socket."""
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._path.unlink(missing_ok=True)
