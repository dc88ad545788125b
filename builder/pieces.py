"""Files downloaded in pieces, several at a time; a download that was killed goes on with what is there.

    FOLDER/NAME              a file that is whole, and is what its source says of it
    FOLDER/.pieces/data/     a file with holes, under its quoted name, or the digest of that
    FOLDER/.pieces/done/     which of its pieces are there: what it is a part of, then a number a line

A piece is noted when its bytes are written, so that whatever ends the process costs at most the
pieces that were on their way. Nothing here knows where files come from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from urllib.parse import quote

from builder import disk
from builder.console import Console
from builder.digest import Digest
from builder.parallel import Stop
from builder.progress import Advance, progress
from handler.errors import Damaged
from handler.manifest import Difference

PIECE_BYTES = 16 << 20
TRIES = 5
"""How often a connection may break, one after another, without a byte that is new."""
FIRST_WAIT_S = 0.5
"""Before the second try; each later one waits twice as long."""
FOLDER = ".pieces"
MAX_NAME = 200
"""Characters; file systems take 255 bytes."""

Read = Callable[[int, int], Iterator[bytes]]
"""The bytes of a file from one offset to another; raises `Broken`."""


class Broken(Exception):
    """The connection ended before its time; what is missing can be asked for again."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to download: where it goes below the folder, and how its bytes are had.

    `version` is another one when its source has other bytes under this name. Without a `digest`
    the source says no more of the file than its size.
    """

    name: str
    size_bytes: int
    version: str
    read: Read
    digest: Digest | None


def download(
    files: Sequence[Wanted], folder: Path, console: Console, *, piece_bytes: int = PIECE_BYTES
) -> None:
    """Leave `files` in `folder`, and nothing else.

    A file that arrives wrong is downloaded once more. Raises `Damaged` where it is wrong again,
    `Broken` where connections keep breaking, `NoResources` where the disk is full.
    """
    _prune(folder, {file.name for file in files})
    with progress(console, "downloading", sum(file.size_bytes for file in files)) as advance:
        wrong = _Round(folder, piece_bytes, advance).run(files)
        for difference in wrong:
            console.say(f"{difference}; downloading it again")
        again = {difference.path for difference in wrong}
        if wrong := _Round(folder, piece_bytes, advance).run([file for file in files if file.name in again]):
            raise Damaged(f"what arrived is not what was sent: {'; '.join(map(str, wrong))}")
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def missing_bytes(files: Sequence[Wanted], folder: Path) -> int:
    """How much more of the disk `files` will take, beside what an earlier download left in `folder`."""
    held = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    return sum(file.size_bytes for file in files) - held


def _prune(folder: Path, names: set[str]) -> None:
    """Remove what an earlier download of something else has left in `folder`."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what a folder holds comes before it
        name = path.relative_to(folder).as_posix()
        if name.partition("/")[0] == FOLDER or name in names:
            continue
        if not path.is_dir() or path.is_symlink():
            path.unlink()
        elif not any(path.iterdir()):
            path.rmdir()


class _Part:
    """A file that is on its way, and the numbers of the pieces that it lacks."""

    def __init__(self, wanted: Wanted, folder: Path, piece_bytes: int) -> None:
        name = quote(wanted.name, safe="")
        if len(name) > MAX_NAME:
            name = hashlib.sha256(name.encode()).hexdigest()
        self.wanted = wanted
        self.target = folder / wanted.name
        self.data = folder / FOLDER / "data" / name
        self.done = folder / FOLDER / "done" / name
        self.piece_bytes = piece_bytes
        self.kind = json.dumps([wanted.name, wanted.version, wanted.size_bytes, piece_bytes])
        self.lock = Lock()
        self.known, there = self._noted()
        self.missing = set(range(self._count())) - there

    def _count(self) -> int:
        return -(-self.wanted.size_bytes // self.piece_bytes)

    def _noted(self) -> tuple[bool, set[int]]:
        """Whether an earlier download worked at this file in this state, and which pieces it noted."""
        try:
            kind, *numbers = self.done.read_text().split("\n")
        except (OSError, ValueError):
            return False, set()
        if kind != self.kind:
            return False, set()
        # The last line is empty, or was cut short.
        return True, {int(number) for number in numbers[:-1] if number.isdecimal()}

    def is_there(self) -> bool:
        """Whether the file is in its place, and right as far as can be known."""
        size_bytes = self.target.stat().st_size if self.target.is_file() else None
        if size_bytes != self.wanted.size_bytes:
            return False
        digest = self.wanted.digest
        return not self.missing if digest is None else not digest.difference(self.target, self.wanted.name)

    def begin(self) -> None:
        """Make the file with holes, unless an earlier download has left it."""
        self.target.unlink(missing_ok=True)
        if self.known and self.data.is_file() and self.data.stat().st_size == self.wanted.size_bytes:
            return
        self.missing = set(range(self._count()))
        for path in (self.data, self.done):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.done.unlink(missing_ok=True)  # before what it speaks of is gone
        with self.data.open("wb") as writer:
            writer.truncate(self.wanted.size_bytes)
        self.done.write_text(self.kind + "\n")

    def span(self, number: int) -> tuple[int, int]:
        """Where a piece begins and ends, in bytes."""
        start = number * self.piece_bytes
        return start, min(start + self.piece_bytes, self.wanted.size_bytes)

    def note(self, number: int) -> bool:
        """Remember that a piece is there; returns whether it was the last that was missing."""
        with self.lock:
            with self.done.open("ab", buffering=0) as writer:
                writer.write(b"%d\n" % number)
            self.missing.remove(number)
            return not self.missing

    def end(self) -> Difference | None:
        """Put the file, which is whole, in its place; one that is wrong is cleared away, and named."""
        digest = self.wanted.digest
        if digest is not None and (wrong := digest.difference(self.data, self.wanted.name)):
            self.done.unlink()
            self.data.unlink()
            return wrong
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.data.replace(self.target)
        return None


class _Round:
    """One attempt at all files: what is there already, then the missing pieces."""

    def __init__(self, folder: Path, piece_bytes: int, advance: Advance) -> None:
        self.folder = folder
        self.piece_bytes = piece_bytes
        self.advance = advance
        self.stop = Stop()

    def run(self, files: Sequence[Wanted]) -> list[Difference]:
        """Download `files`; returns what is wrong with those that are not there now."""
        parts = [part for part in self.stop.all(self._part, files) if part is not None]
        whole = [part for part in parts if not part.missing]
        pieces = [(part, number) for part in parts for number in sorted(part.missing)]
        wrong = [*self.stop.all(self._end, whole), *self.stop.all(self._piece, pieces)]
        return sorted((one for one in wrong if one is not None), key=lambda one: one.path)

    def _part(self, file: Wanted) -> _Part | None:
        """What is missing of `file`; None if it is in its place, and right."""
        part = _Part(file, self.folder, self.piece_bytes)
        if part.is_there():
            self.advance(file.size_bytes)
            return None
        with disk.filled(self.folder):
            part.begin()
        lacking = sum(end - start for start, end in map(part.span, part.missing))
        self.advance(file.size_bytes - lacking)
        return part

    def _piece(self, task: tuple[_Part, int]) -> Difference | None:
        """Download a piece; returns what is wrong with its file if it was the last and something is."""
        part, number = task
        with part.data.open("r+b", buffering=0) as writer, disk.filled(self.folder):
            self._fill(part.wanted.read, writer.fileno(), *part.span(number))
            last = part.note(number)
        return self._end(part) if last else None

    def _fill(self, read: Read, file: int, position: int, end: int) -> None:
        """Write what `read` gives from `position` to `end` into the descriptor `file`."""
        broken = 0
        while position < end:
            try:
                for data in read(position, end):
                    self.stop.check()
                    kept = data[: end - position]
                    _write(file, kept, position)
                    position += len(kept)
                    self.advance(len(kept))
                    broken = 0
                if position < end:
                    raise Broken("it ended early")
            except Broken:
                broken += 1
                if broken == TRIES:
                    raise
                self.stop.check(FIRST_WAIT_S * 2 ** (broken - 1))

    def _end(self, part: _Part) -> Difference | None:
        wrong = part.end()
        if wrong is not None:
            self.advance(-part.wanted.size_bytes)
        return wrong


def _write(file: int, data: bytes, position: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, position)
        rest, position = rest[written:], position + written
