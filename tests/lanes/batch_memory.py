"""The largest batch that OpenAI takes, every line asked: `make test-batch`, a minute on two cores."""

from __future__ import annotations

from pathlib import Path

from handler.batch_lines import FILE_MAX_BYTES, REQUESTS_MAX
from tests import batch_stack
from tests.batch_stack import line
from tests.batch_worker import environ, worker
from tests.memory import peak_bytes
from tests.object_store import ObjectStore
from tests.until import until

GROWS_MAX_BYTES = 150 << 20
"""What a worker may take at most beyond what it took for a batch of one line; its window alone is 32 MiB."""


def stream(object_store: ObjectStore, folder: Path, *, lines: int, size_bytes: int, within_s: float) -> None:
    """Have a file of about `size_bytes` in so many lines done, every fifth of which is bad."""
    resources = batch_stack.make(object_store)
    text = "x" * (size_bytes // lines - 200)
    with worker(environ(resources), folder / "worker.log") as process:
        resources.put("small", [line("x")])
        until(lambda: resources.is_over("small"))
        before = peak_bytes(process.pid)
        resources.put("large", (_line(number, text) for number in range(lines)))
        until(lambda: resources.is_over("large"), timeout_s=within_s)
        grew = peak_bytes(process.pid) - before
    found = resources.record("large")
    assert found is not None
    assert found.request_counts is not None
    bad = len(range(0, lines, 5))
    assert found.request_counts.model_dump() == {"total": lines, "completed": lines - bad, "failed": bad}
    assert grew < GROWS_MAX_BYTES, f"grew by {grew >> 20} MiB"


def _line(number: int, text: str) -> bytes:
    whole = line(str(number), text=text)
    return whole if number % 5 else whole.replace(b'"POST"', b'"GET"')


def test_fifty_thousand_lines_stream_through_bounded_memory(
    object_store: ObjectStore, tmp_path: Path
) -> None:
    """200 MB in, and nearly as much out."""
    stream(object_store, tmp_path, lines=REQUESTS_MAX, size_bytes=FILE_MAX_BYTES, within_s=300.0)
