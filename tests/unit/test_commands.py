"""What commands show, and what they ask first."""

from __future__ import annotations

import io
from typing import Any, cast

import pytest

from gateway.commands.client import Client
from gateway.commands.conversation import Conversation
from gateway.commands.status import tables
from gateway.commands.tables import shown_on, table
from handler.errors import Unreachable


def test_a_table_obeys_nobody() -> None:
    """Names of models and reasons of failures are others' words."""
    rows = [("model", "number"), ("\x1b[2Jm\x07", 7), ("longer name", 10)]
    assert table(rows, right={"number"}) == "model        number\n�[2Jm�            7\nlonger name      10\n"


def test_an_endpoint_is_one_row_whatever_its_worker_has_said() -> None:
    """The reason is in it; the output is in `logs`."""
    counts = {"in_flight": 0, "waiting": 0, "capacity": 0, "min_workers": 0, "max_workers": 1}
    error = "The worker could not start: no such folder.\nIts output ends with:\nTraceback"
    endpoint = {"id": "chat", "model": "m", "workers": [], "error": error, **counts}
    status = {"version": "1", "started_at": 0, "endpoints": [endpoint]}
    *_, row = "".join(tables(status, {}, 0)).splitlines()
    assert row.endswith(" 0  The worker could not start: no such folder.")


def test_a_terminal_gets_text_plain_and_a_program_as_it_is() -> None:
    """Models and clients write it, and commands only repeat it."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    text = "a\tb\n\x1b]0;title\x07"
    assert shown_on(Terminal())(text) == "a\tb\n\ufffd]0;title\ufffd"
    assert shown_on(io.StringIO())(text) == text


async def test_a_key_without_a_model_is_told_so() -> None:
    """There is none to be the first."""

    class Empty:
        async def get(self, _: str) -> Any:
            return {"object": "list", "data": []}

    asking = Conversation("chat").ask(cast("Client", Empty()), "hi")
    with pytest.raises(Unreachable, match="endpoint chat has no model for this key"):
        await anext(asking)
