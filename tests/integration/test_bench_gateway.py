"""`make bench-gateway` without a model, and small: its ways are there, and what they add is computed."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path

from bench import gateway_path
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
        results, _ = gateway_path.measure(found, options, "paced", {1: 3, 2: 4})
    assert {"direct", "gateway", "aiohttp"} <= results[1].keys()
    assert results.keys() == {1, 2}
    assert all(figures.tokens_per_s > 0 for by in results.values() for figures in by.values())
    ratios = gateway_path.ratios(results)
    kept = results[2]["gateway"].tokens_per_s / results[2]["direct"].tokens_per_s
    assert ratios["tokens_ratio"] == round(kept, 3)
    assert [line.split()[0] for line in gateway_path.verdicts(ratios)] == list(gateway_path.GOALS)
    assert "plain aiohttp proxy" in gateway_path.table(results)
