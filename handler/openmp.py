"""How many threads compute beside the event loop."""

from __future__ import annotations

from pathlib import Path

from handler import readahead

LARGE_MODEL_BYTES = 64 << 20


def openmp(model: str, cores: int) -> dict[str, str]:
    """How OpenMP computes beside an event loop in the same process.

    Its threads spin between parallel regions: with one on every core the loop starves for
    seconds. A large model gets every core and threads that sleep instead; in a small one the
    regions are so short that waking a thread takes longer than its work, so a core stays free.
    """
    weights_bytes = sum(Path(file).stat().st_size for file in readahead.weights(model))
    if weights_bytes >= LARGE_MODEL_BYTES:
        return {"OMP_NUM_THREADS": str(cores), "OMP_WAIT_POLICY": "PASSIVE"}
    return {"OMP_NUM_THREADS": str(max(1, cores - 1))}
