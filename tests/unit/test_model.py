"""`handler.model`: a model that can't be had ends the start in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from handler import model
from handler.errors import BadSettings, ModelNotFound
from handler.settings import Settings

NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9"}
"""A hub that refuses the connection: nothing listens on the discard port."""


def test_a_folder_with_a_model_passes(tmp_path: Path) -> None:
    """No hub is asked for it."""
    (tmp_path / "config.json").write_text("{}")
    environ: dict[str, str] = {}
    model.check(str(tmp_path), environ)
    assert environ == {}


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    """The message says what it lacks."""
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        model.check(str(tmp_path), {})


@pytest.mark.parametrize("name", ["/nowhere/model", "./model-that-is-not", "a/b/c"])
def test_a_path_that_is_no_folder_is_no_hub_id(name: str) -> None:
    """Nobody waits for a hub because of a slip in a path."""
    with pytest.raises(ModelNotFound, match="no such folder"):
        model.check(name, {})


@pytest.mark.parametrize("name", ["gs://bucket/model", "az://container/model"])
def test_an_object_store_is_neither_a_folder_nor_a_hub(name: str, tmp_path: Path) -> None:
    """Who reads from it asks for it; Hugging Face may be out of reach."""
    environ = {**NOWHERE, "HF_HOME": str(tmp_path)}
    model.check(name, environ)
    assert "HF_HUB_OFFLINE" not in environ


def test_an_endpoint_that_only_a_part_of_the_start_would_use_is_refused() -> None:
    """boto3 knows it, and the weights would be looked for at AWS."""
    with pytest.raises(BadSettings, match="set AWS_ENDPOINT_URL"):
        model.check("s3://bucket/model", {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"})
    both = {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    model.check("s3://bucket/model", both)
    model.check("gs://bucket/model", {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"})


def test_a_hub_out_of_reach_and_no_copy_end_the_start(tmp_path: Path) -> None:
    """In seconds, and before vLLM is imported."""
    with pytest.raises(ModelNotFound, match="can't be reached and its cache has no such model"):
        model.check("organisation/model", {**NOWHERE, "HF_HOME": str(tmp_path)})


def test_a_hub_out_of_reach_is_not_asked_again_for_what_is_cached(tmp_path: Path) -> None:
    """The client of the hub would try for half a minute."""
    (tmp_path / "hub" / "models--organisation--model").mkdir(parents=True)
    environ = {**NOWHERE, "HF_HOME": str(tmp_path)}
    model.check("organisation/model", environ)
    assert environ["HF_HUB_OFFLINE"] == "1"


def test_a_proxy_is_left_to_reach_the_hub() -> None:
    """Behind one, the hub's own name may not even resolve."""
    environ = {**NOWHERE, "HTTPS_PROXY": "http://127.0.0.1:9"}
    model.check("organisation/model", environ)
    assert "HF_HUB_OFFLINE" not in environ


# --- What was fetched ---------------------------------------------------------------------------


def in_our_cache(home: Path, name: str = "Qwen/Qwen3-8B") -> tuple[Path, dict[str, str]]:
    """A folder that `builder fetch` has left, and the environment of its user, without a hub."""
    folder = home / ".cache" / "firsttoken" / "models" / "Qwen--Qwen3-8B"
    folder.mkdir(parents=True)
    (folder / "fetched.json").write_text(json.dumps({"model": name, "revision": None}))
    return folder, {**NOWHERE, "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}


def test_a_model_that_was_fetched_needs_no_hub(tmp_path: Path) -> None:
    """As `make serve` fetches it; clients know the model by its name."""
    folder, environ = in_our_cache(tmp_path)
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        found = model.fetched(settings(), {**environ, **more})
        assert (found.model_name, found.model_id) == (str(folder), "Qwen/Qwen3-8B")
    assert model.fetched(settings(SERVED_MODEL_NAME="qwen"), environ).model_id == "qwen"


def test_the_hub_and_its_cache_come_first(tmp_path: Path) -> None:
    """They have the revision that is meant, and maybe a newer one."""
    _, environ = in_our_cache(tmp_path)
    assert model.fetched(settings(MODEL_REVISION="a"), environ) == settings(MODEL_REVISION="a")
    assert model.fetched(settings(), {**environ, "HTTPS_PROXY": "http://127.0.0.1:9"}) == settings()
    (tmp_path / ".cache" / "huggingface" / "hub" / "models--Qwen--Qwen3-8B").mkdir(parents=True)
    assert model.fetched(settings(), environ) == settings()


def test_a_folder_of_another_model_is_not_taken(tmp_path: Path) -> None:
    """Nor one that nothing was noted in."""
    folder, environ = in_our_cache(tmp_path, "Qwen/Other")
    assert model.fetched(settings(), environ) == settings()
    (folder / "fetched.json").unlink()
    assert model.fetched(settings(), environ) == settings()


# --- RunPod's cached models ---------------------------------------------------------------------


def cached(cache: Path, folder: str, *revisions: str, main: str | None = None) -> None:
    """A repository in Hugging Face's cache."""
    for revision in revisions:
        snapshot = cache / folder / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
    if main is not None:
        (cache / folder / "refs").mkdir()
        (cache / folder / "refs" / "main").write_text(main + "\n")


def settings(**more: str) -> Settings:
    """Settings of a worker for Qwen/Qwen3-8B."""
    return Settings.from_environ({"MODEL_NAME": "Qwen/Qwen3-8B", **more})


@pytest.mark.parametrize("folder", ["models--Qwen--Qwen3-8B", "models--qwen--qwen3-8b"])
def test_a_cached_model_is_taken_from_its_folder(folder: str, tmp_path: Path) -> None:
    """Whatever case the folder has; clients know the model by its name."""
    cached(tmp_path, folder, "abc")
    found = model.at_hand(settings(), tmp_path)
    assert found.model_name == str(tmp_path / folder / "snapshots" / "abc")
    assert found.model_id == "Qwen/Qwen3-8B"


def test_a_cached_model_keeps_the_name_that_it_was_given(tmp_path: Path) -> None:
    """By whoever deployed it."""
    cached(tmp_path, "models--Qwen--Qwen3-8B", "abc")
    assert model.at_hand(settings(SERVED_MODEL_NAME="qwen"), tmp_path).model_id == "qwen"


@pytest.mark.parametrize(("given", "expected"), [({}, "bbb"), ({"MODEL_REVISION": "aaa"}, "aaa")])
def test_the_revision_says_which_snapshot(given: dict[str, str], expected: str, tmp_path: Path) -> None:
    """Without one it is the main branch."""
    cached(tmp_path, "models--Qwen--Qwen3-8B", "aaa", "bbb", main="bbb")
    found = model.at_hand(settings(**given), tmp_path)
    assert Path(found.model_name).name == expected
    assert found.model_revision is None


def test_what_is_not_cached_whole_is_left_to_be_fetched(tmp_path: Path) -> None:
    """No folder, another model, a snapshot without a model, two and none is the main branch."""
    assert model.at_hand(settings(), tmp_path / "nowhere") == settings()
    cached(tmp_path, "models--Qwen--Qwen3-32B", "abc")
    (tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "abc").mkdir(parents=True)
    assert model.at_hand(settings(), tmp_path) == settings()
    cached(tmp_path, "models--qwen--qwen3-8b", "aaa", "bbb")
    assert model.at_hand(settings(), tmp_path) == settings()
    assert model.at_hand(settings(MODEL_REVISION="ccc"), tmp_path) == settings(MODEL_REVISION="ccc")


@pytest.mark.parametrize("name", ["/models/qwen", "s3://bucket/qwen"])
def test_a_place_is_not_looked_up(name: str, tmp_path: Path) -> None:
    """It says itself where the model is."""
    given = Settings.from_environ({"MODEL_NAME": name})
    assert model.at_hand(given, tmp_path) == given
