"""`python -m builder plan`: what a model needs, and which GPUs it fits, without downloading it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping

from builder.commands import fetch as fetching
from builder.console import Console
from builder.expected import READ_GB_PER_S
from builder.gpus import GIB, UTILIZATION
from builder.lengths import DTYPES, KV_DTYPES
from builder.plan import Wish, as_json, plan
from builder.report import report
from builder.shapes import Asked

HELP = "what a model needs: memory, GPUs that it fits, seconds to start"


def arguments(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    """What the command takes; MODEL_NAME and MODEL_REVISION are what it defaults to."""
    fetching.model(parser, environ, "a folder, a bake, a Hugging Face id or s3://bucket/prefix")
    parser.add_argument("--json", action="store_true", help="one JSON object, in bytes, tokens and seconds")
    served = parser.add_argument_group("how it is served, as vLLM's flags")
    served.add_argument("--dtype", choices=DTYPES, default="auto")
    served.add_argument("--kv-cache-dtype", choices=KV_DTYPES, default="auto")
    served.add_argument("--tensor-parallel", type=_least(int, 1), default=1, metavar="N", help="GPUs")
    served.add_argument("--max-model-len", type=_least(int, 1), metavar="TOKENS")
    served.add_argument(
        "--gpu-memory-utilization",
        type=_share,
        default=UTILIZATION,
        metavar="SHARE",
        help=f"of a card's memory (default: {UTILIZATION})",
    )
    known = parser.add_argument_group("what you know better")
    known.add_argument(
        "--overhead-gib",
        type=_least(float, 0),
        metavar="GIB",
        help="what a GPU needs besides weights and KV cache (default: by model and card)",
    )
    known.add_argument(
        "--read-gb-per-s",
        type=_least(float, 0.001),
        metavar="GB",
        help=f"how fast the weights are read (default: {READ_GB_PER_S:g}, or as a bake was measured)",
    )


def run(options: argparse.Namespace, environ: Mapping[str, str], _: Console) -> int:
    """Print the plan. Raises `StartError`."""
    overhead = options.overhead_gib
    wish = Wish(
        Asked(options.dtype, options.kv_cache_dtype, options.tensor_parallel, options.max_model_len),
        options.gpu_memory_utilization,
        None if overhead is None else int(overhead * GIB),
        options.read_gb_per_s,
    )
    made = plan(options.model, options.revision, wish, environ)
    print(json.dumps(as_json(made)) if options.json else report(made))
    return 0


def _least(kind: type[int | float], least: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least:g}")
        return value

    return parse


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share between 0 and 1")
    return value
