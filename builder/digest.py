"""What a source says of a file's bytes, and whether the bytes are so."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from handler.manifest import PIECE_BYTES, Difference


@dataclass(frozen=True, slots=True)
class Digest:
    """A digest of a file, `value` in hexadecimal, and how it is made.

    `before` is hashed before the file. With `part_bytes` it is S3's of an object that was uploaded
    in parts of that size: the digest of all their digests, a hyphen, how many there are.
    https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html
    """

    algorithm: str
    value: str
    before: bytes = b""
    part_bytes: int | None = None

    def difference(self, file: Path, path: str) -> Difference | None:
        """What is wrong with `file`, which people know as `path`; None if nothing is."""
        found = self.of(file)
        return None if found == self.value else Difference(path, self.algorithm, self.value, found)

    def of(self, file: Path) -> str:
        """The digest of `file`, made as this one was."""
        with file.open("rb", buffering=0) as reader:
            if self.part_bytes is None:
                return self._next(reader, self.before, None).hex()
            size_bytes = file.stat().st_size
            count = -(-size_bytes // self.part_bytes)
            parts = b"".join(self._next(reader, b"", self.part_bytes) for _ in range(count))
        return f"{self._new(parts).hexdigest()}-{count}"

    def _next(self, reader: BinaryIO, before: bytes, limit_bytes: int | None) -> bytes:
        """The digest of what `reader` has next, at most `limit_bytes` of it."""
        digest = self._new(before)
        left = limit_bytes
        while piece := reader.read(PIECE_BYTES if left is None else min(PIECE_BYTES, left)):
            digest.update(piece)
            left = left if left is None else left - len(piece)
        return digest.digest()

    def _new(self, data: bytes) -> hashlib._Hash:
        return hashlib.new(self.algorithm, data, usedforsecurity=False)


def git_blob(size_bytes: int, value: str) -> Digest:
    """What git calls a file of that size: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects."""
    return Digest("sha1", value, b"blob %d\0" % size_bytes)
