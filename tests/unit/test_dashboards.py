"""The dashboard and the alerts of deploy/: they can be read, and ask for what is there."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from scripts.metrics_page import gateway_rows
from tests.dashboards import DASHBOARD, RULES, expressions, panels, selectors


def test_grafana_knows_all_that_the_dashboard_says() -> None:
    """Through Grafana's own models and back, nothing is lost: no field is misspelt or in the wrong place."""
    register_default_plugins()
    raw = json.loads(DASHBOARD.read_text())
    assert within(raw, json.loads(JSONEncoder().encode(Dashboard.from_json(raw)))) == []


def within(one: Any, other: Any, at: str = "") -> list[str]:
    """Where `one` has something that `other` has not."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            place
            for name, value in one.items()
            for place in (
                within(value, other[name], f"{at}/{name}") if name in other else [f"{at}/{name} is lost"]
            )
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            place
            for i, pair in enumerate(zip(one, other, strict=True))
            for place in within(*pair, f"{at}/{i}")
        ]
    return [] if one == other else [f"{at}: {one!r} is {other!r}"]


def test_panels_have_a_place_of_their_own() -> None:
    """None covers another or sticks out, and each is asked of the source that the user chooses."""
    every = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    cells = [
        {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        for at in (panel["gridPos"] for panel in every)
    ]
    assert not [pair for pair in combinations(cells, 2) if pair[0] & pair[1]]
    assert all(x < 24 for cell in cells for x, _ in cell)
    for panel in panels():
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


@pytest.mark.parametrize("expression", expressions())
def test_what_is_asked_of_the_gateway_is_there(expression: str) -> None:
    """Every metric of ours by its name and with its labels; PromQL's own parser reads the rest."""
    known = {row.name: row for row in gateway_rows()}
    for name, labels in selectors(expression):
        if not name.startswith("firsttoken_gateway_"):
            continue
        base = name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum")
        row = known[base if base in known and known[base].type == "histogram" else name]
        assert labels <= {*row.labels, *(("le",) if row.type == "histogram" else ())}


def test_alerts_say_whom_they_are_about() -> None:
    """Each has a severity and a sentence."""
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 0
    for rule in rules:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert "$labels" in rule["annotations"]["summary"]
