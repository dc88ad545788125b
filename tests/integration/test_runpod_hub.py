"""The form for RunPod's Hub against the parser of the vLLM that is installed."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest

from handler.flags import REFUSED, SETTINGS
from handler.preparation import read_flags
from handler.seam import make_parser
from handler.settings import Settings
from scripts.runpod_hub import FLAGS, HUB, as_environ

ROOT = Path(__file__).parent.parent.parent
pytest.importorskip(
    "vllm.entrypoints.launchers.cli_args", reason="needs an engine: make test installs it"
)  # here and not in a test: torch warns while it is imported
configs = pytest.importorskip("vllm.config")

CONTENT = json.loads(HUB.read_text())["config"]
FORM: dict[str, dict[str, Any]] = {row["key"]: row["input"] for row in CONTENT["env"]}
OF_VLLM = {flag.name: FORM[flag.name] for flag in FLAGS}


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    """vLLM's parser."""
    return make_parser()


def parsed(parser: ArgumentParser, environ: dict[str, str]) -> Namespace:
    """What a worker makes of `environ`."""
    return read_flags(parser, Settings.from_environ(environ))


def test_the_form_is_what_vllm_makes() -> None:
    """Types, choices, defaults and descriptions are those of the installed vLLM."""
    program = (
        "from scripts.runpod_hub import dump, flags_of_vllm, hub; print(dump(hub(flags_of_vllm())), end='')"
    )
    made = subprocess.run(  # in a process that has not imported vLLM: its flags say what they mean only then
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert HUB.read_text() == made.stdout, "run python -m scripts.runpod_hub"


def test_every_flag_of_the_form_is_one_that_a_worker_takes(parser: ArgumentParser) -> None:
    """vLLM has it, and it is neither a setting of ours nor refused."""
    dests = {
        name: parser._option_string_actions[f"--{name.lower().replace('_', '-')}"].dest for name in OF_VLLM
    }
    assert dests == {name: name.lower() for name in OF_VLLM}
    assert not set(dests.values()) & {*SETTINGS, *REFUSED}


def test_the_form_as_it_comes_is_vllms_default(parser: ArgumentParser) -> None:
    """Whoever changes nothing sets nothing."""
    given = {name: as_environ(asked["default"]) for name, asked in FORM.items() if "default" in asked}
    ours, plain = vars(parsed(parser, given)), vars(parsed(parser, {}))
    if "ENFORCE_EAGER" in given:  # of a CPU, where the worker has another default (read_flags)
        plain["enforce_eager"] = False
    assert {name: value for name, value in ours.items() if value != plain[name]} == {}


@pytest.mark.parametrize("name", [name for name, asked in OF_VLLM.items() if "options" in asked])
def test_every_option_of_a_flag_is_allowed(parser: ArgumentParser, name: str) -> None:
    """vLLM takes each choice, and the empty one is no flag at all."""
    plain = vars(parsed(parser, {}))[name.lower()]
    needed = {"TOOL_CALL_PARSER": "hermes"} if name == "ENABLE_AUTO_TOOL_CHOICE" else {}
    for option in OF_VLLM[name]["options"]:
        read = vars(parsed(parser, {**needed, name: option["value"]}))[name.lower()]
        if option["value"]:
            assert as_environ(read) == option["value"]
        elif not needed:
            assert read == plain


@pytest.mark.parametrize(
    "name", [name for name, asked in OF_VLLM.items() if "As JSON" in asked["description"]]
)
def test_every_example_of_json_is_taken(parser: ArgumentParser, name: str) -> None:
    """What the form gives as an example is a value."""
    example = re.fullmatch(r".*As JSON, such as (.+)\.", OF_VLLM[name]["description"])
    assert example is not None
    read = vars(parsed(parser, {name: example[1]}))[name.lower()]
    assert read != vars(parsed(parser, {}))[name.lower()]


@pytest.mark.parametrize("name", [name for name, asked in OF_VLLM.items() if "min" in asked])
def test_the_bounds_of_a_flag_are_vllms(name: str) -> None:
    """vLLM's configuration refuses what lies below the form's minimum, and takes the minimum."""
    low = OF_VLLM[name]["min"]
    limits: dict[str, Any] = {}
    for config in vars(configs).values():
        if isinstance(config, type) and dataclasses.is_dataclass(config):
            found = getattr(config, "__pydantic_fields__", {}).get(name.lower())
            for limit in getattr(found, "metadata", ()):
                limits |= {side: getattr(limit, side) for side in ("gt", "ge", "le") if hasattr(limit, side)}
    assert limits, f"vLLM has no bounds for {name}"
    assert limits.get("ge", low) == low
    assert limits.get("gt", float("-inf")) < low
    assert OF_VLLM[name]["max"] <= limits.get("le", float("inf"))


@pytest.mark.parametrize("preset", CONTENT["presets"], ids=lambda preset: preset["defaults"]["MODEL_NAME"])
def test_every_preset_is_taken(parser: ArgumentParser, preset: dict[str, Any]) -> None:
    """vLLM has the parsers that a preset names, and tool calls are on where it names one."""
    args = parsed(parser, preset["defaults"])
    assert args.model == preset["defaults"]["MODEL_NAME"]
    assert args.enable_auto_tool_choice == ("TOOL_CALL_PARSER" in preset["defaults"])
