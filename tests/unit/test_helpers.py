"""tests/README.md says where a test finds what it needs."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_helper_is_in_the_table_and_no_other() -> None:
    """By the name of its module."""
    helpers = {path.stem for path in TESTS.glob("*.py")}
    table = "".join(line for line in (TESTS / "README.md").read_text().splitlines(True) if line[0] == "|")
    assert set(re.findall(r"`(\w+)`", table)) == helpers
