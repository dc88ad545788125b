"""Every Prometheus name of the gateway, in one place.

What happens is counted as it happens; what is (who waits, which workers there are) is read when somebody
asks, from the endpoints' own status. What the workers say of themselves stands beside it (`gateway.scrape`).
"""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from gateway.accounts.usage import Entry
from gateway.scrape import SCRAPE_TIMEOUT_S, Target, render, scrape
from gateway.upstreams import WORKER_STATES
from gateway.upstreams.events import Ended, Event, Ready, StartFailed
from handler import sse
from handler.messages import Reply
from handler.phases import own_s

__all__ = ["ADMISSIONS", "CONTENT_TYPE", "EndpointMetrics", "Metrics", "Row", "Statuses"]

PREFIX = "firsttoken_gateway_"

ADMISSIONS = ("at_once", "waited", "full", "late", "refused", "left")
"""How it ended for who wanted a worker: asked at once or after a wait; turned away because too many
waited, because its turn did not come in time, or because no worker can come; or left while it waited."""

LIVING = tuple(state for state in WORKER_STATES if state not in {"ended", "failed"})
"""The states of workers that are there; the status lists some that were."""

MODELS_MAX = 256
"""How many names of models there are labels for; what others use is counted as `other`'s."""
PHASES_MAX = 64
"""How many names of phases an endpoint counts by; what a worker names beyond them is `other`."""

_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_DURATION_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_HELD_S = (0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_START_S = (0.5, 1, 2.5, 5, 7.5, 10, 15, 20, 30, 60, 120, 300, 600)
_JOB_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


Statuses = Callable[[], Awaitable[Iterable[Mapping[str, Any]]]]
"""The endpoints' entries in `/admin/status`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One metric, as the page of the docs shows it."""

    name: str
    type: str
    labels: tuple[str, ...]
    help: str


STATE: tuple[Row, ...] = (
    Row(PREFIX + "queue_depth", "gauge", ("endpoint",), "Requests that wait for a worker."),
    Row(
        PREFIX + "outstanding",
        "gauge",
        ("endpoint",),
        "Requests that wait for a worker or have one, those of jobs and batches too: what to scale by.",
    ),
    Row(
        PREFIX + "capacity",
        "gauge",
        ("endpoint",),
        "Requests that the ready workers work on at once, in all.",
    ),
    Row(PREFIX + "workers", "gauge", ("endpoint", "state"), "Workers that live, by the state they are in."),
    Row(PREFIX + "jobs", "gauge", ("endpoint", "state"), "Jobs by their state."),
)
"""What is read from the endpoints' status."""


class Metrics:
    """The gateway's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._statuses: Statuses = _none
        self._targets: Callable[[], Iterable[Target]] = tuple
        self._endpoints: dict[str, EndpointMetrics] = {}
        self._models: set[tuple[str, str]] = set()
        self.rows: list[Row] = [*STATE]
        """All there are, for the docs."""
        self.requests = self._counter(
            "requests",
            "Requests by route and status; the status of a client that left before its answer is `left`.",
            "endpoint",
            "route",
            "status",
        )
        self.in_flight = self._gauge("in_flight", "Requests that are held now.", "endpoint")
        self.broken_replies = self._counter(
            "broken_replies", "Replies that failed after they had begun.", "endpoint"
        )
        self.duration_s = self._histogram(
            "request_duration_seconds", "From a request to the end of its answer.", _DURATION_S, "route"
        )
        self.first_token_s = self._histogram(
            "time_to_first_token_seconds", "From a request to the first frame of its stream.", _FIRST_S
        )
        self.between_tokens_s = self._histogram(
            "inter_token_latency_seconds",
            "From a part of a stream to the next, as they left for the client; a part has a token or more.",
            _BETWEEN_S,
        )
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Tokens of the prompts that were answered.", "endpoint", "model"
        )
        self.completion_tokens = self._counter(
            "completion_tokens", "Tokens that were made.", "endpoint", "model"
        )
        self.cost = self._counter(
            "cost", "What those tokens cost by the endpoint's prices, in their currency.", "endpoint", "model"
        )
        self.admissions = self._counter(
            "admissions",
            "How it ended for who wanted a worker: asked `at_once`, `waited`, turned away (`full`, "
            "`late`, `refused`: no worker can come), or `left` meanwhile.",
            "endpoint",
            "outcome",
        )
        self.held_s = self._histogram(
            "held_seconds",
            "How long requests waited for a worker, those that were served at once not counted.",
            _HELD_S,
        )
        self.worker_starts = self._counter(
            "worker_starts", "Started workers by outcome: `ready` or `failed`.", "endpoint", "outcome"
        )
        self.worker_ends = self._counter(
            "worker_ends",
            "Workers that were ready and ended: `told` to, or `crashed` and to be replaced.",
            "endpoint",
            "outcome",
        )
        self.cold_start_s = self._histogram(
            "cold_start_seconds", "From the start of a worker's process to its first token.", _START_S
        )
        self.phase_s = self._counter(
            "cold_start_phase_seconds",
            "Where cold starts spent their time; a phase less those inside it, so that all add up.",
            "endpoint",
            "phase",
        )
        self.scrapes = self._counter(
            "worker_scrapes",
            f"Workers asked for their metrics: `ok`, `late` (not within {SCRAPE_TIMEOUT_S:g} s) or `failed`. "
            "What is not ok is left out.",
            "endpoint",
            "outcome",
        )
        self.runpod_jobs_queued = self._gauge(
            "runpod_jobs_queued",
            "With `UPSTREAM=runpod`: requests that no worker has taken as a job yet.",
            "endpoint",
        )
        self.runpod_jobs_in_progress = self._gauge(
            "runpod_jobs_in_progress", "With `UPSTREAM=runpod`: jobs that workers hold.", "endpoint"
        )
        self.runpod_job_queued_s = self._histogram(
            "runpod_job_queued_seconds", "How long they waited until a worker took them.", _JOB_S
        )
        self.runpod_job_first_output_s = self._histogram(
            "runpod_job_first_output_seconds",
            "From a job's hand-out to the first output that its worker posted.",
            _JOB_S,
        )
        self.runpod_jobs = self._counter(
            "runpod_jobs",
            "What happened to them: `handed_out`, `given_back` (not received), `retried` (their worker went "
            "away before it answered), `stopped`, `expired`, and `dropped` (posts that came too late).",
            "endpoint",
            "what",
        )
        ProcessCollector(registry=self._registry)

    def watch(
        self,
        statuses: Statuses,
        targets: Callable[[], Iterable[Target]] = tuple,
    ) -> None:
        """Have `statuses` say how the endpoints are (`Endpoint.status`), and `targets` whom else to ask."""
        self._statuses, self._targets = statuses, targets

    def endpoint(self, endpoint_id: str) -> EndpointMetrics:
        """Those of one endpoint; `""` for what belongs to none."""
        if endpoint_id not in self._endpoints:
            self._endpoints[endpoint_id] = EndpointMetrics(self, endpoint_id)
        return self._endpoints[endpoint_id]

    def known(self, endpoint_id: str) -> EndpointMetrics:
        """Those of the endpoint if there ever was one of that id, else of none: clients make up ids."""
        return self._endpoints.get(endpoint_id) or self.endpoint("")

    def used(self, entry: Entry) -> None:
        """Count what an answer has used, as it is put on an account."""
        labels = (entry.endpoint_id, self._label(entry))
        self.prompt_tokens.labels(*labels).inc(entry.prompt_tokens)
        self.completion_tokens.labels(*labels).inc(entry.completion_tokens)
        self.cost.labels(*labels).inc(entry.cost_nano / 1e9)

    def _label(self, entry: Entry) -> str:
        """The model's name, or `other`: who runs an upstream, or many adapters, may make up any number."""
        named = (entry.endpoint_id, entry.model)
        if named not in self._models and len(self._models) < MODELS_MAX:
            self._models.add(named)
        return entry.model if named in self._models else "other"

    async def exposition(self) -> bytes:
        """Everything in Prometheus' text format, ready workers included.

        A worker that does not answer in time is left out. Requests are served meanwhile.
        """
        said = await scrape(self._targets())
        for one in said:
            self.scrapes.labels(one.target.endpoint, one.outcome).inc()
        state = _state(await self._statuses())
        return await render((*self._registry.collect(), *state), said)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        self.rows.append(Row(f"{PREFIX}{name}_total", "counter", labels, help))
        return Counter(PREFIX + name, help, labels, registry=self._registry)

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        self.rows.append(Row(PREFIX + name, "gauge", labels, help))
        return Gauge(PREFIX + name, help, labels, registry=self._registry)

    def _histogram(self, name: str, help: str, buckets: Sequence[float], *labels: str) -> Histogram:
        labels = ("endpoint", *labels)
        self.rows.append(Row(PREFIX + name, "histogram", labels, help))
        return Histogram(PREFIX + name, help, labels, buckets=buckets, registry=self._registry)


class EndpointMetrics:
    """What is counted of one endpoint."""

    def __init__(self, metrics: Metrics, endpoint_id: str) -> None:
        self._metrics = metrics
        self._phases: set[str] = set()
        self.endpoint_id = endpoint_id
        self.in_flight = metrics.in_flight.labels(endpoint_id)
        self.broken_replies = metrics.broken_replies.labels(endpoint_id)
        self.first_token_s = metrics.first_token_s.labels(endpoint_id)
        self.between_tokens_s = metrics.between_tokens_s.labels(endpoint_id)
        self.held_s = metrics.held_s.labels(endpoint_id)
        for counter, outcomes in (  # a rate wants to see the 0 before the first one
            (metrics.admissions, ADMISSIONS),
            (metrics.worker_starts, ("ready", "failed")),
            (metrics.worker_ends, ("told", "crashed")),
        ):
            for outcome in outcomes if endpoint_id else ():
                counter.labels(endpoint_id, outcome)
        self.runpod_jobs_queued = metrics.runpod_jobs_queued.labels(endpoint_id)
        self.runpod_jobs_in_progress = metrics.runpod_jobs_in_progress.labels(endpoint_id)
        self.runpod_job_queued_s = metrics.runpod_job_queued_s.labels(endpoint_id)
        self.runpod_job_first_output_s = metrics.runpod_job_first_output_s.labels(endpoint_id)

    def tell(self, event: Event) -> None:
        """Count what happened to a worker."""
        metrics = self._metrics
        if isinstance(event, StartFailed):
            metrics.worker_starts.labels(self.endpoint_id, "failed").inc()
        elif isinstance(event, Ended):
            outcome = "told" if event.expected else "crashed"
            metrics.worker_ends.labels(self.endpoint_id, outcome).inc()
        elif isinstance(event, Ready):
            metrics.worker_starts.labels(self.endpoint_id, "ready").inc()
            total_s = event.cold_start.get("total_s") or event.took_s
            metrics.cold_start_s.labels(self.endpoint_id).observe(total_s)
            for phase, spent_s in own_s(event.cold_start).items():
                metrics.phase_s.labels(self.endpoint_id, self._phase(phase)).inc(spent_s)

    def _phase(self, name: str) -> str:
        if len(self._phases) < PHASES_MAX:
            self._phases.add(name)
        return name if name in self._phases else "other"

    def admitted(self, outcome: str, waited_s: float = 0.0) -> None:
        """Count how it ended for who wanted a worker: one of `ADMISSIONS`."""
        self._metrics.admissions.labels(self.endpoint_id, outcome).inc()
        if outcome != "at_once":
            self.held_s.observe(waited_s)

    def count_runpod_jobs(self, what: str, number: int = 1) -> None:
        """Count what happened to jobs of RunPod's SDK."""
        self._metrics.runpod_jobs.labels(self.endpoint_id, what).inc(number)

    def timed(self, reply: Reply, arrived_s: float) -> Reply:
        """The stream `reply`, whose request came at `arrived_s`; when each part leaves is observed."""
        return replace(reply, frames=self._timed(reply.frames, arrived_s))

    async def _timed(self, chunks: AsyncIterator[bytes], arrived_s: float) -> AsyncIterator[bytes]:
        last_s = 0.0
        async for chunk in chunks:
            if chunk == sse.KEEP_ALIVE:
                yield chunk
                continue
            now_s = time.monotonic()
            if last_s:
                self.between_tokens_s.observe(now_s - last_s)
            else:
                self.first_token_s.observe(now_s - arrived_s)
            last_s = now_s
            yield chunk


def _state(statuses: Iterable[Mapping[str, Any]]) -> Iterable[Metric]:
    """How the endpoints are now."""
    waiting, outstanding, capacity, workers, jobs = families = [
        GaugeMetricFamily(row.name, row.help, labels=row.labels) for row in STATE
    ]
    for status in statuses:
        of = status["id"]
        waiting.add_metric([of], status.get("waiting", 0))
        outstanding.add_metric([of], status.get("waiting", 0) + status.get("in_flight", 0))
        capacity.add_metric([of], status.get("capacity", 0))
        states = Counts(worker["state"] for worker in status.get("workers", ()))
        for state in LIVING:
            workers.add_metric([of, state], states[state])
        for state, count in status.get("jobs", {}).items():
            jobs.add_metric([of, state], count)
    return families


async def _none() -> Sequence[Mapping[str, Any]]:
    return ()
