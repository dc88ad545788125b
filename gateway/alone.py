"""One gateway at a time for a database that is a file: whoever comes next may adopt all that was left."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.database import StoreUnusable, parsed

NAME = "gateway.lock"


class StoreInUse(StoreUnusable):
    """Another gateway has the database."""

    exit_code = 75


@contextmanager
def alone(url: str) -> Iterator[None]:
    """Hold the lock beside the SQLite file of `url`; of another database there is none to be held.

    The kernel lets go of it with the process, however that ends, and no child inherits it. Raises
    `StoreInUse`, and `StoreUnusable` where no file can be made.
    """
    at = parsed(url)
    if not (at.get_backend_name() == "sqlite" and at.database):
        yield
        return
    folder = Path(at.database).absolute().parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreUnusable(f"the gateway's folder can't be used: {error}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreInUse(
                f"{folder} is another gateway's, process {_said(lock) or 'unknown'}: "
                "end that one, or set DATA_DIR to another folder"
            ) from None
        except OSError as error:  # a network disk without locks
            raise StoreUnusable(f"{folder / NAME} can't be locked: {error.strerror}") from None
        try:
            os.ftruncate(lock, 0)
            os.write(lock, b"%d\n" % os.getpid())
        except OSError as error:
            raise StoreUnusable(f"{folder / NAME} can't be written: {error.strerror}") from None
        yield
    finally:
        os.close(lock)


def _said(lock: int) -> str:
    return os.read(lock, 32).decode(errors="replace").strip()
