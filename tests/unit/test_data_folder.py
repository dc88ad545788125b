"""Whose the data folder may be."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path

import pytest

from gateway import data_folder
from handler.errors import BadSettings

ME, OTHER = 1000, 1001
USERS = [
    pwd.struct_passwd((name, "x", uid, gid, "", "/", "/bin/sh"))
    for name, uid, gid in (("root", 0, 0), ("me", ME, 1000), ("other", OTHER, 1001), ("third", 1002, 100))
]
GROUPS = [
    grp.struct_group((name, "x", gid, members))
    for name, gid, members in (("me", 1000, []), ("mine", 50, ["me", "root"]), ("staff", 60, ["me", "other"]))
]


def fault(mode: int, uid: int = ME, gid: int = 1000) -> str | None:
    """What is said of a folder with these attributes, to the user 1000."""
    found = os.stat_result((stat.S_IFDIR | mode, 0, 0, 0, uid, gid, 0, 0, 0, 0))
    return data_folder.fault(found, {ME, 0}, users=lambda: USERS, groups=lambda: GROUPS)


@pytest.mark.parametrize(
    ("mode", "uid", "gid"),
    [
        (0o700, ME, 1000),
        (0o755, ME, 60),
        (0o755, 0, 0),
        (0o770, ME, 1000),
        (0o775, ME, 50),
        (0o2775, 0, 10001),
        (0o2770, ME, 10001),
        (0o770, 0, 0),
    ],
    ids=[
        "own",
        "read",
        "root's",
        "own group",
        "group of nobody else",
        "fsGroup",
        "in an fsGroup",
        "root group",
    ],
)
def test_a_folder_that_nobody_else_may_write_is_taken(mode: int, uid: int, gid: int) -> None:
    """Also one that a group may write in which nobody else is: Kubernetes' volumes are such."""
    assert fault(mode, uid, gid) is None


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "said"),
    [
        (0o777, ME, 1000, "may be written by everybody (mode 0777)"),
        (0o1777, 0, 0, "may be written by everybody (mode 1777)"),
        (0o770, ME, 60, "may be written by others of the group 60, such as other (mode 0770)"),
        (0o775, ME, 100, "may be written by others of the group 100, such as third (mode 0775)"),
        (0o700, OTHER, 1000, "belongs to the user 1001"),
    ],
)
def test_a_folder_that_others_may_write_is_not(mode: int, uid: int, gid: int, said: str) -> None:
    """Nor another user's. It is said whose and why."""
    assert fault(mode, uid, gid) == said


def test_a_folder_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    """Without a word, and found again so."""
    folder = tmp_path / "new" / "data"
    assert (data_folder.make(folder), data_folder.make(folder)) == (None, None)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_of_everybody_is_a_fault_of_the_setting(tmp_path: Path) -> None:
    """Whoever is to serve it or to ask there hears the variable, its value and what is allowed."""
    tmp_path.chmod(0o777)
    why = "may be written by everybody (mode 0777)"
    told = f"DATA_DIR={tmp_path} {why}; it has to be a folder that this user alone may write, mode 0700"
    for serves in (True, False):
        with pytest.raises(BadSettings) as refused:
            data_folder.check(tmp_path, serves=serves)
        assert refused.value.faults == (told,)
    with pytest.raises(BadSettings):
        data_folder.make(tmp_path)


def test_what_everybody_may_read_is_taken_with_a_word(tmp_path: Path) -> None:
    """It may hold what a person has put there."""
    tmp_path.chmod(0o755)
    note = data_folder.make(tmp_path)
    assert note is not None
    assert note.startswith(f"DATA_DIR={tmp_path} may be read by everybody (mode 0755)")


def test_a_folder_that_is_not_there_is_no_fault(tmp_path: Path) -> None:
    """It will be made."""
    data_folder.check(tmp_path / "none", serves=False)


def test_a_sqlite_file_elsewhere_is_kept_as_the_data_folder_is(tmp_path: Path) -> None:
    """Its folder has to be there, and nobody else may write it."""
    wanted = "it has to be a folder that this user alone may write, mode 0700"
    place = tmp_path / "place"
    url = f"sqlite:///{place}/x.db?timeout=5"
    with pytest.raises(BadSettings) as refused:
        data_folder.check_database(url, tmp_path, serves=True)
    assert refused.value.faults == (f"DATABASE_URL, the folder {place}: No such file or directory; {wanted}",)
    place.mkdir(mode=0o700)
    data_folder.check_database(url, tmp_path, serves=True)
    place.chmod(0o777)
    with pytest.raises(BadSettings) as refused:
        data_folder.check_database(url, tmp_path, serves=False)
    why = "may be written by everybody (mode 0777)"
    assert refused.value.faults == (f"DATABASE_URL, the folder {place} {why}; {wanted}",)


def test_other_databases_are_not_looked_for(tmp_path: Path) -> None:
    """DATA_DIR is checked by itself, and may have to be made; a server keeps its files itself."""
    for url in (f"sqlite:///{tmp_path}/none/gateway.db", "postgresql://host/name"):
        data_folder.check_database(url, tmp_path / "none", serves=True)
