"""Files that one start writes for the next, in the user's cache.

What is in them decides what the next start runs, so one that somebody else could have written is
not read: it belongs to this user or to root, and nobody else may write to it. One that was cut
short or damaged isn't read either.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

FOREIGN = stat.S_IWGRP | stat.S_IWOTH
CHECK_BYTES = 8
"""A CRC-32 and the length of what follows, 4 bytes each."""


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
    draft = file.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as writer:
                writer.write(_check(data))
                writer.write(data)
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)


def open_own(file: Path) -> int:
    """A descriptor to read `file` with. Raises `OSError`, also if somebody else could have written it."""
    opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    found = os.fstat(opened)
    if stat.S_ISREG(found.st_mode) and found.st_uid in {0, os.geteuid()} and not found.st_mode & FOREIGN:
        return opened
    os.close(opened)
    raise PermissionError(f"{file} is not ours alone")


def _check(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little") + (len(data) & 0xFFFFFFFF).to_bytes(4, "little")
