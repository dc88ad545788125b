"""`handler.explain`: a cold start as a picture."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

import pytest

from handler.errors import UsageError
from handler.explain import find, held_by, svg, waterfall

REPORT = {
    "total_s": 10.0,
    "facts": {"engine mode": "thread"},
    "phases": [
        {"name": "import", "begin_s": 0.0, "end_s": 5.0, "cpu_s": 4.9, "major_faults": 0},
        {"name": "weights", "begin_s": 5.0, "end_s": 9.0, "cpu_s": 0.5, "major_faults": 900},
        {"name": "a<b", "begin_s": 9.0, "end_s": 10.0, "cpu_s": 0.1, "major_faults": 0},
    ],
}


def test_the_last_start_in_a_log_is_found() -> None:
    """A log holds one line a start, between lines of other kinds."""
    older = dict(REPORT, total_s=99.0)
    log = [
        "ready",
        f"t INFO handler: cold start {json.dumps(older)}",
        "{not json",
        f"x cold start {json.dumps(REPORT)}",
    ]
    assert find(log) == REPORT


def test_the_json_alone_is_found() -> None:
    """What `jq` cut out of a log is as good as the log."""
    assert find([json.dumps(REPORT)]) == REPORT


def test_a_log_without_a_start_is_a_usage_error() -> None:
    """The message says what a start looks like."""
    with pytest.raises(UsageError, match="cold start"):
        find(["nothing", "{}"])


def test_what_held_a_phase_up() -> None:
    """CPU seconds near the wall time: the CPU; page faults: the disk; else it waited for something."""
    assert [held_by(phase) for phase in REPORT["phases"]] == ["cpu", "disk", "waiting"]  # type: ignore[attr-defined]


def test_the_waterfall_puts_each_phase_where_it_was() -> None:
    """Bars share one axis, and no line is longer than the terminal."""
    lines = waterfall(REPORT, width=80).splitlines()
    assert lines[1] == "import     5.00    4.90       0  cpu     " + "█" * 20
    assert lines[2] == "weights    4.00    0.50     900  disk    " + " " * 20 + "█" * 16
    assert lines[4:] == ["first token after 10.00 s", "engine mode: thread"]
    assert max(map(len, lines)) <= 80


def test_the_picture_is_well_formed() -> None:
    """Names are escaped, and there is one bar for each phase."""
    root = ET.fromstring(svg(REPORT))
    titles = [title.text for title in root.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == [
        "import: 5.00 s wall, 4.90 s CPU, 0 major faults",
        "weights: 4.00 s wall, 0.50 s CPU, 900 major faults",
        "a<b: 1.00 s wall, 0.10 s CPU, 0 major faults",
    ]
