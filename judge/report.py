"""The pytest plugin that writes down what came out, for the judge to read.

Given to pytest with `-p judge.report --judge-report FILE`; each line of the file is a
JSON object about one test: that it was selected or left out, or the outcome of a phase.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

WHY_MAX_CHARS = 300


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of this plugin."""
    parser.addoption(
        "--judge-report", type=Path, required=True, help="a file that gets one JSON object per line"
    )


def write(config: pytest.Config, **fields: object) -> None:
    """Append one line to the report."""
    path: Path = config.getoption("--judge-report")
    with path.open("a") as file:
        file.write(json.dumps(fields) + "\n")


def select(
    config: pytest.Config, items: list[pytest.Item], left_out: Callable[[pytest.Item], str | None]
) -> None:
    """Keep in `items` what `left_out` gives no reason against, and write both down."""
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        reason = left_out(item)
        (kept if reason is None else left).append(item)
        write(config, nodeid=item.nodeid, left_out=reason)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write down how one phase of a test ended."""
    result = yield
    why = "" if call.excinfo is None else f"{call.excinfo.typename}: {call.excinfo.value}".partition("\n")[0]
    write(
        item.config,
        nodeid=item.nodeid,
        when=result.when,
        outcome=result.outcome,
        why=why[:WHY_MAX_CHARS],
    )
    return result
