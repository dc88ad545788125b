"""`handler.kept`: what one start writes for the next is read by nobody's grace but our own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from handler import kept

DATA = b"what a start has found out"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that was written."""
    found = kept.folder({"XDG_CACHE_HOME": str(tmp_path)}, "kind") / "name.marshal"
    kept.write(found, DATA)
    return found


def test_what_was_written_is_read(file: Path) -> None:
    """By this user alone."""
    assert kept.read(file) == DATA
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


def test_it_is_replaced_whole(file: Path) -> None:
    """And no draft stays."""
    kept.write(file, b"other")
    assert kept.read(file) == b"other"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_not_read(file: Path, mode: int) -> None:
    """They could have us run what they wrote."""
    file.chmod(mode)
    assert kept.read(file) is None


@pytest.fixture
def link(file: Path) -> Path:
    """A link to what was written."""
    moved = file.with_name("moved")
    file.rename(moved)
    file.symlink_to(moved)
    return file


def test_a_link_of_ours_is_followed(link: Path) -> None:
    """To what nobody else can write."""
    assert kept.read(link) == DATA
    link.readlink().chmod(0o666)
    assert kept.read(link) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_link_of_another_user_is_not_followed(link: Path) -> None:
    """Whoever can make one need not be able to write where it leads."""
    os.chown(link, 65534, 65534, follow_symlinks=False)
    assert kept.read(link) is None


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"?", lambda _: b""])
def test_a_damaged_file_is_not_read(file: Path, damage: object) -> None:
    """Marshal would take it for something else, or end the process."""
    assert callable(damage)
    file.write_bytes(damage(file.read_bytes()))
    assert kept.read(file) is None


def test_where_nothing_can_be_written_nothing_happens(tmp_path: Path) -> None:
    """A file system that can't be written to is no reason not to start."""
    (tmp_path / "file").touch()
    kept.write(tmp_path / "file" / "kind" / "name", DATA)
    assert kept.read(tmp_path / "file" / "kind" / "name") is None
