"""What the dashboard and the alerts of deploy/ ask Prometheus for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"
DASHBOARD = DEPLOY / "grafana/firsttoken.json"
RULES = DEPLOY / "prometheus/rules.yml"


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels that show something."""
    found = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def expressions() -> list[str]:
    """Every expression, with what Grafana puts in for its own variables."""
    shown = [target["expr"] for panel in panels() for target in panel["targets"]]
    rules = [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    return [expression.replace("$__rate_interval", "5m") for expression in (*shown, *rules)]


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """The metric of each selector in `expression`, and the labels that it looks at. Raises `ValueError`."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(expression), pre_visit=visit)
    return ((str(node.name), {matcher.name for matcher in node.matchers.matchers}) for node in found)
