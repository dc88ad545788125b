"""A model in S3: what `MODEL_NAME=s3://bucket/prefix` means, on moto's server in S3's place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from handler import baked, stored
from handler.errors import ManifestMismatch, ModelNotFound, NoResources, StartError, StoreFailed
from handler.manifest import NAME, Manifest
from handler.stored import Stored
from tests.bake_folder import files, read, sealed
from tests.place import Place


def put(place: Place, prefix: str, held: Mapping[str, bytes]) -> None:
    """Write objects below any prefix of the bucket."""
    for name, body in held.items():
        place.s3.put_object(Bucket=place.bucket, Key=f"{prefix}{name}", Body=body)


@pytest.fixture
def bake(place: Place, tmp_path: Path) -> str:
    """The URL of a bake that was pushed."""
    place.done("push", sealed(tmp_path / "bake", files()), place.url)
    return place.url


# --- what a name means --------------------------------------------------------------------------


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_prefix_with_a_model_is_that_model(place: Place, tiny_model: Path, slash: str) -> None:
    """It keeps its name, and nothing is said against it."""
    put(place, "deep/tiny/", read(tiny_model))
    name = f"s3://{place.bucket}/deep/tiny"
    assert stored.find(name + slash) == Stored(name)
    assert baked.names({"MODEL_NAME": name + slash}) == {"MODEL_NAME": name}
    baked.check(name + slash, {})


def test_a_bucket_can_be_a_model(place: Place, tiny_model: Path) -> None:
    """Without a prefix."""
    put(place, "", read(tiny_model))
    assert stored.find(f"s3://{place.bucket}") == Stored(f"s3://{place.bucket}")


def test_a_bake_is_the_model_in_it_by_the_name_that_it_was_baked_by(bake: str) -> None:
    """The same as of a bake in a folder; also if the model in it is named."""
    for name in (bake, f"{bake}/", f"{bake}/model"):
        assert baked.names({"MODEL_NAME": name}) == {
            "MODEL_NAME": f"{bake}/model",
            "SERVED_MODEL_NAME": "org/name",
        }
        baked.check(name, {})
    named = {"MODEL_NAME": bake, "SERVED_MODEL_NAME": "mine"}
    assert baked.names(named) == {"MODEL_NAME": f"{bake}/model"}


def test_a_bake_can_fill_a_bucket(place: Place, tmp_path: Path) -> None:
    """Without a prefix."""
    put(place, "", read(sealed(tmp_path, files())))
    url = f"s3://{place.bucket}"
    for name in (url, f"{url}/model"):
        found = stored.find(name)
        assert (found.url, found.manifest and found.manifest.model) == (f"{url}/model", {"name": "org/name"})


# --- what is wrong with it ----------------------------------------------------------------------


def refused(name: str, kind: type[StartError]) -> str:
    """What is told of `name`, which is an error of exactly that kind."""
    assert baked.names({"MODEL_NAME": name}) == {}  # it says nothing, the check does
    with pytest.raises(StartError) as error:
        baked.check(name, {})
    assert type(error.value) is kind, repr(error.value)
    return str(error.value)


def test_a_bucket_that_is_not_there_is_told(place: Place) -> None:
    """66, as for a folder that is none."""
    told = refused("s3://no-such-bucket-here/tiny", ModelNotFound)
    assert told.startswith("MODEL_NAME=s3://no-such-bucket-here/tiny: there is no such bucket (")


def test_a_prefix_with_nothing_below_it_is_told(place: Place) -> None:
    """66 too; what begins alike is another folder."""
    put(place, "tiny2/", {"config.json": b"{}"})
    told = refused(f"s3://{place.bucket}/tiny", ModelNotFound)
    assert told == f"MODEL_NAME=s3://{place.bucket}/tiny: the prefix has no object below it"


def test_a_prefix_without_a_model_is_told_with_what_it_has(place: Place) -> None:
    """A prefix too short is the usual slip."""
    put(place, "models/", dict.fromkeys(("tiny/config.json", "tiny2/config.json", "README.md"), b"{}"))
    told = refused(f"s3://{place.bucket}/models", ModelNotFound)
    assert told == (
        f"MODEL_NAME=s3://{place.bucket}/models: the prefix has no config.json, so it holds no model; "
        "it has README.md, tiny/, tiny2/"
    )


def test_no_credentials_are_told(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """75: the machine lacks them."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    told = refused(place.url, NoResources)
    assert told.startswith(f"MODEL_NAME={place.url}: no credentials were found; set AWS_ACCESS_KEY_ID")


def test_a_store_that_does_not_answer_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """69, as of the builder's commands: another try may find it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    told = refused("s3://bucket/tiny", StoreFailed)
    assert told == "MODEL_NAME=s3://bucket/tiny: the connection failed (EndpointConnectionError)"


def test_a_bake_that_lacks_what_was_baked_is_told(place: Place, bake: str) -> None:
    """65: no part of a model is served as a whole one."""
    place.s3.delete_object(Bucket=place.bucket, Key="deep/prefix/model/model.safetensors")
    place.put("model/config.json", b"{ }")
    with pytest.raises(ManifestMismatch) as error:
        baked.check(f"{bake}/model", {})
    assert str(error.value).splitlines() == [
        f"{bake} is not what was baked (manifest.json):",
        "  - model/config.json: size: expected 2 bytes, found 3 bytes",
        "  - model/model.safetensors: missing: expected 1000 bytes, found no such object",
    ]


def test_a_manifest_that_is_none_is_told(place: Place, bake: str) -> None:
    """65, with where it is."""
    place.put(NAME, b"[]")
    told = refused(bake, ManifestMismatch)
    assert told.startswith(f"{bake}/manifest.json is no manifest")


def test_caches_of_a_bake_are_said_to_be_passed_over(
    place: Place, bake: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Who wonders why a start is slow finds it in the log."""
    held = Manifest.parse(place.objects()[NAME], NAME)
    place.put(NAME, Manifest(held.model, held.files, made_with={"vllm": "0"}).dump())
    with caplog.at_level("INFO", "handler.baked"):
        baked.check(bake, {})
    (record,) = caplog.records
    assert (record.message, record.__dict__["reason"]) == (
        "the caches of the bake are not used",
        "they are in S3; `python -m builder pull` gets them",
    )
