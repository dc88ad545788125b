"""A folder that holds a fetched model: filled aside, then put in place whole.

    .NAME.partial/   where a fetch works; stays after a failure, so that a download can go on
    NAME/            the model, with `fetched.json`: where it came from and the size of each file

Two fetches of one model, in one process or in two, do the work once: the second waits for the
first. Nothing here knows where models come from.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from builder.console import Console
from handler.errors import UsageError

NOTE = "fetched.json"


def models(environ: Mapping[str, str]) -> Path:
    """The folder of the user's cache that holds models: `$XDG_CACHE_HOME` or `~/.cache`, then ours."""
    cache = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or Path.home()) / ".cache"
    return Path(cache) / "firsttoken" / "models"


def intact(folder: Path) -> bool:
    """Whether `folder` was put in place by `keep` and each file still has its size."""
    try:
        files: dict[str, int] = json.loads((folder / NOTE).read_text())["files"]
        return all((folder / name).stat().st_size == bytes_ for name, bytes_ in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def filling(folder: Path, console: Console) -> Iterator[Path | None]:
    """Hold the place where `folder` is filled; yields it, or None where another fetch filled it meanwhile.

    Raises `UsageError` where `folder` holds something that no fetch put there.
    """
    work = folder.with_name(f".{folder.name}.partial")
    while True:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
        try:
            _wait(lock, console)
            if intact(folder):
                _remove_if_empty(work, lock)
                yield None
                return
            if not _is(work, lock):  # the fetch that was waited for put it in place, and it was damaged since
                continue
            if folder.is_dir() and any(folder.iterdir()):
                if not (folder / NOTE).exists():
                    raise UsageError(f"{folder} is not empty and no fetch made it; name another folder")
                console.say(f"{folder} is damaged; fetching the model again")
            yield work
            return
        finally:
            os.close(lock)


def keep(work: Path, folder: Path, origin: Mapping[str, str]) -> None:
    """Put the filled `work` in the place of `folder`, with a note of its `origin`."""
    files = sorted(path for path in work.rglob("*") if path.is_file() and path.name != NOTE)
    sizes = {str(path.relative_to(work)): path.stat().st_size for path in files}
    (work / NOTE).write_text(json.dumps({**origin, "files": sizes}, indent=1) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    work.rename(folder)


def empty(work: Path) -> None:
    """Remove what `work` holds and leave the folder, which is locked."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _wait(lock: int, console: Console) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        console.say("waiting for another fetch of this model")
        fcntl.flock(lock, fcntl.LOCK_EX)


def _is(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_if_empty(work: Path, lock: int) -> None:
    if _is(work, lock) and not any(work.iterdir()):
        work.rmdir()
