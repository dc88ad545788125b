"""A file that is being written: nobody sees it until it is whole and on the disk."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from handler.errors import BodyTooLarge, StorageFull


class Draft:
    """A file on its way here, of at most `limit_bytes`. `check_room` raises once there is no place for it."""

    def __init__(self, path: Path, limit_bytes: int, check_room: Callable[[], None]) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._check_room = check_room
        self._file: BinaryIO = path.open("xb")
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    async def write(self, data: bytes) -> None:
        """Add `data`. Raises `BodyTooLarge` and `StorageFull`."""
        self.size_bytes += len(data)
        if self.size_bytes > self._limit_bytes:
            raise BodyTooLarge(self._limit_bytes)
        self._check_room()
        with full_disk_is_told():
            await asyncio.to_thread(self._write, data)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    async def finish(self, path: Path) -> str:
        """Have it at `path`, whole and on the disk; returns the SHA-256 of its bytes in hex."""
        with full_disk_is_told():
            await asyncio.to_thread(self._finish, path)
        return self._hash.hexdigest()

    def _finish(self, path: Path) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._path.rename(path)
        sync_folder(path.parent)

    def close(self) -> None:
        """Let go of it; what was not finished is gone."""
        with suppress(OSError):  # on a full disk it would write once more
            self._file.close()
        self._path.unlink(missing_ok=True)


def digest(path: Path) -> tuple[int, str]:
    """Size and SHA-256, in hex, of the file at `path`, which is on the disk when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        found = hashlib.file_digest(file, "sha256")
        return file.tell(), found.hexdigest()


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def full_disk_is_told() -> Iterator[None]:
    """Raises `StorageFull` where the block meets a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise
        raise StorageFull("The disk is full.") from None
