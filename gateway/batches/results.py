"""The two files that a batch makes, of answers and of errors: written bit by bit, then files as any."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, Self

from gateway.batches.table import Row
from gateway.files.draft import digest, sync_folder
from gateway.files.store import READ_BYTES, File, FileStore


class Results:
    """What a batch has written, open to write more: as much as its row says; what is behind is cut off.

    Raises `FileNotFoundError` where there is less than that.
    """

    def __init__(self, files: FileStore, row: Row) -> None:
        self._paths = _paths(files, row)
        self._sizes = [row.output_bytes, row.error_bytes]
        self._files: list[BinaryIO] = []

    def __enter__(self) -> Self:
        for path, size_bytes in zip(self._paths, self._sizes, strict=True):
            path.touch(mode=0o600)
            file = path.open("r+b")
            self._files.append(file)
            if file.seek(0, os.SEEK_END) < size_bytes:
                self.__exit__()
                raise FileNotFoundError(path)
            file.truncate(size_bytes)
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def append(self, *pieces: bytes) -> tuple[int, ...]:
        """Write a piece for each file; returns their sizes, all of it on the disk."""
        for number, (file, piece) in enumerate(zip(self._files, pieces, strict=True)):
            if piece:
                file.seek(self._sizes[number])
                file.write(piece)
                file.flush()
                os.fdatasync(file.fileno())
                self._sizes[number] += len(piece)
        return tuple(self._sizes)


def copy(files: FileStore, source: Row, target: Row) -> None:
    """Copy what counts of the results of `source` to those of `target`, on the disk once this returns.

    Where there is less, the copy has less.
    """
    sizes = (source.output_bytes, source.error_bytes)
    for old, new, size_bytes in zip(_paths(files, source), _paths(files, target), sizes, strict=True):
        if not size_bytes or not old.exists():
            continue
        with (
            old.open("rb") as reading,
            os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file,
        ):
            left = size_bytes
            while left and (piece := reading.read(min(left, READ_BYTES))):
                file.write(piece)
                left -= len(piece)
            file.flush()
            os.fsync(file.fileno())
    sync_folder(files.path(target.id).parent)


def made_files(files: FileStore, row: Row) -> list[File | None]:
    """The files of answers and of errors, by now on the disk; None for an empty one, which is removed."""
    now = int(files.now())
    expires_at = None if row.expires_in_s is None else now + row.expires_in_s
    made: list[File | None] = []
    for path, what in zip(_paths(files, row), ("output", "error"), strict=True):
        size_bytes, sha256 = digest(path)
        if not size_bytes:
            path.unlink()
            made.append(None)
            continue
        name = f"{row.id}_{what}.jsonl"
        made.append(File(path.name, row.key_id, "batch_output", name, size_bytes, sha256, now, expires_at))
    sync_folder(path.parent)
    return made


def _paths(files: FileStore, row: Row) -> tuple[Path, Path]:
    return files.path(row.output_file_id), files.path(row.error_file_id)
