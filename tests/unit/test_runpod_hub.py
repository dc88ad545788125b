"""The files for RunPod's Hub say what the settings are, and their jobs are jobs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from handler import edge, jobs
from handler.errors import BadSettings
from handler.flags import ALIASES
from handler.settings import DEFAULT_MODEL, TABLE, Settings
from handler.unread import UNREAD
from scripts.runpod_hub import (
    FIRST,
    FLAGS,
    HUB,
    JOBS,
    NOT_SHOWN,
    SHOWN,
    TESTS,
    as_environ,
    dump,
    flags_of_file,
    hub,
    smoke,
)

ANEW = "run python -m scripts.runpod_hub"
FORM: dict[str, dict[str, Any]] = {
    row["key"]: row["input"] for row in json.loads(HUB.read_text())["config"]["env"]
}
SMOKE = json.loads(TESTS.read_text())
ROWS = [row for row in TABLE if row.name in SHOWN]


def test_the_form_is_what_the_settings_make() -> None:
    """hub.json is up to date, vLLM's part aside: that is compared where vLLM is installed."""
    assert HUB.read_text() == dump(hub(flags_of_file())), ANEW


def test_the_jobs_are_what_the_generator_makes() -> None:
    """tests.json is up to date."""
    assert TESTS.read_text() == dump(smoke()), ANEW


def test_every_setting_is_in_the_form_or_left_out_on_purpose() -> None:
    """A new setting has to be put into one of the two lists."""
    assert {row.name for row in TABLE} == SHOWN.keys() | NOT_SHOWN
    assert not SHOWN.keys() & NOT_SHOWN


def test_the_form_has_settings_and_flags_once_each() -> None:
    """What is asked first comes first, nothing comes twice, and nothing is there that does nothing."""
    assert tuple(FORM)[: len(FIRST)] == FIRST
    assert sorted(FORM) == sorted([*SHOWN, *(flag.name for flag in FLAGS)])
    assert len(json.loads(HUB.read_text())["config"]["env"]) == len(FORM)
    assert not FORM.keys() & (UNREAD.keys() | ALIASES.keys())


def test_the_form_as_it_comes_is_no_fault() -> None:
    """Whoever changes nothing gets the default settings."""
    given = {name: as_environ(asked["default"]) for name, asked in FORM.items() if "default" in asked}
    assert Settings.from_environ(given) == Settings.from_environ({})
    assert Settings.from_environ(given).notes == ()


@pytest.mark.parametrize("name", [row.name for row in ROWS if "options" in FORM[row.name]])
def test_every_option_of_a_setting_is_allowed(name: str) -> None:
    """What can be chosen is what the setting takes, the empty choice included."""
    row = next(row for row in ROWS if row.name == name)
    values = [option["value"] for option in FORM[name]["options"]]
    assert [value for value in values if value] == list(row.kind.names)
    assert ("" in values) == (row.default is None)
    for value in values:
        read = getattr(Settings.from_environ({name: value}), row.field)
        assert read == (row.kind.parse(value) if value else None)


@pytest.mark.parametrize("name", [row.name for row in ROWS if FORM[row.name]["type"] == "number"])
def test_the_bounds_of_a_number_are_its_settings(name: str) -> None:
    """The ends are allowed, and what lies past them is not."""
    low, high = FORM[name]["min"], FORM[name]["max"]
    Settings.from_environ({name: str(low)})
    Settings.from_environ({name: str(high)})
    for past in (low - 1, high + 1):
        with pytest.raises(BadSettings):
            Settings.from_environ({name: str(past)})


@pytest.mark.parametrize("name", [row.name for row in TABLE if row.secret])
def test_a_secret_has_no_default(name: str) -> None:
    """The form of a secret is empty, and says where to keep it."""
    assert name in NOT_SHOWN or (
        "default" not in FORM[name] and "RUNPOD_SECRET_" in FORM[name]["description"]
    )


def test_presets_set_what_the_form_has() -> None:
    """A preset names a model, and chooses among the options that there are."""
    presets = json.loads(HUB.read_text())["config"]["presets"]
    assert len({preset["name"] for preset in presets}) == len(presets)
    for preset in presets:
        assert "MODEL_NAME" in preset["defaults"]
        assert preset["defaults"].keys() <= FORM.keys()
        Settings.from_environ(preset["defaults"])
        for name, value in preset["defaults"].items():
            options = FORM[name].get("options")
            assert options is None or value in [option["value"] for option in options]


@pytest.mark.parametrize("case", SMOKE["tests"], ids=lambda case: case["name"])
def test_every_job_is_one_that_a_worker_takes(case: dict[str, Any]) -> None:
    """It parses, its route may be called, and its body names no model but the one that is served."""
    request = jobs.parse(case["input"])
    edge.allowed(request.method, request.path)
    assert (request.method == "GET") == (request.body == b"")
    if request.body:
        assert json.loads(request.body).get("model", DEFAULT_MODEL) == DEFAULT_MODEL
    assert {"key": "MODEL_NAME", "value": DEFAULT_MODEL} in SMOKE["config"]["env"]


def test_there_is_a_job_of_every_shape() -> None:
    """Each shape that `handler.jobs` knows is tried, and a stream."""
    keys = [set(job) for job in JOBS.values()]
    for shape in ({"openai_route", "openai_input"}, {"route", "body", "method"}, {"openai_route"}):
        assert shape in keys
    for shorthand in ("prompt", "messages"):
        assert {shorthand, "sampling_params"} in keys
    assert [name for name, job in JOBS.items() if jobs.asks_for_stream(jobs.parse(job))] == [
        "openai_chat_stream"
    ]
