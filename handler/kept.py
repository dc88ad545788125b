"""Files that one start writes for the next, in the user's cache.

What is in them decides what the next start runs, so one that somebody else could have written is
not read: it belongs to this user or to root, and nobody else may write to it. One that was cut
short or damaged isn't read either.
"""

from __future__ import annotations

import fcntl
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

FOREIGN = stat.S_IWGRP | stat.S_IWOTH
CHECK_BYTES = 8
"""A CRC-32 and the length of what follows, 4 bytes each."""


class Memory(Protocol):
    """What a start takes from the last one, and notes for the next."""

    def end(self) -> None:
        """The start is over: take and note nothing from now on."""
        ...

    def save(self) -> None:
        """Write down what was noted, if it is worth it."""
        ...


def folder(environ: Mapping[str, str], name: str) -> Path:
    """Where the files of one kind are."""
    return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "firsttoken" / name


def read(file: Path) -> bytes | None:
    """What `write` has written to `file`; None if it is not there, or is not to be trusted."""
    try:
        opened = open_own(file)
    except OSError:
        return None
    with os.fdopen(opened, "rb") as reader:
        check, data = reader.read(CHECK_BYTES), reader.read()
    return data if check == _check(data) else None


def write(file: Path, data: bytes) -> None:
    """Write `data` to `file`, whole or not at all; nothing happens where that is not possible."""
    with suppress(OSError), draft(file) as writer:
        writer.write(_check(data))
        writer.write(data)


@contextmanager
def draft(file: Path) -> Iterator[BinaryIO]:
    """A file to write that replaces `file` at the end of the block, unless the block raises.

    Raises `OSError`, also while another process writes one. The draft of a process that was killed is
    taken over.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = file.with_suffix(".draft")
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(_own(os.open(path, flags, 0o600), path), "wb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(writer.fileno()), path.stat()):
            raise BlockingIOError(f"{path} was another process's until now")
        writer.truncate()
        try:
            yield writer
            writer.flush()
            path.replace(file)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def open_own(file: Path) -> int:
    """A descriptor to read `file` with. Raises `OSError`, also if somebody else could have written it.

    A link is followed if it is ours or root's: the caches of a bake are shown by links.
    """
    if file.lstat().st_uid not in {0, os.geteuid()}:
        raise PermissionError(f"{file} is not ours alone")
    return _own(os.open(file, os.O_RDONLY | os.O_CLOEXEC), file)


def _own(opened: int, file: Path) -> int:
    found = os.fstat(opened)
    if stat.S_ISREG(found.st_mode) and found.st_uid in {0, os.geteuid()} and not found.st_mode & FOREIGN:
        return opened
    os.close(opened)
    raise PermissionError(f"{file} is not ours alone")


def _check(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little") + (len(data) & 0xFFFFFFFF).to_bytes(4, "little")
