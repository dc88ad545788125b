"""A model in S3: what `MODEL_NAME=s3://bucket/prefix` means, on moto's server in S3's place."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from handler import baked, stored
from handler.errors import ManifestMismatch, ModelNotFound, NoResources, StartError, StoreFailed
from handler.manifest import NAME, Manifest
from handler.stored import Stored
from tests.bake_folder import files, sealed
from tests.object_store import ObjectStore


@pytest.fixture
def store(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """S3, as boto3 finds it by the environment."""
    for name, value in object_store.environ.items():
        monkeypatch.setenv(name, value)
    return object_store


@pytest.fixture
def bucket(store: ObjectStore) -> str:
    """An empty bucket."""
    name = f"models-{uuid.uuid4()}"
    store.client().create_bucket(Bucket=name)
    return name


def put(store: ObjectStore, bucket: str, prefix: str, folder: Path) -> None:
    """Upload what is in `folder`."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(folder).as_posix()}".lstrip("/")
            store.client().put_object(Bucket=bucket, Key=key, Body=path.read_bytes())


@pytest.fixture
def bake(store: ObjectStore, bucket: str, tmp_path: Path) -> str:
    """The URL of a bake in S3, as `push` leaves one."""
    put(store, bucket, "bakes/one", sealed(tmp_path / "bake", files(), model="org/name"))
    return f"s3://{bucket}/bakes/one"


# --- what a name means --------------------------------------------------------------------------


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_prefix_with_a_model_is_that_model(
    store: ObjectStore, bucket: str, tiny_model: Path, slash: str
) -> None:
    """It keeps its name, and nothing is said against it."""
    put(store, bucket, "deep/tiny", tiny_model)
    name = f"s3://{bucket}/deep/tiny{slash}"
    assert stored.find(name) == Stored(f"s3://{bucket}/deep/tiny")
    assert baked.names({"MODEL_NAME": name}) == {"MODEL_NAME": f"s3://{bucket}/deep/tiny"}
    baked.check(name)


def test_a_bucket_can_be_a_model(store: ObjectStore, bucket: str, tiny_model: Path) -> None:
    """Without a prefix."""
    put(store, bucket, "", tiny_model)
    assert stored.find(f"s3://{bucket}") == Stored(f"s3://{bucket}")


def test_a_bake_is_the_model_in_it_by_the_name_that_it_was_baked_by(bake: str) -> None:
    """The same as of a bake in a folder; also if the model in it is named."""
    for name in (bake, f"{bake}/", f"{bake}/model"):
        assert baked.names({"MODEL_NAME": name}) == {
            "MODEL_NAME": f"{bake}/model",
            "SERVED_MODEL_NAME": "org/name",
        }
        baked.check(name)
    named = {"MODEL_NAME": bake, "SERVED_MODEL_NAME": "mine"}
    assert baked.names(named) == {"MODEL_NAME": f"{bake}/model"}


def test_a_bake_can_fill_a_bucket(store: ObjectStore, bucket: str, tmp_path: Path) -> None:
    """Without a prefix."""
    put(store, bucket, "", sealed(tmp_path, files(), model="org/name"))
    for name in (f"s3://{bucket}", f"s3://{bucket}/model"):
        found = stored.find(name)
        assert (found.url, found.manifest and found.manifest.model) == (
            f"s3://{bucket}/model",
            {"name": "org/name"},
        )


# --- what is wrong with it ----------------------------------------------------------------------


def refused(name: str, kind: type[StartError]) -> str:
    """What is told of `name`, which is an error of exactly that kind."""
    assert baked.names({"MODEL_NAME": name}) == {}  # it says nothing, the check does
    with pytest.raises(StartError) as error:
        baked.check(name)
    assert type(error.value) is kind, repr(error.value)
    return str(error.value)


def test_a_bucket_that_is_not_there_is_told(store: ObjectStore) -> None:
    """66, as for a folder that is none."""
    told = refused("s3://no-such-bucket-here/tiny", ModelNotFound)
    assert told.startswith("MODEL_NAME=s3://no-such-bucket-here/tiny: there is no such bucket (")


def test_a_prefix_with_nothing_below_it_is_told(bucket: str) -> None:
    """66 too; what begins alike is another folder."""
    told = refused(f"s3://{bucket}/tiny", ModelNotFound)
    assert told == f"MODEL_NAME=s3://{bucket}/tiny: the prefix has no object below it"


def test_a_prefix_without_a_model_is_told_with_what_it_has(store: ObjectStore, bucket: str) -> None:
    """A prefix too short is the usual slip."""
    for key in ("models/tiny/config.json", "models/tiny2/config.json", "models/README.md"):
        store.client().put_object(Bucket=bucket, Key=key, Body=b"{}")
    told = refused(f"s3://{bucket}/models", ModelNotFound)
    assert told == (
        f"MODEL_NAME=s3://{bucket}/models: the prefix has no config.json, so it holds no model; "
        "it has README.md, tiny/, tiny2/"
    )


def test_no_credentials_are_told(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """75: the machine lacks them."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    told = refused(f"s3://{bucket}/tiny", NoResources)
    assert told.startswith(f"MODEL_NAME=s3://{bucket}/tiny: no credentials were found; set AWS_ACCESS_KEY_ID")


def test_a_store_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch, store: ObjectStore) -> None:
    """69, as of the builder's commands: another try may find it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    told = refused("s3://bucket/tiny", StoreFailed)
    assert told == "MODEL_NAME=s3://bucket/tiny: the connection failed (EndpointConnectionError)"


def test_a_bake_that_lacks_what_was_baked_is_told(store: ObjectStore, bake: str, bucket: str) -> None:
    """65: no part of a model is served as a whole one."""
    client = store.client()
    client.delete_object(Bucket=bucket, Key="bakes/one/model/model.safetensors")
    client.put_object(Bucket=bucket, Key="bakes/one/model/config.json", Body=b"{ }")
    with pytest.raises(ManifestMismatch) as error:
        baked.check(f"{bake}/model")
    assert str(error.value).splitlines() == [
        f"{bake} is not what was baked (manifest.json):",
        "  - model/config.json: size: expected 2 bytes, found 3 bytes",
        "  - model/model.safetensors: missing: expected 1000 bytes, found no such object",
    ]


def test_a_manifest_that_is_none_is_told(store: ObjectStore, bake: str, bucket: str) -> None:
    """65, with where it is."""
    store.client().put_object(Bucket=bucket, Key=f"bakes/one/{NAME}", Body=b"[]")
    told = refused(bake, ManifestMismatch)
    assert told.startswith(f"{bake}/manifest.json is no manifest")


def test_caches_of_a_bake_are_said_to_be_passed_over(
    store: ObjectStore, bake: str, bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Who wonders why a start is slow finds it in the log."""
    held = Manifest.parse(
        store.client().get_object(Bucket=bucket, Key=f"bakes/one/{NAME}")["Body"].read(), NAME
    )
    warmed = Manifest(held.model, held.files, made_with={"vllm": "0"})
    store.client().put_object(Bucket=bucket, Key=f"bakes/one/{NAME}", Body=warmed.dump())
    with caplog.at_level("INFO", "handler.baked"):
        baked.check(bake)
    (record,) = caplog.records
    assert (record.message, record.__dict__["reason"]) == (
        "the caches of the bake are not used",
        "they are in S3; `python -m builder pull` gets them",
    )
