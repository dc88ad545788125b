"""`gateway.alone`: one gateway at a time for one SQLite file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.alone import StoreInUse, alone
from gateway.database import StoreUnusable


def test_a_second_one_is_told_who_has_it(tmp_path: Path) -> None:
    """And what to do; once the first is gone it has it."""
    url = f"sqlite:///{tmp_path}/data/gateway.db"
    with alone(url):
        assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
        with (
            pytest.raises(StoreInUse, match=f"process {os.getpid()}: end that one, or set DATA_DIR"),
            alone(url),
        ):
            pass
        with alone(f"sqlite:///{tmp_path}/other/gateway.db"):
            pass
    with alone(url):
        pass


def test_what_is_no_file_is_shared(tmp_path: Path) -> None:
    """Several gateways may have one PostgreSQL."""
    with alone("postgresql://host/name"), alone("postgresql://host/name"):
        pass


def test_a_folder_that_cant_be_made_is_said_in_words(tmp_path: Path) -> None:
    """No traceback."""
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnusable, match="can't be used"), alone(f"sqlite:///{tmp_path}/file/gateway.db"):
        pass
