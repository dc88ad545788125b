"""`handler.caches`: what a start will miss, and what that costs."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from handler.caches import missing, vllm_root


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed vLLM, as far as its first file; returns where that one's .pyc belongs."""
    source = tmp_path / "site" / "vllm" / "__init__.py"
    source.parent.mkdir(parents=True)
    source.touch()
    spec = ModuleSpec("vllm", None, origin=str(source))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "vllm" else None)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    return Path(importlib.util.cache_from_source(str(source)))


def names(environ: dict[str, str], files: Path, *, inspects: bool = True, compiles: bool = True) -> list[str]:
    """What is missing, by name."""
    return [cache.name for cache in missing(environ, inspects=inspects, compiles=compiles, files=files)]


def test_an_empty_machine_lacks_all(vllm: Path, tmp_path: Path) -> None:
    """Each with its place and what this start pays for it."""
    environ = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    found = list(missing(environ, inspects=True, compiles=True, files=tmp_path / "list.txt"))
    assert [cache.name for cache in found] == [
        "compiled modules (.pyc)",
        "model information",
        "compiled model",
        "list of files to read ahead",
    ]
    assert str(found[0]).startswith(f"no compiled modules (.pyc) in {vllm.parent}: ")
    assert str(found[1]).startswith(f"no model information in {tmp_path}/cache/modelinfos: ")


def test_what_is_there_is_not_missing(vllm: Path, tmp_path: Path) -> None:
    """A machine that has served the model before says nothing."""
    vllm.parent.mkdir()
    vllm.touch()
    (tmp_path / "list.txt").touch()
    (tmp_path / "cache" / "modelinfos").mkdir(parents=True)
    environ = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    assert names(environ, tmp_path / "list.txt") == ["model information", "compiled model"]
    (tmp_path / "cache" / "modelinfos" / "llama.json").touch()
    (tmp_path / "cache" / "torch_compile_cache").mkdir()
    assert names(environ, tmp_path / "list.txt") == []


@pytest.mark.usefixtures("vllm")
def test_what_is_not_used_is_not_missing(tmp_path: Path) -> None:
    """An eager model on a CPU needs neither model information nor a compiled model."""
    found = names({}, tmp_path / "list.txt", inspects=False, compiles=False)
    assert "model information" not in found
    assert "compiled model" not in found


def test_the_folder_is_vllms() -> None:
    """As vLLM finds it."""
    assert vllm_root({"VLLM_CACHE_ROOT": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert vllm_root({"XDG_CACHE_HOME": "/b"}) == Path("/b/vllm")
    assert vllm_root({}) == Path("~/.cache/vllm").expanduser()
