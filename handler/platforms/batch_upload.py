"""Objects of S3 that are replaced only if they are as they were seen; long ones are sent in pieces."""

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
    """The ETag of an object as it was seen; None if there was none."""

    etag: str | None

    @property
    def unchanged(self) -> dict[str, str]:
        """Arguments of a write that fails unless the object is still as it was seen."""
        return {"IfNoneMatch": "*"} if self.etag is None else {"IfMatch": self.etag}


class Upload:
    """A file that is sent to S3 as it is made, and replaces nothing but what was `seen`."""

    def __init__(self, clients: Clients, bucket: str, key: str, seen: Seen) -> None:
        self._clients = clients
        self._place = {"Bucket": bucket, "Key": key}
        self._seen = seen
        self._held = bytearray()
        self._upload: dict[str, str] = {}
        self._pieces: list[dict[str, Any]] = []

    def write(self, data: bytes) -> None:
        """Add `data` to the file; whole pieces of it are sent."""
        self._held += data
        while len(self._held) >= PIECE_BYTES:
            with memoryview(self._held) as held:
                piece = bytes(held[:PIECE_BYTES])
            self._send(piece)
            del self._held[:PIECE_BYTES]

    def finish(self) -> bool:
        """Send the rest, and have the file take its place; False if the object there is another by now."""
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
        """Delete the pieces that were sent. Does nothing once the upload is finished."""
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
