"""`python -m builder warm`: the caches of a bake, made by real starts with the settings that are set."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from builder.console import Console
from builder.warm import warm

HELP = "start the engine, so that the bake has every cache that a start needs"


def arguments(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:  # noqa: ARG001 - as each
    """The bake."""
    parser.add_argument("bake", metavar="DIR", type=Path, help="a folder with a fetched model in DIR/model")
    parser.add_argument("--again", action="store_true", help="also if nothing has changed")


def run(options: argparse.Namespace, environ: Mapping[str, str], console: Console) -> int:
    """Warm it. Raises `StartError`."""
    if not warm(options.bake, environ=environ, console=console, again=options.again):
        console.say("nothing has changed")
    return 0
