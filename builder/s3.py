"""A prefix in a store that speaks S3: its objects, their digests, and what it means when it refuses.

The one file of the builder that imports boto3. Endpoint, region and credentials are what it finds by itself
in the process's environment and files (AWS_ENDPOINT_URL, AWS_PROFILE, a role, ...), so that any store
that speaks S3 will do: https://docs.aws.amazon.com/boto3/latest/guide/configuration.html
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from builder.credentials import without_password
from builder.digest import Digest
from builder.parallel import WORKERS
from builder.pieces import Broken, Wanted
from builder.reach import reachable
from handler.errors import Damaged, NoResources, StoreFailed, UsageError
from handler.prerequisites import installed
from handler.stored import refusals

CHUNK_BYTES = 1 << 20
SHA256 = "firsttoken-sha256"
"""The metadata by which `push` says what a whole object is, however it was uploaded."""
CHANGED = {"412", "PreconditionFailed"}
MISSING = {"404", "NoSuchKey", "NotFound"}

_LOCATION = re.compile(r"s3://([A-Za-z0-9][\w.-]{1,254})(?:/(.*))?", re.ASCII)
_MD5 = re.compile(r"[0-9a-f]{32}(-\d+)?")
_OF_PARTS = re.compile(r"-(\d+)\"?$")


@dataclass(frozen=True, slots=True)
class Location:
    """`s3://bucket/prefix`; the prefix may be empty."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read `url`. Raises `UsageError`."""
        match = _LOCATION.fullmatch(url)
        if match is None or not url.isprintable():
            raise UsageError(f"{url!r} is not s3://bucket/prefix")
        return cls(match[1], (match[2] or "").strip("/"))

    def key(self, name: str) -> str:
        """The key of the object that is called `name` below the prefix."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


@dataclass(frozen=True, slots=True)
class Object:
    """What a listing says of an object; another `etag` is another content."""

    size_bytes: int
    etag: str


class Bucket:
    """What is below a location, asked with a client of boto3's."""

    def __init__(self, location: Location, client: Any) -> None:
        self.location = location
        self.client = client

    @classmethod
    def open(cls, location: Location) -> Self:
        """Raises `NoResources` without boto3, `StoreFailed`, within seconds, where nobody answers."""
        if not installed("boto3"):
            raise NoResources(f"{location} needs boto3: pip install 'firsttoken[aws]'")
        import boto3  # noqa: PLC0415 - takes half a second, and is not everywhere
        from botocore.config import Config  # noqa: PLC0415

        config = Config(
            connect_timeout=5,
            read_timeout=30,
            max_pool_connections=WORKERS,
            retries={"mode": "standard", "total_max_attempts": 5},
            # What is sent has a SHA-256 of its own, and not every store knows the kinds that are newer.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        with refusals():
            client = boto3.Session().client("s3", config=config)
        if not reachable(client.meta.endpoint_url):
            raise StoreFailed(f"{without_password(client.meta.endpoint_url)} can't be reached")
        return cls(location, client)

    def call(self, operation: str, **parameters: Any) -> Mapping[str, Any]:
        """Call an operation of the client's on this bucket. Raises `StoreFailed`."""
        with refusals():
            answer: Mapping[str, Any] = getattr(self.client, operation)(
                Bucket=self.location.bucket, **parameters
            )
        return answer

    def pages(self, operation: str, **parameters: Any) -> Iterator[Mapping[str, Any]]:
        """All pages of an operation that lists. Raises `StoreFailed`."""
        with refusals():
            yield from self.client.get_paginator(operation).paginate(
                Bucket=self.location.bucket, **parameters
            )

    def objects(self) -> dict[str, Object]:
        """Every object below the location, by its name there. Raises `StoreFailed`."""
        top = self.location.key("")
        return {
            entry["Key"].removeprefix(top): Object(entry["Size"], entry["ETag"])
            for page in self.pages("list_objects_v2", Prefix=top)
            for entry in page.get("Contents", ())
            if not entry["Key"].endswith("/")  # what consoles make to show a folder
        }

    def head(self, name: str) -> Mapping[str, Any] | None:
        """What the store says of an object, its checksums too; None if there is none."""
        try:
            return self.call("head_object", Key=self.location.key(name), ChecksumMode="ENABLED")
        except StoreFailed as failure:
            if failure.code in MISSING:
                return None
            raise

    def get(self, name: str) -> bytes | None:
        """A small object's bytes; None if there is none."""
        try:
            with refusals():
                answer = self.client.get_object(Bucket=self.location.bucket, Key=self.location.key(name))
                data: bytes = answer["Body"].read()
        except StoreFailed as failure:
            if failure.code in MISSING:
                return None
            raise
        return data

    def wanted(self, name: str, listed: Object, digest: Digest | None) -> Wanted:
        """An object as what is to be downloaded; `Damaged` is raised where it changes meanwhile."""

        def read(start: int, stop: int) -> Iterator[bytes]:
            try:
                answer = self.call(
                    "get_object",
                    Key=self.location.key(name),
                    Range=f"bytes={start}-{stop - 1}",
                    IfMatch=listed.etag,
                )
            except StoreFailed as failure:
                if failure.code in CHANGED:
                    raise Damaged(f"{name} was written anew while it was read") from failure
                raise
            yield from _chunks(answer["Body"])

        return Wanted(name, listed.size_bytes, listed.etag, read, digest)

    def is_there(self, name: str, sha256: str) -> bool:
        """Whether the store says, or who pushed it, that the object `name` has that digest."""
        head = self.head(name) or {}
        if (said := head.get("ChecksumSHA256")) and not _parts(said, head["ETag"]):
            return bool(said == b64(sha256))
        return bool(head.get("Metadata", {}).get(SHA256) == sha256)

    def digest(self, name: str, listed: Object) -> Digest | None:
        """What the store says of an object's bytes, or who pushed it; None if that can't be checked."""
        head = self.head(name) or {}
        if said := head.get("Metadata", {}).get(SHA256):
            return Digest("sha256", said)
        return self._checksum(name, listed, head) or self._etag(name, listed, head)

    def _checksum(self, name: str, listed: Object, head: Mapping[str, Any]) -> Digest | None:
        said = head.get("ChecksumSHA256", "")
        try:
            value = base64.b64decode(said.partition("-")[0], validate=True).hex()
        except binascii.Error:
            return None
        if parts := _parts(said, listed.etag):
            return self._of_parts(name, listed, "sha256", value, parts)
        return Digest("sha256", value) if value else None

    def _etag(self, name: str, listed: Object, head: Mapping[str, Any]) -> Digest | None:
        """The MD5 that an ETag is unless a key of one's own encrypts, or the bucket is a directory."""
        own_key = head.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in head
        etag = listed.etag.strip('"')
        if own_key or self.location.bucket.endswith("--x-s3") or not _MD5.fullmatch(etag):
            return None
        if parts := _parts("", etag):
            return self._of_parts(name, listed, "md5", etag.partition("-")[0], parts)
        return Digest("md5", etag)

    def _of_parts(self, name: str, listed: Object, algorithm: str, value: str, parts: int) -> Digest | None:
        """The digest of an object that was uploaded in parts, if these are as large as the first."""
        first = self.call("head_object", Key=self.location.key(name), PartNumber=1)
        part_bytes = first["ContentLength"]
        if not value or -(-listed.size_bytes // part_bytes) != parts:
            return None
        return Digest(algorithm, f"{value}-{parts}", part_bytes=part_bytes)


@contextmanager
def told(location: Location) -> Iterator[None]:
    """Say of a failure where it was."""
    try:
        yield
    except StoreFailed as failure:
        raise StoreFailed(f"{location}: {failure}", code=failure.code) from failure
    except Broken as failure:
        reason = f"the connection broke again and again ({failure})"
        raise StoreFailed(f"{location}: {reason}") from failure


def _parts(checksum: str, etag: str) -> int:
    """In how many parts an object was uploaded; 0 if as a whole, for then its digests are of all of it."""
    found = _OF_PARTS.search(checksum) or _OF_PARTS.search(etag)
    return int(found[1]) if found else 0


def b64(sha256: str) -> str:
    """A digest in hexadecimal as S3 writes it."""
    return base64.b64encode(bytes.fromhex(sha256)).decode()


def _chunks(body: Any) -> Iterator[bytes]:
    from botocore import exceptions  # noqa: PLC0415 - as above

    try:
        yield from body.iter_chunks(CHUNK_BYTES)
    except (exceptions.HTTPClientError, exceptions.IncompleteReadError) as error:
        raise Broken(type(error).__name__) from error
