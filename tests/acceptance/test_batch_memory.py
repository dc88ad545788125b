"""A large batch through a worker whose memory is watched; `make test-batch` has the largest."""

from __future__ import annotations

from pathlib import Path

from tests.lanes.batch_memory import stream
from tests.object_store import ObjectStore


def test_a_large_file_streams_through_bounded_memory(object_store: ObjectStore, tmp_path: Path) -> None:
    """In and out of the worker in pieces; lines are long, so that this takes seconds."""
    stream(object_store, tmp_path, lines=2500, size_bytes=100 << 20, within_s=100.0)
