"""What is said of an object store, and what is believed of what it says. No socket: the client is a fake."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping
from hashlib import md5, sha256
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, ConnectTimeoutError, PartialCredentialsError

from builder import s3, upload
from builder.console import Console
from builder.digest import Digest
from builder.s3 import Bucket, Location, Object
from builder.upload import Source
from handler.errors import ManifestMismatch, NoResources, StoreFailed, UsageError

LOCATION = Location("bucket", "prefix")
BODY = b"0123456789"
MD5 = md5(BODY).hexdigest()


class Client:
    """A client that answers with what it is given, or raises it."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def __getattr__(self, operation: str) -> Any:
        """An operation, called with names only, as boto3's are."""

        def call(**_: Any) -> Any:
            answer = self.answers[operation]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call


def refusal(code: str, message: str = "why") -> ClientError:
    """What boto3 raises for an answer with that code."""
    return ClientError({"Error": {"Code": code, "Message": message}}, "HeadObject")


@pytest.mark.parametrize(
    ("url", "location", "shown"),
    [
        ("s3://bucket/a/b", Location("bucket", "a/b"), "s3://bucket/a/b"),
        ("s3://bucket/a/b/", Location("bucket", "a/b"), "s3://bucket/a/b"),
        ("s3://bucket", Location("bucket", ""), "s3://bucket"),
        ("s3://bucket/", Location("bucket", ""), "s3://bucket"),
    ],
)
def test_location_is_a_bucket_and_a_prefix(url: str, location: Location, shown: str) -> None:
    """The prefix may be empty; a slash at its end means nothing."""
    assert Location.parse(url) == location
    assert str(location) == shown
    assert location.key("x") == (f"{location.prefix}/x" if location.prefix else "x")


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///x", "bucket/x", "S3://bucket", "s3://b\n/x", "s3://bucket/x\n"]
)
def test_what_is_no_location_is_refused(url: str) -> None:
    """With what is meant."""
    with pytest.raises(UsageError, match="is not s3://bucket/prefix"):
        Location.parse(url)


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (refusal("AccessDenied"), "access is denied (why)", "AccessDenied"),
        (refusal("NoSuchBucket"), "there is no such bucket (why)", "NoSuchBucket"),
        (refusal("ExpiredToken"), "the credentials have expired (why)", "ExpiredToken"),
        (
            refusal("PermanentRedirect"),
            "the bucket is in another region: set AWS_REGION (why)",
            "PermanentRedirect",
        ),
        (refusal("SlowDown"), "HeadObject was answered with SlowDown (why)", "SlowDown"),
        (
            ConnectTimeoutError(endpoint_url="http://u:p@x"),
            "the connection failed (ConnectTimeoutError)",
            None,
        ),
        (
            PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"),
            "Partial credentials found in env, missing: AWS_SECRET_ACCESS_KEY",
            None,
        ),
    ],
)
def test_what_boto3_means_is_a_sentence(error: Exception, said: str, code: str | None) -> None:
    """With the store's own word, by which a caller can tell."""
    with pytest.raises(StoreFailed) as caught:
        Bucket(LOCATION, Client(head_object=error)).head("x")
    assert (str(caught.value), caught.value.code) == (said, code)


def test_what_is_missing_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that serves models needs no boto3."""
    monkeypatch.setattr(s3, "installed", lambda _: None)
    with pytest.raises(NoResources) as caught:
        Bucket.open(LOCATION)
    assert str(caught.value) == "s3://bucket/prefix needs boto3: pip install 'firsttoken[aws]'"


@pytest.mark.parametrize("code", ["404", "NoSuchKey", "NotFound"])
def test_object_that_is_not_there_is_none(code: str) -> None:
    """Whichever way a store says so."""
    bucket = Bucket(LOCATION, Client(head_object=refusal(code), get_object=refusal(code)))
    assert bucket.head("x") is None
    assert bucket.get("x") is None
    assert not bucket.is_there("x", "00")
    assert bucket.digest("x", Object(1, '"odd-tag"')) is None


def b64(data: bytes) -> str:
    """The digest of `data` as S3 writes it."""
    return b64encode(sha256(data).digest()).decode()


@pytest.mark.parametrize(
    ("head", "there"),
    [
        ({"ChecksumSHA256": b64(BODY)}, True),
        (
            {"ChecksumSHA256": b64(b"other"), "Metadata": {"firsttoken-sha256": sha256(BODY).hexdigest()}},
            False,
        ),
        ({"Metadata": {"firsttoken-sha256": sha256(BODY).hexdigest()}}, True),
        (
            {
                "ChecksumSHA256": f"{b64(b'other')}-2",
                "Metadata": {"firsttoken-sha256": sha256(BODY).hexdigest()},
            },
            True,
        ),
        ({"Metadata": {"firsttoken-sha256": sha256(b"other").hexdigest()}}, False),
        ({}, False),
    ],
)
def test_object_is_there_if_its_digest_is(head: Mapping[str, Any], there: bool) -> None:
    """The store's word counts more than the pusher's, but for one that is of parts."""
    bucket = Bucket(LOCATION, Client(head_object={"ETag": f'"{MD5}"', **head}))
    assert bucket.is_there("x", sha256(BODY).hexdigest()) is there


@pytest.mark.parametrize(
    ("etag", "head", "expected"),
    [
        (MD5, {}, Digest("md5", MD5)),
        (MD5, {"ServerSideEncryption": "AES256"}, Digest("md5", MD5)),
        (MD5, {"ServerSideEncryption": "aws:kms"}, None),
        (MD5, {"SSECustomerAlgorithm": "AES256"}, None),
        ("CPDj7Pb4", {}, None),
        (f"{MD5}-3", {"ContentLength": 4}, Digest("md5", f"{MD5}-3", part_bytes=4)),
        (f"{MD5}-3", {"ContentLength": 3}, None),  # parts of several sizes
    ],
)
def test_etag_is_a_digest_where_it_is_one(
    etag: str, head: Mapping[str, Any], expected: Digest | None
) -> None:
    """A key of one's own, and another store's ways, make it something else."""
    bucket = Bucket(LOCATION, Client(head_object={"ETag": f'"{etag}"', **head}))
    assert bucket.digest("x", Object(len(BODY), f'"{etag}"')) == expected


def test_etag_of_a_directory_bucket_is_no_digest() -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/userguide/s3-express-differences.html."""
    bucket = Bucket(Location("b--use1-az4--x-s3", ""), Client(head_object={"ETag": f'"{MD5}"'}))
    assert bucket.digest("x", Object(len(BODY), f'"{MD5}"')) is None


def test_source_is_read_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its digest, by which a part that changes before it is sent is known."""
    monkeypatch.setattr(upload, "_part_bytes", lambda _: 4)
    file = tmp_path / "file"
    file.write_bytes(BODY)
    told: list[int] = []
    source = Source.read(file, "name", told.append)
    parts = tuple(sha256(part).digest() for part in (b"0123", b"4567", b"89"))
    assert source == Source("name", file, 10, sha256(BODY).hexdigest(), 4, parts)
    assert sum(told) == 10
    assert [source.part(number) for number in (1, 2, 3)] == [b"0123", b"4567", b"89"]
    file.write_bytes(b"0123?567")
    assert source.part(1) == b"0123"
    for number in (2, 3):
        with pytest.raises(ManifestMismatch, match="changed while it was uploaded"):
            source.part(number)


def test_empty_source_is_one_part(tmp_path: Path) -> None:
    """An object of no bytes is an object."""
    (tmp_path / "file").touch()
    assert Source.read(tmp_path / "file", "name", lambda _: None).parts == (sha256().digest(),)


@pytest.mark.parametrize(
    ("size_bytes", "part_bytes"),
    [(0, 16 << 20), (160_000 << 20, 16 << 20), ((160_000 << 20) + 1, 17 << 20), (5 << 40, 525 << 20)],
)
def test_no_upload_has_too_many_parts(size_bytes: int, part_bytes: int) -> None:
    """The largest object there can be, 5 TiB, is 9,987 parts."""
    assert upload._part_bytes(size_bytes) == part_bytes
    assert -(-size_bytes // part_bytes) <= 10_000


@pytest.mark.parametrize(
    ("entry", "right"),
    [
        ({"ChecksumSHA256": b64(BODY), "ETag": '"anything"'}, True),
        ({"ChecksumSHA256": b64(b"other"), "ETag": f'"{MD5}"'}, False),
        ({"ETag": f'"{MD5}"'}, True),
        ({"ETag": f'"{md5(b"other").hexdigest()}"'}, False),
    ],
)
def test_part_that_is_there_is_compared(tmp_path: Path, entry: Mapping[str, Any], right: bool) -> None:
    """By its checksum, or in a store that keeps none by its ETag."""
    (tmp_path / "file").write_bytes(BODY)
    source = Source.read(tmp_path / "file", "name", lambda _: None)
    transfer = upload._Transfer(Bucket(LOCATION, Client()), source, lambda _: None, "id")
    assert transfer._is_right(1, entry) is right


class Forgetful(Client):
    """A store that lists an upload and knows it no more when it is asked; notes what it is asked."""

    def __init__(self, *heads: Any) -> None:
        super().__init__(
            head_object=iter(heads),
            create_multipart_upload={"UploadId": "new"},
            upload_part={"ETag": "tag"},
            complete_multipart_upload={},
        )
        self.asked: list[tuple[str, str | None]] = []

    def __getattr__(self, operation: str) -> Any:
        """An operation that is noted with its upload."""

        def call(**parameters: Any) -> Any:
            self.asked.append((operation, parameters.get("UploadId")))
            answer = self.answers[operation]
            answer = next(answer) if operation == "head_object" else answer
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    def get_paginator(self, operation: str) -> Any:
        """The pages of a listing, of which there is one."""
        entry = {"Key": "prefix/name", "UploadId": "old", "Initiated": 1}
        pages = {"list_multipart_uploads": [{"Uploads": [entry]}]}
        gone = Client(paginate=refusal("NoSuchUpload"))
        return Client(paginate=pages[operation]) if operation in pages else gone


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A file of three parts."""
    monkeypatch.setattr(upload, "_part_bytes", lambda _: 4)
    (tmp_path / "file").write_bytes(BODY)
    return Source.read(tmp_path / "file", "name", lambda _: None)


def test_upload_that_another_push_has_ended_is_done(source: Source) -> None:
    """What came of it is there, so that nothing is sent."""
    client = Forgetful({"ETag": "", "Metadata": {"firsttoken-sha256": source.sha256}})
    upload.upload(Bucket(LOCATION, client), [source], Console(io.StringIO()))
    assert client.asked == [("head_object", None)]


def test_upload_that_the_store_has_forgotten_is_begun_anew(source: Source) -> None:
    """Somebody has dropped it, and nothing came of it."""
    client = Forgetful(refusal("404"), {"ETag": "", "Metadata": {"firsttoken-sha256": source.sha256}})
    upload.upload(Bucket(LOCATION, client), [source], Console(io.StringIO()))
    assert client.asked == [
        ("head_object", None),
        ("create_multipart_upload", None),
        *[("upload_part", "new")] * 3,
        ("complete_multipart_upload", "new"),
        ("head_object", None),
    ]


def test_upload_that_never_is_what_was_sent_is_an_error(source: Source) -> None:
    """Two pushes that replace each other's files do not go on for ever."""
    other = {"ETag": "", "Metadata": {"firsttoken-sha256": "00"}}
    client = Forgetful(other, other)
    with pytest.raises(StoreFailed, match="another push is at work"):
        upload.upload(Bucket(LOCATION, client), [source], Console(io.StringIO()))
