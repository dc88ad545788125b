"""Objects that are written only over what was seen of them, a long one in pieces as it comes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from handler.errors import AwsFailed
from handler.platforms.aws_clients import Clients

PIECE_BYTES = 8 << 20
"""What is sent of a long file at a time; S3 wants at least 5 MiB, and at most 10,000 pieces."""
CHANGED = frozenset({409, 412})
"""What S3 answers where a condition does not hold, or another writes at the same time."""

JSONL = {"ContentType": "application/jsonl"}


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of an object: its ETag, None where there was none."""

    etag: str | None

    @property
    def unchanged(self) -> dict[str, str]:
        """The condition that it is still so."""
        return {"IfNoneMatch": "*"} if self.etag is None else {"IfMatch": self.etag}


class Upload:
    """A file that is written as it comes, in pieces, over what was `seen` of it and nothing else."""

    def __init__(self, clients: Clients, bucket: str, key: str, seen: Seen) -> None:
        self._clients = clients
        self._place = {"Bucket": bucket, "Key": key}
        self._seen = seen
        self._held = bytearray()
        self._upload: dict[str, str] = {}
        self._pieces: list[dict[str, Any]] = []

    def write(self, data: bytes) -> None:
        """Take what is next."""
        self._held += data
        while len(self._held) >= PIECE_BYTES:
            with memoryview(self._held) as held:
                piece = bytes(held[:PIECE_BYTES])
            self._send(piece)
            del self._held[:PIECE_BYTES]

    def finish(self) -> bool:
        """Make it the file; False, and it is not, if that has changed."""
        try:
            if not self._upload:
                self._call("put_object", Body=bytes(self._held), **JSONL, **self._seen.unchanged)
                return True
            if self._held:
                self._send(bytes(self._held))
            self._call(
                "complete_multipart_upload",
                MultipartUpload={"Parts": self._pieces},
                **self._upload,
                **self._seen.unchanged,
            )
        except AwsFailed as error:
            if error.http_status not in CHANGED:
                raise
            return False
        self._upload = {}
        return True

    def abort(self) -> None:
        """Leave no pieces behind; nothing if it is finished."""
        if self._upload:
            with suppress(AwsFailed):  # the bucket's rule for such uploads will do it
                self._call("abort_multipart_upload", **self._upload)
            self._upload = {}

    def _send(self, piece: bytes) -> None:
        if not self._upload:
            self._upload = {"UploadId": self._call("create_multipart_upload", **JSONL)["UploadId"]}
        number = len(self._pieces) + 1
        answer = self._call("upload_part", PartNumber=number, Body=piece, **self._upload)
        self._pieces.append({"PartNumber": number, "ETag": answer["ETag"]})

    def _call(self, operation: str, **parameters: Any) -> Any:
        return self._clients.call("s3", operation, **self._place, **parameters)
