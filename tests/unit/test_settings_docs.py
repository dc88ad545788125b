"""docs/settings.md says what the tables say."""

from __future__ import annotations

import re

import pytest

from gateway.settings import TABLE as GATEWAY
from handler.errors import BadSettings
from handler.settings import TABLE as WORKER
from handler.settings import Settings
from scripts.settings_page import PAGE, fill


def test_page_is_what_the_tables_render() -> None:
    """The page is up to date; `python -m scripts.settings_page` makes it so."""
    page = PAGE.read_text()
    assert fill(page) == page


def test_every_setting_is_on_the_page() -> None:
    """No table is left out of the page."""
    shown = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE))
    assert {row.name for row in (*WORKER, *GATEWAY)} <= shown


def test_faults_on_the_page_are_what_a_start_says() -> None:
    """The example shows real faults."""
    shown = re.findall(r"^  - (.+)$", PAGE.read_text(), re.MULTILINE)
    with pytest.raises(BadSettings) as caught:
        Settings.from_environ({"MAX_CONCURRENCY": "lots", "SERVED_MODEL_NAM": "mine"})
    assert list(caught.value.faults) == shown[:2]
