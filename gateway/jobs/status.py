"""What RunPod's `/status` says of a job, also to webhooks."""

from __future__ import annotations

from typing import Any

from gateway.jobs.table import Job, State
from handler.messages import as_json


def render(job: Job, output: bytes | None) -> bytes:
    """The body for `job`; its `output`, which is JSON already, is shown if it is COMPLETED."""
    shown: dict[str, Any] = {}
    if job.begun_at is not None:
        shown["delayTime"] = _ms(job.begun_at - job.submitted_at)
        if job.ended_at is not None:
            shown["executionTime"] = _ms(job.ended_at - job.begun_at)
    if job.error is not None:
        shown["error"] = job.error
    shown["id"] = job.id
    if job.retries:
        shown["retries"] = job.retries
    shown["status"] = job.state.shown
    body = as_json(shown)
    if job.state is State.COMPLETED and output is not None:
        body = body[:-1] + b',"output":' + output + b"}"
    return body


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))
