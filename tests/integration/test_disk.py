"""A disk that is too small: a real file system of 2 MB, seen before anything is downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from builder import disk
from handler.errors import NoResources
from handler.settings import DEFAULT_MODEL
from tests import servers
from tests.bake_folder import files, noise, sealed, write
from tests.gguf_file import HIDDEN, f32, gguf_bytes, metadata, weights
from tests.hub import Hub, serving
from tests.place import Place

SIZE_BYTES = 2 << 20
MODEL = {"config.json": b"{}", "model.safetensors": noise(3_000_000)}
MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && exec "$@"'

Run = Callable[..., str]


@pytest.fixture
def on_small_disk(tmp_path: Path) -> Run:
    """Runs a command of the builder's where `tmp_path / "disk"` is that small; returns what it says."""
    (tmp_path / "disk").mkdir()
    small = ["unshare", "--mount", "sh", "-c", MOUNT, "sh", str(SIZE_BYTES), str(tmp_path / "disk")]
    tried = subprocess.run([*small, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr.strip()}")

    def run(*words: str | Path, **environ: str) -> str:
        done = subprocess.run(
            [*small, sys.executable, "-m", "builder", *map(str, words)],
            cwd=servers.ROOT,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **environ},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 75, done.stderr
        return done.stderr

    return run


def test_folder_that_does_not_fit_is_not_copied(on_small_disk: Run, tmp_path: Path) -> None:
    """The disk is asked first."""
    write(tmp_path / "model", MODEL)
    said = on_small_disk("fetch", tmp_path / "model", "--out", tmp_path / "disk/out")
    assert said == f"fetch: {tmp_path}/disk has 2 MB free and the model needs 3 MB\n"


def test_gguf_file_that_does_not_fit_is_not_converted(on_small_disk: Run, tmp_path: Path) -> None:
    """It is what comes out of it that counts."""
    wide = {"output.weight": f32(np.zeros((40_000, HIDDEN), np.float32))}
    (tmp_path / "small.gguf").write_bytes(gguf_bytes(metadata(), weights() | wide))
    said = on_small_disk("fetch", tmp_path / "small.gguf", "--out", tmp_path / "disk/out")
    assert said.splitlines()[1:] == [f"fetch: {tmp_path}/disk has 2 MB free and the model needs 3 MB"]


def test_repository_that_does_not_fit_is_not_downloaded(on_small_disk: Run, tmp_path: Path) -> None:
    """No file of it is asked for."""
    with serving(Hub({"org/large": MODEL})) as hub:
        said = on_small_disk("fetch", "org/large", "--out", tmp_path / "disk/out", HF_ENDPOINT=hub.url)
    assert said == f"fetch: {tmp_path}/disk has 2 MB free and the model needs 3 MB\n"
    assert hub.ranges == []


def test_wheel_that_does_not_fit_is_not_downloaded(on_small_disk: Run, tmp_path: Path) -> None:
    """It and what is made of it have to be there together."""
    said = on_small_disk("fetch", DEFAULT_MODEL, "--out", tmp_path / "disk/out", HF_HUB_OFFLINE="1")
    assert said.splitlines()[1:] == [f"fetch: {tmp_path}/disk has 2 MB free and the model needs 366 MB"]


def test_bucket_that_does_not_fit_is_not_downloaded(on_small_disk: Run, tmp_path: Path, place: Place) -> None:
    """Neither a model nor a bake."""
    for name, body in MODEL.items():
        place.put(name, body)
    said = on_small_disk("fetch", place.url, "--out", tmp_path / "disk/out", **place.store.environ)
    assert said == f"fetch: {tmp_path}/disk has 2 MB free and the model needs 3 MB\n"
    bake = f"s3://{place.bucket}/bake"
    place.done("push", sealed(tmp_path / "bake", files(3_000_000)), bake)
    said = on_small_disk("pull", bake, tmp_path / "disk/out", **place.store.environ)
    assert said == f"pull: {tmp_path}/disk/out has 2 MB free and the model needs 3 MB\n"
    assert [line for line in place.answered("GET") if "safetensors" in line] == []


def test_disk_that_fills_up_is_named(tmp_path: Path) -> None:
    """Another program may be faster than the check."""
    with pytest.raises(NoResources) as caught, disk.filled(tmp_path / "out"):
        Path("/dev/full").write_bytes(b"x")
    assert str(caught.value) == f"the disk is full that has {tmp_path}"
