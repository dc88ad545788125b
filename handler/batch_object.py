"""OpenAI's object of a batch, and how it moves on.

https://platform.openai.com/docs/api-reference/batch/object

validating -> in_progress -> finalizing -> completed | expired
validating -> failed        validating, in_progress -> cancelling -> cancelled
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from handler.batch_lines import Progress
from handler.errors import RequestError

WINDOW_S = 24 * 3600
"""How long a batch may take; what is not asked by then is told that it has expired."""

OVER = frozenset({"completed", "failed", "expired", "cancelled"})

_TIMES = (
    *("in_progress_at", "expires_at", "finalizing_at", "completed_at"),
    *("failed_at", "expired_at", "cancelling_at", "cancelled_at"),
)

Batch = dict[str, Any]


def begin(
    batch_id: str, *, input_file_id: str, endpoint: str, model: str | None, metadata: Any, now: float
) -> Batch:
    """A batch that has just been seen."""
    return {
        "id": batch_id,
        "object": "batch",
        "endpoint": endpoint,
        "model": model,
        "errors": None,
        "input_file_id": input_file_id,
        "completion_window": "24h",
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": int(now),
        **dict.fromkeys(_TIMES),
        "expires_at": int(now) + WINDOW_S,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": None,
        "metadata": metadata,
    }


def is_over(batch: Batch) -> bool:
    """Whether nothing will change any more."""
    return batch.get("status") in OVER


def moved(batch: Batch, status: str, now: float, **changes: Any) -> Batch:
    """`batch`, which is `status` from now on, if it was not before."""
    moment = f"{status}_at"
    if moment in batch and batch[moment] is None:
        changes[moment] = int(now)
    return {**batch, "status": status, **changes}


def failed(batch: Batch, faults: Sequence[tuple[int | None, RequestError]], now: float) -> Batch:
    """`batch`, of whose lines none is asked because of these, each with the number of its line."""
    errors = [
        {"code": fault.code, "message": fault.message, "param": fault.param, "line": line}
        for line, fault in faults
    ]
    return moved(batch, "failed", now, errors={"object": "list", "data": errors})


def counted(batch: Batch, progress: Progress) -> Batch:
    """`batch`, as far as `progress`."""
    counts: Mapping[str, int] = batch["request_counts"]
    tokens = progress.input_tokens + progress.output_tokens
    usage = {
        "input_tokens": progress.input_tokens,
        "input_tokens_details": {"cached_tokens": progress.cached_tokens},
        "output_tokens": progress.output_tokens,
        "output_tokens_details": {"reasoning_tokens": progress.reasoning_tokens},
        "total_tokens": tokens,
    }
    return {
        **batch,
        "request_counts": {**counts, "completed": progress.completed, "failed": progress.failed},
        "usage": usage if tokens else None,
    }
