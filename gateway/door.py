"""The owner's door: a unix socket in the gateway's folder, for the commands that talk to a running gateway.

Whoever can open it is the user that the gateway runs as, or root; both could read its database and memory. So
it asks for no key, and no command needs one in its arguments or on disk. What comes in here has the rights of
an admin key, and is counted under a name of its own.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.accounts.keys import OWNER, Key
from handler.errors import NoResources
from handler.listener import listen_unix
from handler.messages import Request

NAME = "admin.sock"


class Owner:
    """In the place of `gateway.accounts.keys.Keys`: whoever is here is the owner."""

    def check(self, _: Request) -> Key:
        """The owner."""
        return OWNER

    known = check


@contextmanager
def reachable(folder: Path) -> Iterator[Path]:
    """The door in `folder` by a path that fits a socket's address, however long that of `folder` is.

    Raises `OSError`.
    """
    at = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/self/fd/{at}") / NAME
    finally:
        os.close(at)


@contextmanager
def listen(folder: Path) -> Iterator[socket.socket]:
    """The door in `folder`, which only its owner can open; gone after the block. Raises `NoResources`."""
    try:
        with reachable(folder) as path:
            if _answers(path):
                raise NoResources(f"{folder / NAME} is another gateway's; set DATA_DIR to another folder")
            listener = listen_unix(path)
    except OSError as error:
        raise NoResources(f"{folder / NAME} can't be made: {error.strerror}") from error
    try:
        with listener:
            yield listener
    finally:
        (folder / NAME).unlink(missing_ok=True)


def _answers(path: Path) -> bool:
    """Whether somebody listens there; a gateway that was killed does not."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
