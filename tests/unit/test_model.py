"""`handler.model`: a model that can't be had ends the start in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from handler import model
from handler.errors import ModelNotFound

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


@pytest.mark.parametrize("name", ["s3://bucket/prefix/model", "gs://bucket/model", "az://container/model"])
def test_an_object_store_is_neither_a_folder_nor_a_hub(name: str, tmp_path: Path) -> None:
    """Who reads from it asks for it; Hugging Face may be out of reach."""
    environ = {**NOWHERE, "HF_HOME": str(tmp_path)}
    model.check(name, environ)
    assert "HF_HUB_OFFLINE" not in environ


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
