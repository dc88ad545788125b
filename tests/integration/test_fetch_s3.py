"""Models out of a store that speaks S3: what is taken, and how it is known to have arrived."""

from __future__ import annotations

import json
from base64 import b64encode
from hashlib import md5, sha256
from pathlib import Path

import pytest

from builder.digest import Digest
from builder.s3 import Bucket, Location
from handler.errors import Damaged
from tests.bake_folder import THREE_PARTS_BYTES, noise, read
from tests.object_store import Relay
from tests.place import Place
from tests.until import until

FILES = {"config.json": b"{}", "model.safetensors": noise(1000), "tokenizer.json": b'{"version": "1.0"}'}
OTHERS = {"README.md": b"# A model", "modeling.py": b"import os", "pytorch_model.bin": b"pickle"}
PART_BYTES = 5 << 20
"""The smallest that S3 takes."""


@pytest.fixture
def model(place: Place) -> Place:
    """A prefix that holds a model, and what is not needed of it."""
    for name, body in {**FILES, **OTHERS, "folder/": b""}.items():
        place.put(name, body)
    return place


def note(folder: Path) -> dict[str, object]:
    """What a fetch has noted."""
    noted: dict[str, object] = json.loads((folder / "fetched.json").read_text())
    return noted


def test_needed_files_are_downloaded(model: Place, tmp_path: Path) -> None:
    """Whole, with a note of where they are from and of what was there."""
    out = tmp_path / "out"
    assert model.done("fetch", model.url, "--out", out).out == f"{out}\n"
    listed = model.s3.list_objects_v2(Bucket=model.bucket)["Contents"]
    etags = {entry["Key"].rpartition("/")[2]: entry["ETag"] for entry in listed}
    state = "".join(f"{etags[name]} {len(body)} {name}\n" for name, body in sorted(FILES.items()))
    assert note(out) == {
        "model": model.url,
        "revision": None,
        "pickles": [],
        "code": False,
        "source": "S3",
        "state": sha256(state.encode()).hexdigest(),
        "files": {name: len(body) for name, body in FILES.items()},
    }
    assert {name: body for name, body in read(out).items() if name != "fetched.json"} == FILES


def test_what_happens_is_said(model: Place, tmp_path: Path) -> None:
    """What was not taken, what comes, and where it is."""
    assert model.done("fetch", model.url, "--out", tmp_path / "out").err.splitlines() == [
        "fetch: not taken, as it is Python code: modeling.py; --trust-remote-code takes it",
        f"fetch: downloading {model.url}: 3 files, 1 kB",
        f"fetch: {model.url} is in {tmp_path}/out",
    ]


def test_changed_object_is_downloaded_again(model: Place, tmp_path: Path) -> None:
    """And only that: the store is asked what is there, and what is right stays."""
    fetch = ("fetch", model.url, "--out", tmp_path / "out")
    model.done(*fetch)
    assert model.done(*fetch).err == ""
    model.put("config.json", b'{"new": 1}')
    before = model.answered("GET")
    assert model.done(*fetch).err.splitlines()[0] == (
        f"fetch: {tmp_path}/out is not what {model.url} is now; fetching the model again"
    )
    assert model.answered("GET") == [*before, "config.json"]
    assert (tmp_path / "out/config.json").read_bytes() == b'{"new": 1}'


def test_killed_fetch_goes_on(place: Place, tmp_path: Path) -> None:
    """The pieces that had arrived are not asked for again."""
    weights = noise(THREE_PARTS_BYTES)
    place.put("config.json", b"{}")
    place.put("model.safetensors", weights)
    fetch = ("fetch", place.url, "--out", tmp_path / "out")
    notes = tmp_path / ".out.partial/.pieces/done/model.safetensors"
    with (
        Relay(place.store, b"Range: bytes=33554432-") as relay,
        place.killed(*fetch, through=relay),
    ):
        until(lambda: relay.stalled and notes.is_file() and len(notes.read_text().splitlines()) == 3)
    before = place.answered("GET").count("model.safetensors")
    place.done(*fetch)
    assert place.answered("GET").count("model.safetensors") == before + 1
    assert (tmp_path / "out/model.safetensors").read_bytes() == weights


BODY = noise(2 * PART_BYTES + 1)


def upload(place: Place, name: str, **options: str) -> None:
    """Write `BODY` in parts, as other programs do."""
    target = {"Bucket": place.bucket, "Key": f"deep/prefix/{name}"}
    target["UploadId"] = place.s3.create_multipart_upload(**target, **options)["UploadId"]
    parts = []
    for number, start in enumerate(range(0, len(BODY), PART_BYTES), start=1):
        part = BODY[start : start + PART_BYTES]
        checksum = {"ChecksumSHA256": b64encode(sha256(part).digest()).decode()} if options else {}
        told = place.s3.upload_part(**target, PartNumber=number, Body=part, **checksum)
        parts.append({"PartNumber": number, "ETag": told["ETag"], **checksum})
    place.s3.complete_multipart_upload(**target, MultipartUpload={"Parts": parts})


def test_what_a_store_says_of_an_object_can_be_checked(place: Place, tmp_path: Path) -> None:
    """A checksum or an ETag, of the whole or of its parts; what neither is of, is not checked."""
    place.put("md5", BODY)
    place.put("sha256", BODY, ChecksumAlgorithm="SHA256")
    place.put("pushed", BODY, Metadata={"firsttoken-sha256": sha256(BODY).hexdigest()})
    place.put("encrypted", BODY, ServerSideEncryption="aws:kms")
    upload(place, "md5 of parts")
    upload(place, "sha256 of parts", ChecksumAlgorithm="SHA256")
    bucket = Bucket.open(Location.parse(place.url))
    digests = {name: bucket.digest(name, listed) for name, listed in bucket.objects().items()}
    assert digests.pop("encrypted") is None
    parts = [BODY[start : start + PART_BYTES] for start in range(0, len(BODY), PART_BYTES)]
    md5_of_parts = md5(b"".join(md5(part).digest() for part in parts)).hexdigest()
    sha256_of_parts = sha256(b"".join(sha256(part).digest() for part in parts)).hexdigest()
    assert digests == {
        "md5": Digest("md5", md5(BODY).hexdigest()),
        "sha256": Digest("sha256", sha256(BODY).hexdigest()),
        "pushed": Digest("sha256", sha256(BODY).hexdigest()),
        "md5 of parts": Digest("md5", f"{md5_of_parts}-3", part_bytes=PART_BYTES),
        "sha256 of parts": Digest("sha256", f"{sha256_of_parts}-3", part_bytes=PART_BYTES),
    }
    (tmp_path / "right").write_bytes(BODY)
    (tmp_path / "wrong").write_bytes(BODY[:-1] + b"?")
    for digest in digests.values():
        assert digest is not None
        assert digest.difference(tmp_path / "right", "file") is None
        assert str(digest.difference(tmp_path / "wrong", "file")).startswith(
            f"file: {digest.algorithm}: expected {digest.value}, found "
        )


def test_object_that_changes_while_it_is_read_is_an_error(place: Place) -> None:
    """No file is made of two states of an object."""
    place.put("model.safetensors", b"old")
    bucket = Bucket.open(Location.parse(place.url))
    wanted = bucket.wanted("model.safetensors", bucket.objects()["model.safetensors"], None)
    assert b"".join(wanted.read(0, 2)) == b"ol"
    place.put("model.safetensors", b"new")
    with pytest.raises(Damaged, match=r"^model\.safetensors was written anew while it was read$"):
        next(wanted.read(2, 3))


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({}, "nothing is there"),
        ({"config.json": b"{}", "model.bin": b""}, "it has no .safetensors files."),
        (
            {"manifest.json": b"{}", "model/model.safetensors": b""},
            "it is a whole bake: python -m builder pull takes it",
        ),
    ],
)
def test_prefix_without_a_model_is_not_found(
    place: Place, tmp_path: Path, held: dict[str, bytes], message: str
) -> None:
    """With the reason, and nothing is left behind that a later fetch would take for a model."""
    for name, body in held.items():
        place.put(name, body)
    failed = place.command("fetch", place.url, "--out", tmp_path / "out")
    assert failed.status == 66
    assert failed.err.startswith(f"fetch: {place.url} can't be fetched: {message}")
    assert not (tmp_path / "out").exists()


def test_store_that_refuses_has_no_model(place: Place, tmp_path: Path) -> None:
    """What fetch says of a bucket that is not there, as it does of a repository."""
    failed = place.command("fetch", "s3://no-such-bucket/x", "--out", tmp_path / "out")
    assert (failed.status, failed.err) == (
        66,
        "fetch: s3://no-such-bucket/x: there is no such bucket (The specified bucket does not exist)\n",
    )
