"""`handler.levers`: each lever has a name, and the name leads to code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from handler.levers import LEVERS, pulled
from handler.settings import Settings

HANDLER = Path(__file__).parents[2] / "handler"


@pytest.mark.parametrize(
    ("off", "on"), [("", True), ("gc", False), ("kvplan", True), ("kvplan, gc", False), ("gcc", True)]
)
def test_a_lever_is_pulled_unless_it_is_named(off: str, on: bool) -> None:
    """Spaces around a name are no part of it."""
    assert pulled("gc", {"LEVERS_OFF": off}) is on


def test_every_lever_is_asked_for_somewhere_and_no_other() -> None:
    """So that a name in the table is one that does something."""
    asked = {
        node.args[0].value
        for path in HANDLER.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in {"pulled", "levers.pulled"}
        and isinstance(node.args[0], ast.Constant)
    }
    assert asked == LEVERS.keys()


def test_the_setting_knows_every_lever() -> None:
    """And says which there are to who gives another."""
    given = ",".join(LEVERS)
    assert Settings.from_environ({"LEVERS_OFF": given}).levers_off == tuple(LEVERS)
