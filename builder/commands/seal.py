"""`python -m builder seal`: the manifest of a bake, by which it is known from now on."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from builder.console import Console
from builder.seal import seal

HELP = "write the manifest of what is there"


def arguments(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:  # noqa: ARG001 - as each
    """The bake."""
    parser.add_argument("bake", metavar="DIR", type=Path, help="a folder with a model in DIR/model")


def run(options: argparse.Namespace, environ: Mapping[str, str], console: Console) -> int:
    """Seal it. Raises `StartError`."""
    if not seal(options.bake, environ=environ, console=console):
        console.say("nothing has changed")
    return 0
