"""deploy/gateway/Dockerfile fits the repository: what no builder is needed to see."""

from __future__ import annotations

import re
from typing import Any

from e2b_dockerfile_utils import PatternMatcher

from gateway.settings import GatewaySettings
from tests.unit.test_image import BAKE, PYPROJECT, ROOT, TRACKED, filled, sources, stages, unquoted

FILE = ROOT / "deploy" / "gateway" / "Dockerfile"
STAGES = {stage.name: stage for stage in stages(FILE)[1]}
IGNORED = PatternMatcher(
    [line for line in FILE.with_suffix(".dockerignore").read_text().splitlines() if line and line[0] != "#"]
)


def test_the_context_has_what_is_copied_and_nothing_else() -> None:
    """No history, no tests, no keys, no worker's files beyond the package that both share."""
    copied = tuple({source for stage in STAGES.values() for source in sources(stage)})
    assert {*copied} == {"pyproject.toml", "scripts/requirements.py", "handler", "gateway"}
    sent = {path for path in TRACKED if not IGNORED.matches(path)}
    assert sent == {path for path in TRACKED if path.startswith(copied)}


def test_it_is_what_the_gateway_needs_and_runs_as_nobody() -> None:
    """A signal reaches the process, and its settings are settings."""
    gateway = STAGES["gateway"]
    extras = re.findall(r"requirements\.py ([\w ]+) <", STAGES["requirements"].of("RUN")[0].original)
    assert extras == ["otel postgres"]
    assert {*extras[0].split()} <= PYPROJECT["optional-dependencies"].keys()
    (entry,), (user,) = gateway.of("ENTRYPOINT"), gateway.of("USER")
    assert (entry.json, entry.args) == (True, ["python", "-m", "gateway"])
    assert filled(user.args[0], {"RUN_AS": "10001"}) == "10001:10001"
    environ = {name: value for name, value in gateway.environ().items() if name != "PATH"}
    assert GatewaySettings.from_environ(environ).host == "0.0.0.0"


def test_the_bake_file_has_it() -> None:
    """With arguments that the Dockerfile declares."""
    target: dict[str, Any] = BAKE["target"]["gateway"]
    assert (ROOT / unquoted(target["dockerfile"]), unquoted(target["target"])) == (FILE, "gateway")
    declared = {word.partition("=")[0] for step in STAGES["gateway"].of("ARG") for word in step.args}
    assert target["args"].keys() == declared
