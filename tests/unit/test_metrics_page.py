"""docs/metrics.md says what the gateway and a worker tell Prometheus."""

from __future__ import annotations

from gateway.accounts.usage import Entry
from gateway.metrics import MODELS_MAX, Metrics
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


async def test_there_are_labels_for_so_many_models_only() -> None:
    """An upstream that makes up names does not make a time series of each."""
    metrics = Metrics()
    for number in range(MODELS_MAX + 10):
        metrics.used(Entry("key", "chat", f"m{number}", 1, 2, 0))
    metrics.used(Entry("key", "chat", "m0", 1, 2, 0))
    text = (await metrics.exposition()).decode()
    series = [
        line for line in text.splitlines() if line.startswith("firsttoken_gateway_prompt_tokens_total{")
    ]
    assert len(series) == MODELS_MAX + 1
    counted = dict(line.split() for line in series)
    assert counted['firsttoken_gateway_prompt_tokens_total{endpoint="chat",model="m0"}'] == "2.0"
    assert counted['firsttoken_gateway_prompt_tokens_total{endpoint="chat",model="other"}'] == "10.0"
