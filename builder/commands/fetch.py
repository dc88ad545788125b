"""`python -m builder fetch`: a model's folder, fetched unless it is there, on standard output."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from builder.console import Console
from builder.fetch import fetch
from builder.selection import Choice
from handler.settings import DEFAULT_MODEL
from handler.table import TRUE

HELP = "a model's files, in a folder that vLLM serves"


def arguments(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    """What the command takes, with defaults from the environment."""
    source(parser, environ)
    parser.add_argument("--out", type=Path, metavar="DIR", help="put it there (default: the user's cache)")


def source(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:
    """Which model, and what of it; see `fetched`."""
    which = "a Hugging Face id, s3://bucket/prefix, a folder, or a GGUF file of the default model's family"
    model(parser, environ, which)
    parser.add_argument(
        "--pickle",
        action="append",
        default=[],
        metavar="NAME",
        help="take these .bin, .pt or .pth files too, which run their maker's code when they are loaded: "
        "a path in the repository, or a pattern with *; may be repeated",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        default=environ.get("TRUST_REMOTE_CODE", "").lower() in TRUE,
        help="take the repository's Python files too (default: TRUST_REMOTE_CODE)",
    )


def model(parser: argparse.ArgumentParser, environ: Mapping[str, str], which: str) -> None:
    """MODEL, which may be `which`, and its revision; both default to what the environment says."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        default=environ.get("MODEL_NAME"),
        help=f"{which} (default: MODEL_NAME, else {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--revision",
        metavar="REVISION",
        default=environ.get("MODEL_REVISION") or None,
        help="a branch, a tag or a commit on Hugging Face (default: MODEL_REVISION, else the main branch)",
    )


def fetched(
    options: argparse.Namespace, environ: Mapping[str, str], console: Console, out: Path | None
) -> Path:
    """Fetch what the arguments of `source` ask for; returns its folder. Raises `StartError`."""
    choice = Choice(tuple(sorted(set(options.pickle))), options.trust_remote_code)
    return fetch(
        options.model, environ=environ, console=console, revision=options.revision, out=out, choice=choice
    )


def run(options: argparse.Namespace, environ: Mapping[str, str], console: Console) -> int:
    """Fetch the model and print its folder. Raises `StartError`."""
    print(fetched(options, environ, console, options.out).absolute())
    return 0
