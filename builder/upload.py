"""Files into an object store, large ones in parts and several at a time; one that was cut short goes on.

The store itself keeps the parts of an upload that has not ended, and lists them with their digests.
Each part is sent with its SHA-256, by which the store checks it. What the digest of a whole object is
stands in its metadata, for the store works out none of an object that was uploaded in parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Self

from builder.console import Console
from builder.parallel import Stop
from builder.progress import Advance, progress
from builder.s3 import SHA256, Bucket, b64
from handler.errors import ManifestMismatch, StoreFailed
from handler.manifest import PIECE_BYTES

PART_BYTES = 16 << 20
MAX_PARTS = 10_000
"""Of one upload: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html."""
GONE = "NoSuchUpload"


@dataclass(frozen=True, slots=True)
class Source:
    """A file to upload as `name`, as it was when it was read: its digest, and that of each part."""

    name: str
    path: Path
    size_bytes: int
    sha256: str
    part_bytes: int
    parts: tuple[bytes, ...]

    @classmethod
    def read(cls, path: Path, name: str, advance: Advance) -> Source:
        """Read the file at `path`; `advance` hears how much of it. Raises `OSError`."""
        size_bytes = path.stat().st_size
        part_bytes = _part_bytes(size_bytes)
        whole, parts = hashlib.sha256(), []
        with path.open("rb", buffering=0) as reader:
            for start in range(0, max(size_bytes, 1), part_bytes):
                part, left = hashlib.sha256(), min(part_bytes, size_bytes - start)
                while left and (piece := reader.read(min(PIECE_BYTES, left))):
                    part.update(piece)
                    whole.update(piece)
                    left -= len(piece)
                    advance(len(piece))
                parts.append(part.digest())
        return cls(name, path, size_bytes, whole.hexdigest(), part_bytes, tuple(parts))

    def part(self, number: int) -> bytes:
        """The bytes of a part, of which the first is 1. Raises `ManifestMismatch` if they changed."""
        with self.path.open("rb", buffering=0) as reader:
            reader.seek((number - 1) * self.part_bytes)
            data = reader.read(self.part_bytes)
        if hashlib.sha256(data).digest() != self.parts[number - 1]:
            raise ManifestMismatch(f"{self.path} changed while it was uploaded")
        return data

    def digest(self, number: int) -> str:
        """The SHA-256 of a part as S3 writes it."""
        return b64(self.parts[number - 1].hex())


def upload(bucket: Bucket, sources: Sequence[Source], console: Console) -> None:
    """Upload `sources`. Raises `StoreFailed`, and `ManifestMismatch` where one changes meanwhile."""
    with progress(console, "uploading", sum(source.size_bytes for source in sources)) as advance:
        begun = _begun(bucket) if any(len(source.parts) > 1 for source in sources) else {}
        lost = _round(bucket, sources, begun, advance)
        # Another push ended or dropped what this one went on with, or had begun it for other content.
        lost = [source for source in lost if not bucket.is_there(source.name, source.sha256)]
        if _round(bucket, lost, {}, advance):
            raise StoreFailed("what was uploaded is not there: another push is at work")


def _part_bytes(size_bytes: int) -> int:
    """As few bytes a part as the number of parts allows, in whole MiB, and not less than `PART_BYTES`."""
    return max(PART_BYTES, -(-size_bytes // (MAX_PARTS << 20)) << 20)


def _begun(bucket: Bucket) -> dict[str, list[str]]:
    """The uploads below the location that have not ended, by their keys, the newest last."""
    found = [
        entry
        for page in bucket.pages("list_multipart_uploads", Prefix=bucket.location.key(""))
        for entry in page.get("Uploads", ())
        if entry.get("ChecksumAlgorithm", "SHA256") == "SHA256"
    ]
    begun: dict[str, list[str]] = {}
    for entry in sorted(found, key=lambda entry: entry["Initiated"]):
        begun.setdefault(entry["Key"], []).append(entry["UploadId"])
    return begun


def _round(
    bucket: Bucket, sources: Iterable[Source], begun: Mapping[str, list[str]], advance: Advance
) -> list[Source]:
    """One attempt at all of `sources`; returns those whose upload is gone, or was another's."""

    def begin(source: Source) -> _Transfer:
        ids = begun.get(bucket.location.key(source.name), ())
        return _Transfer.begin(bucket, source, ids, advance)

    def send(task: tuple[_Transfer, int]) -> None:
        transfer, number = task
        transfer.send(number)

    stop = Stop()
    transfers = stop.all(begin, sources)
    stop.all(
        _Transfer.end, [transfer for transfer in transfers if not transfer.missing and not transfer.lost]
    )
    stop.all(send, [(transfer, number) for transfer in transfers for number in transfer.missing])
    return [transfer.source for transfer in transfers if transfer.lost]


@dataclass(slots=True)
class _Transfer:
    """A file on its way up: what `complete_multipart_upload` has to be told of the parts that are there."""

    bucket: Bucket
    source: Source
    advance: Advance
    upload_id: str | None
    others: Sequence[str] = ()
    parts: dict[int, dict[str, Any]] = field(default_factory=dict)
    lost: bool = False
    lock: Lock = field(default_factory=Lock)

    @classmethod
    def begin(cls, bucket: Bucket, source: Source, begun: Sequence[str], advance: Advance) -> Self:
        """Go on with the newest of the uploads that have `begun`, else begin one."""
        if len(source.parts) == 1:
            return cls(bucket, source, advance, None)
        if not begun:
            transfer = cls(bucket, source, advance, "")
            answer = transfer._call(
                "create_multipart_upload", ChecksumAlgorithm="SHA256", Metadata={SHA256: source.sha256}
            )
            transfer.upload_id = answer["UploadId"]
            return transfer
        transfer = cls(bucket, source, advance, begun[-1], begun[:-1])
        with transfer._unless_gone():
            transfer._look()
        return transfer

    @property
    def missing(self) -> list[int]:
        """The numbers of the parts to send."""
        numbers = range(1, len(self.source.parts) + 1)
        return [] if self.lost else [number for number in numbers if number not in self.parts]

    def send(self, number: int) -> None:
        """Upload a part; the last one ends the upload."""
        if self.lost:
            return
        data, digest = self.source.part(number), self.source.digest(number)
        if self.upload_id is None:
            self._call("put_object", Body=data, ChecksumSHA256=digest, Metadata={SHA256: self.source.sha256})
            self.advance(len(data))
            return
        with self._unless_gone():
            answer = self._call(
                "upload_part", UploadId=self.upload_id, PartNumber=number, Body=data, ChecksumSHA256=digest
            )
            self.advance(len(data))
            with self.lock:
                self.parts[number] = _part(number, answer)
                last = not self.missing
            if last:
                self.end()

    def end(self) -> None:
        """Make an object of the parts, which are all there."""
        with self._unless_gone():
            parts = {"Parts": [part for _, part in sorted(self.parts.items())]}
            self._call("complete_multipart_upload", UploadId=self.upload_id, MultipartUpload=parts)
            # Its metadata was given when the upload was begun, maybe by a push of something else.
            self.lost = not self.bucket.is_there(self.source.name, self.source.sha256)
            for other in self.others:
                with suppress(StoreFailed):  # they cost money and do no harm
                    self._call("abort_multipart_upload", UploadId=other)

    def _look(self) -> None:
        """Take note of the parts that are there and are right."""
        key = self.bucket.location.key(self.source.name)
        for page in self.bucket.pages("list_parts", Key=key, UploadId=self.upload_id):
            for entry in page.get("Parts", ()):
                number = entry["PartNumber"]
                if number <= len(self.source.parts) and self._is_right(number, entry):
                    self.parts[number] = _part(number, entry)
                    self.advance(entry["Size"])

    def _is_right(self, number: int, entry: Mapping[str, Any]) -> bool:
        if said := entry.get("ChecksumSHA256"):
            return bool(said == self.source.digest(number))
        md5 = hashlib.md5(self.source.part(number), usedforsecurity=False)
        return bool(entry["ETag"].strip('"') == md5.hexdigest())

    def _call(self, operation: str, **parameters: Any) -> Mapping[str, Any]:
        return self.bucket.call(operation, Key=self.bucket.location.key(self.source.name), **parameters)

    @contextmanager
    def _unless_gone(self) -> Iterator[None]:
        """Note that the store knows the upload no more."""
        try:
            yield
        except StoreFailed as failure:
            if failure.code != GONE:
                raise
            self.lost = True


def _part(number: int, said: Mapping[str, Any]) -> dict[str, Any]:
    """A part as the end of an upload names it, by what the store `said` of it."""
    part = {"PartNumber": number, "ETag": said["ETag"]}
    if checksum := said.get("ChecksumSHA256"):
        part["ChecksumSHA256"] = checksum
    return part
