"""What batch.json says: OpenAI's object of a batch, https://platform.openai.com/docs/api-reference/batch/object.

    validating -> in_progress -> finalizing -> completed | expired
    validating -> failed        validating, in_progress -> cancelling -> cancelled

Files are called by their URIs in S3. `metadata` has what the input's own metadata says, the version of the
input, and which holder of the batch has written this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handler.errors import RequestError
from handler.platforms.batch_lines import Progress
from handler.platforms.batch_store import Input, Place

WINDOW_S = 24 * 3600
"""How long a batch may take; what is not asked by then is told that it has expired."""

OVER = frozenset({"completed", "failed", "expired", "cancelled"})
VERSION, ATTEMPT = "input_version", "attempt"

_TIMES = (
    *("in_progress_at", "expires_at", "finalizing_at", "completed_at"),
    *("failed_at", "expired_at", "cancelling_at", "cancelled_at"),
)

Batch = dict[str, Any]


def begin(place: Place, given: Input, model: str, now: float) -> Batch:
    """A batch that has just been seen."""
    return {
        "id": place.id,
        "object": "batch",
        "endpoint": "",
        "model": model,
        "errors": None,
        "input_file_id": f"s3://{place.name}",
        "completion_window": "24h",
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": int(now),
        **dict.fromkeys(_TIMES),
        "expires_at": int(now) + WINDOW_S,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": None,
        "metadata": {**given.metadata, VERSION: given.version},
    }


def is_of(batch: Batch, version: str) -> bool:
    """Whether `batch` is of this version of its input."""
    metadata = batch.get("metadata")
    return isinstance(metadata, dict) and metadata.get(VERSION) == version


def is_over(batch: Batch) -> bool:
    """Whether nothing will change any more."""
    return batch.get("status") in OVER


def taken(batch: Batch, attempt: int) -> Batch:
    """`batch`, by its `attempt`th holder."""
    return {**batch, "metadata": {**batch["metadata"], ATTEMPT: str(attempt)}}


def moved(batch: Batch, status: str, now: float, **changes: Any) -> Batch:
    """`batch`, which is `status` from now on, if it was not before."""
    moment = f"{status}_at"
    if moment in batch and batch[moment] is None:
        changes[moment] = int(now)
    return {**batch, "status": status, **changes}


def failed(batch: Batch, why: RequestError, now: float) -> Batch:
    """`batch`, of whose lines none is asked."""
    error = {"code": why.code, "message": why.message, "param": why.param, "line": None}
    return moved(batch, "failed", now, errors={"object": "list", "data": [error]})


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
