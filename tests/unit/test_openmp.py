"""How many threads compute beside the event loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from handler.openmp import LARGE_MODEL_BYTES, openmp


@pytest.mark.parametrize(
    ("weights_bytes", "cores", "expected"),
    [
        (LARGE_MODEL_BYTES, 2, {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}),
        (LARGE_MODEL_BYTES - 1, 2, {"OMP_NUM_THREADS": "1"}),
        (LARGE_MODEL_BYTES - 1, 1, {"OMP_NUM_THREADS": "1"}),
        (LARGE_MODEL_BYTES - 1, 8, {"OMP_NUM_THREADS": "7"}),
    ],
)
def test_a_large_model_gets_every_core_and_threads_that_sleep(
    weights_bytes: int, cores: int, expected: dict[str, str], tmp_path: Path
) -> None:
    """Shards count together, and a small model leaves the event loop a core."""
    for number, size in enumerate((weights_bytes // 2, weights_bytes - weights_bytes // 2)):
        with (tmp_path / f"model-{number}.safetensors").open("wb") as shard:
            shard.truncate(size)
    assert openmp(str(tmp_path), cores) == expected


def test_a_model_that_is_not_here_yet_leaves_a_core_free() -> None:
    """Its size is not known before it is fetched."""
    assert openmp("organisation/model", 4) == {"OMP_NUM_THREADS": "3"}
