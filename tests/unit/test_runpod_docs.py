"""docs/runpod.md names what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

from handler import jobs
from handler.edge import ROUTES
from handler.errors import NoSuchModel
from handler.flags import ALIASES
from handler.settings import TABLE
from handler.unread import COMMON, WORKER_VLLM
from scripts.runpod_hub import FLAGS

PAGE = (Path(__file__).parent.parent.parent / "docs" / "runpod.md").read_text()

OURS = {name for row in TABLE for name in row.names} | {flag.name for flag in FLAGS}
THEIRS = {*WORKER_VLLM, *ALIASES, "MODEL"}
OF_OTHERS = {"HF_HOME", "RUNPOD_INIT_TIMEOUT", "RUNPOD_REALTIME_PORT", "RUNPOD_SECRET_name"}
WORDS = {"GET", "POST", "DEBUG", "INFO", "WARN", "UPPER_SNAKE"}


def names(text: str) -> set[str]:
    """The environment variables that `text` has as code."""
    code = " ".join(re.findall(r"`([^`]+)`", text))
    return (
        set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Za-z0-9]+)*\b", code))
        - {"ENDPOINT_ID", "DONE", "HTTP"}
        - WORDS
    )


def migration() -> list[tuple[str, str]]:
    """The rows of the table for users of worker-vllm: theirs, and ours."""
    table = PAGE.partition("<!-- migration -->")[2].strip().splitlines()[2:]
    return [(row.split(" | ")[0], row.split(" | ")[1]) for row in table if row.startswith("|")]


def test_every_variable_on_the_page_exists() -> None:
    """As a setting, as a flag that the Hub's form has, as worker-vllm's, or as another program's."""
    text = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    assert names(text) - OURS - THEIRS - OF_OTHERS == set()
    assert set(re.findall(r"^([A-Z_]+)=", PAGE, re.MULTILINE)) == {"AUTH"}


def test_what_does_nothing_here_is_advised_to_nobody() -> None:
    """The right side of the migration table names nothing that is merely accepted."""
    rows = migration()
    assert len(rows) > 20
    for _, ours in rows:
        assert not names(ours) & (WORKER_VLLM.keys() | COMMON.keys() | ALIASES.keys()) - {"MODEL"}


def test_the_error_on_the_page_is_one_that_a_job_holds() -> None:
    """Field for field, as `handler.jobs` tells an unknown model."""
    (shown,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (output,) = jobs.render_error(jobs.error_of(NoSuchModel("x")), streamed=False)
    assert json.loads(shown) == output


def test_the_number_of_routes_is_right() -> None:
    """Those of the list, and `/v1/models/{id}`."""
    assert f"The {len(ROUTES) + 1} routes" in PAGE
