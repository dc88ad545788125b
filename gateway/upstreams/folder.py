"""Private folders for the sockets of workers, and what a gateway that was killed has left in them."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import tempfile
from contextlib import suppress
from pathlib import Path

from handler.errors import NoResources

log = logging.getLogger("gateway")

PREFIX = "firsttoken-"
MARK = "gateway.pid"
"""Folders with this file are a gateway's; others of that prefix hold caches of bakes (`handler.baked`)."""
SOCKET_PATH_MAX_BYTES = 100  # sun_path holds 108 with its end, and our names are short


class PrivateFolder:
    """A new folder that only this user can enter, locked for as long as this process lives.

    A lock on the folder itself also keeps systemd-tmpfiles from clearing it.
    """

    def __init__(self) -> None:
        """Raises `NoResources` if none can be made."""
        self._lock = -1
        try:
            self.path = _made()
        except OSError as error:
            raise NoResources(f"no folder for sockets can be made: {error.strerror}") from error
        try:
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.path / MARK).write_text(str(os.getpid()))
        except OSError as error:
            self.remove()
            raise NoResources(f"{self.path} can't be used: {error.strerror}") from error

    def remove(self) -> None:
        """Remove it with all that it holds; again does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remember(path: Path, pid: int) -> None:
    """Write down at `path`, a `.pid` file in a private folder, that `pid` leads a group of processes."""
    with suppress(OSError):  # it has ended, or the folder has
        path.write_text(f"{pid} {_started(pid)}")


def sweep() -> None:
    """Remove the folders of gateways of this user that are gone, and end what they have left running.

    Their workers end by themselves, as their lifelines do; one that was stopped or hangs does not.
    """
    for parent in {Path(tempfile.gettempdir()), Path("/tmp")}:  # noqa: S108 - where `_made` makes them
        for mark in parent.glob(f"{PREFIX}*/{MARK}"):
            with suppress(OSError):
                _sweep(mark.parent)


def _sweep(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(lock).st_uid != os.geteuid():
            return
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its gateway lives
        for file in folder.glob("*.pid"):
            if file.name != MARK:
                _end(file)
        shutil.rmtree(folder)
        log.info("what an earlier gateway has left is removed", extra={"folder": str(folder)})
    finally:
        os.close(lock)


def _end(file: Path) -> None:
    with suppress(OSError, ValueError):
        pid, started = file.read_text().split()
        if _started(int(pid)) == started:  # else the number is another process's by now
            os.killpg(int(pid), signal.SIGKILL)
            log.warning("a process of an earlier gateway was still there", extra={"pid": int(pid)})


def _started(pid: int) -> str:
    """When the process `pid` has started, in ticks of the clock. Raises `OSError` if there is none."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[19]


def _made() -> Path:
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))  # mode 0700
    if len(str(folder)) <= SOCKET_PATH_MAX_BYTES - len("/worker-00000.notify"):
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
