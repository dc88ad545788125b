"""Every Prometheus name of the gateway, in one place."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_JOB_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_HELD_BUCKETS_S = (0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)


class Metrics:
    """The gateway's counters, in a registry of their own."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.requests = Counter(
            "firsttoken_gateway_requests",
            "Requests by route and status; the status of a client that left before its answer is `left`.",
            ("route", "status"),
            registry=registry,
        )
        self.in_flight = Gauge(
            "firsttoken_gateway_in_flight", "Requests that are held now.", registry=registry
        )
        self.broken_replies = Counter(
            "firsttoken_gateway_broken_replies",
            "Replies that failed after they had begun.",
            registry=registry,
        )
        self.queue_depth = Gauge(
            "firsttoken_gateway_queue_depth", "Requests that wait for a worker.", registry=registry
        )
        self.held_s = Histogram(
            "firsttoken_gateway_held_seconds",
            "How long requests waited for a worker, those that were served at once not counted.",
            buckets=_HELD_BUCKETS_S,
            registry=registry,
        )
        self.worker_starts = Counter(
            "firsttoken_gateway_worker_starts", "Started workers by outcome.", ("outcome",), registry=registry
        )
        self.worker_cold_start_s = Gauge(
            "firsttoken_gateway_worker_cold_start_seconds", "How long the last start took.", registry=registry
        )
        self.workers = Gauge(
            "firsttoken_gateway_workers", "Living workers by state.", ("state",), registry=registry
        )

        self.jobs_queued = Gauge(
            "firsttoken_gateway_jobs_queued", "Jobs that no worker has taken yet.", registry=registry
        )
        self.jobs_in_progress = Gauge(
            "firsttoken_gateway_jobs_in_progress", "Jobs that workers hold.", registry=registry
        )
        self.job_queued_s = Histogram(
            "firsttoken_gateway_job_queued_seconds",
            "How long jobs waited until a worker took them.",
            buckets=_JOB_BUCKETS_S,
            registry=registry,
        )
        self.job_first_output_s = Histogram(
            "firsttoken_gateway_job_first_output_seconds",
            "From a job's hand-out to the first output that its worker posted.",
            buckets=_JOB_BUCKETS_S,
            registry=registry,
        )
        self.jobs = Counter(
            "firsttoken_gateway_jobs",
            "What happened to jobs: `handed_out`, `given_back` (not received), `retried` (their worker went "
            "away before it answered), `stopped`, `expired`, and `dropped` (posts that came too late).",
            ("what",),
            registry=registry,
        )

    def admitted(self, outcome: str, waited_s: float) -> None:
        """Count how long a request waited, unless it was asked `at_once`."""
        if outcome != "at_once":
            self.held_s.observe(waited_s)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)
