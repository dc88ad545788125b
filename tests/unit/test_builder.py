"""`python -m builder`: what a command says where files and folders are not what they should be."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest

from builder import store
from builder.__main__ import run

MODEL = "tests/tinychat/model"


def said(*words: str | Path) -> tuple[int, str]:
    """The exit status of a command, and the last line of what it says."""
    stream = io.StringIO()
    status = run([*map(str, words)], {}, stream)
    return status, stream.getvalue().splitlines()[-1]


@pytest.mark.parametrize("out", ["file", "file/deep"])
def test_a_file_where_a_folder_should_be(tmp_path: Path, out: str) -> None:
    """A sentence that names it."""
    (tmp_path / "file").write_text("mine")
    place = tmp_path / out / ".model.partial"
    assert said("bake", MODEL, "--out", tmp_path / out, "--no-warm") == (
        74,
        f"bake: {place}: Not a directory",
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_a_model_is_not_put_in_the_place_of_a_file(tmp_path: Path) -> None:
    """Before anything is fetched."""
    (tmp_path / "file").write_text("mine")
    assert said("fetch", MODEL, "--out", tmp_path / "file") == (
        64,
        f"fetch: {tmp_path}/file is no folder; name another place",
    )
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208 - hidden ones too


@pytest.mark.parametrize(("number", "status"), [(errno.EACCES, 74), (errno.EROFS, 74), (errno.ENOSPC, 75)])
def test_what_the_system_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    """Whatever it is, it is said and not thrown; a full disk has the code of one."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr(store, "keep", refuse)
    out = said("fetch", MODEL, "--out", tmp_path / "out")
    assert out == (status, f"fetch: /some/file: {os.strerror(number)}")
