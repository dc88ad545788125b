"""The pytest plugin that runs inside openai-python's tests: which tests, and with which key."""

from __future__ import annotations

from fnmatch import fnmatchcase
from importlib import import_module

import pytest

from judge import report

CLIENT_ONLY = "checks the client alone, so it says the same on both sides"
NOT_SERVED = "a route of OpenAI's storage, which vLLM has not"
LEFT_OUT = {
    "*::test_path_params_*": CLIENT_ONLY,
    "*/test_models.py::*_delete*": NOT_SERVED,
    "*/chat/test_completions.py::*_retrieve*": NOT_SERVED,
    "*/chat/test_completions.py::*_update*": NOT_SERVED,
    "*/chat/test_completions.py::*_list*": NOT_SERVED,
    "*/chat/test_completions.py::*_delete*": NOT_SERVED,
    "*/test_responses.py::*_retrieve*": NOT_SERVED,
    "*/test_responses.py::*_delete*": NOT_SERVED,
    "*/test_responses.py::*_cancel*": NOT_SERVED,
    "*/test_responses.py::*_compact*": NOT_SERVED,
}


def left_out(nodeid: str) -> str | None:
    """Why the test is not run, or None."""
    return next((reason for pattern, reason in LEFT_OUT.items() if fnmatchcase(nodeid, pattern)), None)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this plugin."""
    parser.addoption("--judge-key", required=True, help="the key that the client of the tests sends")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Give the tests' client a key that our server takes; theirs has spaces in it."""
    # openai-python's `tests`, not ours: they lie in the folder that pytest runs in.
    vars(import_module("tests.conftest"))["api_key"] = session.config.getoption("--judge-key")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that are selected."""
    report.select(config, items, lambda item: left_out(item.nodeid))
