"""What batch.json says: OpenAI's object of a batch (`handler.batch_object`), its files called by their URIs.

`metadata` has what the input's own metadata says, the version of the input, and which holder of the batch has
written this.
"""

from __future__ import annotations

from handler import batch_object
from handler.batch_object import Batch
from handler.platforms.batch_store import Input, Place

VERSION, ATTEMPT = "input_version", "attempt"


def begin(place: Place, given: Input, model: str, now: float) -> Batch:
    """A batch that has just been seen."""
    return batch_object.begin(
        place.id,
        input_file_id=f"s3://{place.name}",
        endpoint="",
        model=model,
        metadata={**given.metadata, VERSION: given.version},
        now=now,
    )


def is_of(batch: Batch, version: str) -> bool:
    """Whether `batch` is of this version of its input."""
    metadata = batch.get("metadata")
    return isinstance(metadata, dict) and metadata.get(VERSION) == version


def taken(batch: Batch, attempt: int) -> Batch:
    """`batch`, by its `attempt`th holder."""
    return {**batch, "metadata": {**batch["metadata"], ATTEMPT: str(attempt)}}
