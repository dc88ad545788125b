"""Write the tables of docs/metrics.md anew: `python -m scripts.metrics_page`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry

from gateway.metrics import Metrics, Row
from handler import metrics as worker
from handler.phases import Phases

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"


def gateway_rows() -> list[Row]:
    """What the gateway counts."""
    return sorted(Metrics().rows, key=lambda row: row.name)


def worker_rows() -> list[Row]:
    """What a worker of ours says beside vLLM."""
    registry, phases = CollectorRegistry(), Phases(0.0, clock=lambda: 1.0)
    phases.until_now("any")
    worker.register(phases, running=lambda: 0, in_flight=lambda: 0, registry=registry)
    return sorted(
        (
            Row(family.name, family.type, tuple(family.samples[0].labels), f"{family.documentation}.")
            for family in registry.collect()
        ),
        key=lambda row: row.name,
    )


def fill(page: str) -> str:
    """`page` with each table made anew. A table lies between `<!-- name -->` and `<!-- end -->`."""
    tables = {"gateway": _table(gateway_rows()), "worker": _table(worker_rows())}
    return re.sub(
        r"(<!-- (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}\n{tables[match[2]]}\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


def _table(rows: Iterable[Row]) -> str:
    lines = ["| Name | Type | Labels | What it is |", "| --- | --- | --- | --- |"]
    for row in rows:
        labels = ", ".join(f"`{label}`" for label in row.labels)
        lines.append(f"| `{row.name}` | {row.type} | {labels} | {row.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
