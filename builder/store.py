"""A folder that holds a fetched model: filled aside, then put in place whole.

    .NAME.partial/   where a fetch works; stays after a failure, so that a download can go on
    NAME/            the model, with `fetched.json`: what was asked for, its source, the size of each file

Two fetches of one model, in one process or in two, do the work once: the second waits for the
first. Nothing here knows where models come from.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.console import Console
from builder.selection import SAFE, Choice
from handler import fetched
from handler.errors import UsageError

NOTE = fetched.NOTE

MTIME_S = 315_532_800
"""1980-01-01: the first moment that every archive can hold.

Whatever is fetched or baked says that it was last changed then, so that the same weights make the same
layer of an image, whenever and by whom they were fetched.
"""
FILE_MODE, FOLDER_MODE = 0o644, 0o755
"""Everybody may read: a worker runs as a user of its own."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A model, and what is wanted of it."""

    model: str
    revision: str | None = None
    choice: Choice = SAFE
    state: Callable[[], str] | None = None
    """For a source that can change under the same name: asks it for something that is another one then."""

    def __str__(self) -> str:
        return f"{self.model} at {self.revision}" if self.revision else self.model

    def note(self) -> dict[str, Any]:
        """What is noted of it."""
        return {
            "model": self.model,
            "revision": self.revision,
            "pickles": sorted(self.choice.pickles),
            "code": self.choice.code,
        }


def intact(folder: Path, asked: Asked) -> bool:
    """Whether `folder` is what `keep` put in place for `asked`, and each file still has its size.

    Raises `UsageError` where another model, or another revision, is in it.
    """
    return _fault(folder, asked) is None


@contextmanager
def filling(folder: Path, asked: Asked, console: Console) -> Iterator[Path | None]:
    """Hold the place where `folder` is filled; yields it, or None where another fetch filled it meanwhile.

    Raises `UsageError` where `folder` holds another model, or something that no fetch put there.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is no folder; name another place")
    work = folder.with_name(f".{folder.name}.partial")
    while True:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
        try:
            wait(lock, "fetch of this model", console)
            if (fault := _fault(folder, asked)) is None:
                _remove_if_empty(work, lock)
                yield None
                return
            if not _is(work, lock):  # the fetch that was waited for put it in place, and it was damaged since
                continue
            if folder.is_dir() and any(folder.iterdir()):
                if not (folder / NOTE).exists():
                    _remove_if_empty(work, lock)
                    raise UsageError(f"{folder} is not empty and no fetch made it; name another folder")
                console.say(f"{folder} {fault}; fetching the model again")
            yield work
            return
        finally:
            os.close(lock)


def link(folder: Path, work: Path) -> None:
    """Give `work` the files of `folder` that it lacks, for a download to look at: what is right stays."""
    for file in folder.rglob("*"):
        target = work / file.relative_to(folder)
        if file.is_file() and file.name != NOTE and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # a file system without links
                target.hardlink_to(file)


def keep(work: Path, folder: Path, asked: Asked, origin: Mapping[str, str]) -> None:
    """Put the filled `work` in the place of `folder`, with a note of what was `asked` and of its `origin`."""
    files = sorted(path for path in work.rglob("*") if path.is_file() and path.name != NOTE)
    sizes = {path.relative_to(work).as_posix(): path.stat().st_size for path in files}
    (work / NOTE).write_text(json.dumps({**asked.note(), **origin, "files": sizes}, indent=1) + "\n")
    level(work)
    if folder.exists():
        shutil.rmtree(folder)
    work.rename(folder)


def level(top: Path) -> None:
    """Give `top`, a file or a folder with all that is in it, the one mode and time; it may be missing."""
    there = [top, *top.rglob("*")] if top.exists() else []
    for path in sorted(there, reverse=True):  # what a folder holds comes before it
        mode = FOLDER_MODE if path.is_dir() else FILE_MODE
        found = path.stat()
        if stat.S_IMODE(found.st_mode) != mode:  # what is right already may be somebody else's
            path.chmod(mode)
        if found.st_mtime != MTIME_S:
            os.utime(path, (MTIME_S, MTIME_S))


def empty(work: Path) -> None:
    """Remove what `work` holds and leave the folder, which is locked."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def alone(folder: Path, console: Console) -> Iterator[None]:
    """Hold `folder`, after whoever else does."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        wait(lock, "command in this folder", console)
        yield
    finally:
        os.close(lock)


def wait(lock: int, whose: str, console: Console) -> None:
    """Wait until nobody else holds the descriptor `lock`, and hold it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        console.say(f"waiting for another {whose}")
        fcntl.flock(lock, fcntl.LOCK_EX)


def _fault(folder: Path, asked: Asked) -> str | None:
    """Why the model is to be fetched, as what is said of `folder`; None if it is there."""
    try:
        note = json.loads((folder / NOTE).read_text())
        files: dict[str, int] = dict(note["files"])
        held = Asked(note["model"], note["revision"], Choice(tuple(note["pickles"]), note["code"]))
    except (OSError, ValueError, KeyError, TypeError):
        return "is damaged"
    same_revision = asked.revision in {held.revision, note.get("commit", held.revision)}
    if held.model != asked.model or not same_revision:
        raise UsageError(f"{folder} holds {held}, and {asked} is asked for: name another folder or remove it")
    if not all(_size(folder / name) == size_bytes for name, size_bytes in files.items()):
        return "is damaged"
    if held.choice != asked.choice:
        return "was fetched with other options"
    if asked.state is not None and asked.state() != note.get("state"):
        return f"is not what {asked} is now"
    return None


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def _is(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_if_empty(work: Path, lock: int) -> None:
    if _is(work, lock) and not any(work.iterdir()):
        work.rmdir()
