"""`python -m builder fetch`: a model's folder, fetched unless it is there, on standard output."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from builder.console import Console
from builder.fetch import fetch
from handler.settings import DEFAULT_MODEL

HELP = "a model's files, in a folder that vLLM serves"


def arguments(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    """What the command takes; MODEL_NAME and MODEL_REVISION are what it defaults to."""
    source(parser, environ)
    parser.add_argument("--out", type=Path, metavar="DIR", help="put it there (default: the user's cache)")


def source(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    """Which model, and which state of it."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        default=environ.get("MODEL_NAME"),
        help=f"a folder or a Hugging Face id (default: MODEL_NAME, else {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--revision",
        metavar="REVISION",
        default=environ.get("MODEL_REVISION") or None,
        help="a branch, a tag or a commit (default: MODEL_REVISION, else the main branch)",
    )


def run(options: argparse.Namespace, environ: Mapping[str, str], console: Console) -> int:
    """Fetch the model and print its folder. Raises `StartError`."""
    folder = fetch(
        options.model, environ=environ, console=console, revision=options.revision, out=options.out
    )
    print(folder.absolute())
    return 0
