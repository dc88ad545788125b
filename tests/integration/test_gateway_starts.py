"""A gateway that can't start says why in one line, ends with sysexits' code and leaves nothing behind."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests import servers


def ended(tmp_path: Path, *, file_max_bytes: int | None = None, **environ: str) -> tuple[int, str]:
    """The exit code of a gateway with its data in `tmp_path / "data"`, and what it said."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    limited = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (file_max_bytes or 0, -1))
    done = subprocess.run(
        [sys.executable, "-W", "default::ResourceWarning", "-m", "gateway"],
        cwd=servers.ROOT,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "TMPDIR": str(temporary),
            "PORT": "0",
            "MODEL_NAME": "m",
            "API_KEY": "k",
            "START": "first_request",
            "DATA_DIR": str(tmp_path / "data"),
            "LOG_LEVEL": "ERROR",
            **environ,
        },
        stdin=subprocess.DEVNULL,
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=None if file_max_bytes is None else limited,
    )
    assert not list(temporary.iterdir())
    return done.returncode, done.stderr


def a_file(path: Path) -> None:
    """Where a folder should be."""
    path.parent.mkdir(exist_ok=True)
    path.touch()


@pytest.mark.parametrize("upstream", ["local", "http", "runpod"])
@pytest.mark.parametrize(
    ("name", "made", "says"),
    [
        ("data/files", a_file, "{path} can't be used for files: File exists"),
        ("data/files/x", partial(Path.mkdir, parents=True), "{path} can't be used for files: Is a directory"),
    ],
)
def test_a_place_that_cant_be_used(
    tmp_path: Path, upstream: str, name: str, made: Callable[[Path], None], says: str
) -> None:
    """Sockets and folders that were made by then are gone, whatever kind of workers they are for."""
    path = tmp_path / name
    made(path)
    found = ended(tmp_path, UPSTREAM=upstream, UPSTREAM_URL="http://127.0.0.1:9/v1")
    assert found == (74, f"firsttoken: {says.format(path=path)}\n")


@pytest.mark.parametrize("file_max_bytes", [0, 16384, 65536])
def test_a_full_disk(tmp_path: Path, file_max_bytes: int) -> None:
    """At the first byte, or later."""
    status, said = ended(tmp_path, file_max_bytes=file_max_bytes)
    assert (status, said.count("\n")) == (74, 1)
    assert said.startswith("firsttoken: ")


def test_a_folder_of_a_database_is_not_made(tmp_path: Path) -> None:
    """A slip in its path is told, and leaves nothing behind."""
    status, said = ended(tmp_path, DATABASE_URL=f"sqlite:///{tmp_path}/nope/x.db")
    assert (status, f"DATABASE_URL, the folder {tmp_path}/nope: No such file" in said) == (78, True)
    assert not (tmp_path / "nope").exists()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_data_folder_that_is_a_file(tmp_path: Path, elsewhere: bool) -> None:
    """The setting is named, wherever the database is."""
    a_file(tmp_path / "data")
    url = f"sqlite:///{tmp_path}/gateway.db" if elsewhere else ""
    status, said = ended(tmp_path, DATABASE_URL=url)
    assert (status, f"DATA_DIR={tmp_path}/data: File exists; it has to be a folder" in said) == (78, True)
