"""One scrape of a real gateway with a real engine: it parses, and has all that the dashboard asks for."""

from __future__ import annotations

import httpx
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests import dashboards, servers

SUFFIXES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_count", "_sum"),
    "summary": ("", "_count", "_sum"),
}


def scrape(stack: servers.Stack) -> list[Metric]:
    """The families of the gateway's `/metrics`, after a stream."""
    with stack.gateway.sync_client() as client:
        stream = client.chat.completions.create(
            model=servers.MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=3, stream=True
        )
        assert list(stream)
    root = stack.gateway.base_url.partition("/v2/")[0]
    headers = {"authorization": f"Bearer {servers.KEY}"}
    while True:
        answer = httpx.get(f"{root}/metrics", headers=headers, timeout=60)
        assert answer.status_code == 200
        families = list(text_string_to_metric_families(answer.text))
        if any(family.name.startswith("vllm:") for family in families):  # a worker that is late is left out
            return families


def test_a_scrape_has_the_gateway_and_its_worker(stack: servers.Stack) -> None:
    """vLLM's series say whose they are; no family and no series is there twice; the tokens are counted."""
    families = scrape(stack)
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    series = [
        (sample.name, *sorted(sample.labels.items())) for family in families for sample in family.samples
    ]
    assert len(series) == len(set(series))
    by_name = {family.name: family for family in families}
    engine = by_name["vllm:num_requests_running"].samples
    endpoints = [sample.labels["endpoint"] for sample in engine]
    assert endpoints.count("local") == 1
    assert set(endpoints) <= {"local", "other"}  # whose worker may still be there
    assert all(sample.labels["worker"] for sample in engine)
    assert sum(sample.value for sample in by_name["firsttoken_gateway_completion_tokens"].samples) >= 3
    (ok,) = [
        sample.value
        for sample in by_name["firsttoken_gateway_worker_scrapes"].samples
        if sample.labels["outcome"] == "ok"
    ]
    assert ok >= 1


def test_the_dashboard_asks_for_what_is_there(stack: servers.Stack) -> None:
    """Every name in it and in the alerts, with this vLLM; a scrape has no `up`, Prometheus adds it."""
    there = {
        family.name + suffix for family in scrape(stack) for suffix in SUFFIXES.get(family.type, ("",))
    } | {"up"}
    asked = {name for expression in dashboards.expressions() for name, _ in dashboards.selectors(expression)}
    assert asked - there == set()
