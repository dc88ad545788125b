"""docs/metrics.md says what the gateway and a worker tell Prometheus."""

from __future__ import annotations

from gateway.metrics import Metrics
from scripts.metrics_page import PAGE, fill, gateway_rows


def test_page_is_what_the_metrics_are() -> None:
    """The page is up to date; `python -m scripts.metrics_page` makes it so."""
    page = PAGE.read_text()
    assert fill(page) == page


async def test_every_metric_has_a_row() -> None:
    """What is in the exposition, and not the process's own, is in the table."""
    text = (await Metrics().exposition()).decode()
    told = [line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE firsttoken_")]
    assert sorted(told) == sorted([row.name, row.type] for row in gateway_rows())
