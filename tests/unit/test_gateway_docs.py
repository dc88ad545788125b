"""docs/gateway.md says what the parser of endpoints.toml knows, and its examples are good ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gateway.endpoints.file import describe
from handler.errors import BadSettings
from scripts.gateway_page import PAGE, fill


def block(language: str) -> str:
    """The first block of that language on the page."""
    found = re.search(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def test_page_is_what_the_parser_knows() -> None:
    """The page is up to date; `python -m scripts.gateway_page` makes it so."""
    page = PAGE.read_text()
    assert fill(page) == page


def test_the_example_is_a_good_file(tmp_path: Path) -> None:
    """Two endpoints, whose settings are read as they look."""
    file = tmp_path / "endpoints.toml"
    file.write_text(block("toml"))
    _, described = describe({"ENDPOINTS_FILE": str(file), "HF_TOKEN": "hf_x"})
    chat, code = described.endpoints
    assert (chat.settings.max_workers, chat.environ["MAX_MODEL_LEN"]) == (2, "4096")
    assert (chat.environ["HF_TOKEN"], chat.environ["ENABLE_PREFIX_CACHING"]) == ("hf_x", "true")
    assert (code.settings.model_id, code.settings.queue_limit) == ("code-7b", 32)
    assert described.notes == ()


def test_faults_on_the_page_are_what_a_start_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example shows real faults."""
    monkeypatch.chdir(tmp_path)
    Path("endpoints.toml").write_text(
        block("toml")
        .replace("max_workers", "queue_limits")
        .replace("MAX_MODEL_LEN", "MAX_CONCURENCY")
        .replace("first_request", "later")
    )
    with pytest.raises(BadSettings) as caught:
        describe({"ENDPOINTS_FILE": "endpoints.toml", "HF_TOKEN": "hf_x"})
    shown = re.findall(r"^  - (endpoints\.toml: .+)$", PAGE.read_text(), re.MULTILINE)
    assert list(caught.value.faults) == shown
