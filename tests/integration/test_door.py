"""The owner's door: who is behind it, and where it is."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from gateway import door
from gateway.accounts.keys import OWNER_ID
from handler.errors import NoResources
from handler.messages import Request


def test_whoever_is_at_the_door_is_an_admin() -> None:
    """What it uses is not counted as the key's that `API_KEY` gives, which need not be there."""
    key = door.Owner().check(Request("GET", "/admin/status"))
    assert (key.id, key.name) == (OWNER_ID, "this machine")
    assert (key.admin, key.may_use("any"), key.may_ask("any")) == (True, True, True)


def test_only_its_owner_opens_it_and_it_goes_with_the_gateway(tmp_path: Path) -> None:
    """However long the folder's path is: a socket's address holds about a hundred bytes."""
    folder = tmp_path / ("deep" * 20) / ("er" * 40)
    folder.mkdir(parents=True)
    with door.listen(folder), door.reachable(folder) as path, socket.socket(socket.AF_UNIX) as client:
        assert stat.S_IMODE((folder / door.NAME).stat().st_mode) == 0o600
        client.connect(str(path))
    assert not (folder / door.NAME).exists()


def test_a_door_that_somebody_holds_is_not_taken(tmp_path: Path) -> None:
    """One that a killed gateway left is."""
    with (
        door.listen(tmp_path),
        pytest.raises(NoResources, match="is another gateway's"),
        door.listen(tmp_path),
    ):
        raise AssertionError
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / door.NAME))
    with door.listen(tmp_path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / door.NAME))
