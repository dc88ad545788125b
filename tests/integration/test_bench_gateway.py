"""`make bench-gateway` without a model, and small: its ways are there, and what they add is computed."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import gateway_path
from bench.figures import Window
from bench.overhead import MODEL_ID, prompts
from bench.servers import NOT_OURS_TO_GIVE


def test_every_way_leads_to_the_worker() -> None:
    """Straight, through the gateway and through the plain proxy, with the same number of tokens."""
    options = gateway_path.parser({}).parse_args(["--rounds", "1", "--max-tokens", "5"])
    environ = {name: value for name, value in os.environ.items() if name not in NOT_OURS_TO_GIVE}
    command = [sys.executable, "-m", "bench.paced", "local-worker"]
    settings = {"MODEL_NAME": MODEL_ID, "PACE_TOKENS_PER_S": "1e9"}
    first = next(prompts(random.Random(0), 1, options))
    with (
        tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as folder,
        gateway_path.ways(command, settings, environ, Path(folder), first) as found,
    ):
        results = gateway_path.measure(found, options, "paced", {1: 3, 2: 4})
    assert {"direct", "gateway", "aiohttp"} <= results[1].keys()
    assert results.keys() == {1, 2}
    windows = [window for by in results.values() for all_ in by.values() for window in all_]
    assert {window.tokens for window in windows} == {3 * 5, 4 * 5}
    ratios = gateway_path.ratios(results)
    assert ratios["tokens_ratio"] == round(gateway_path.kept(results[2], "gateway"), 3)
    assert [line.split()[0] for line in gateway_path.verdicts(ratios)] == list(gateway_path.GOALS)
    assert "plain aiohttp proxy" in gateway_path.table(results)


def window(first_s: Sequence[float], wall_s: float) -> Window:
    """One of 100 tokens."""
    return Window("any", 1, first_s, 100, wall_s, 0.0)


def test_each_round_is_compared_with_itself() -> None:
    """A machine that is slower in one round adds nothing; the 99th percentile is of all rounds."""
    direct = [window([0.010, 0.010], 1.0), window([0.050, 0.050], 4.0), window([0.011, 0.011], 1.0)]
    gateway = [window([0.012, 0.012], 1.25), window([0.051, 0.051], 5.0), window([0.013, 0.013], 1.0)]
    found = {1: {"direct": direct, "gateway": gateway}, 32: {"direct": direct, "gateway": gateway}}
    ratios = gateway_path.ratios(found)
    assert ratios == {"added_ttft_p50_ms": 2.0, "added_ttft_p99_ms": 1.0, "tokens_ratio": 0.8}
    assert gateway_path.verdicts(ratios) == [
        "added_ttft_p50_ms 2, goal <= 3: met",
        "tokens_ratio 0.8, goal >= 0.95: missed",
    ]
