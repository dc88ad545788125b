"""`python -m builder fetch`: a model's folder, fetched unless it is there, on standard output."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from builder.console import Console
from builder.fetch import fetch
from handler.errors import StartError
from handler.settings import DEFAULT_MODEL


def main() -> None:
    """Run the command that the arguments name, and exit with its status."""
    # A SIGTERM ends what was started for the work as Ctrl-C does: by an exception.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run(sys.argv[1:], os.environ, Console(sys.stderr)))


def run(argv: Sequence[str], environ: Mapping[str, str], console: Console) -> int:
    """Run the command `argv`; returns the exit status, from sysexits.h where it is an error."""
    options = parser(environ).parse_args(argv)
    try:
        folder = fetch(
            options.model, environ=environ, console=console, revision=options.revision, out=options.out
        )
    except StartError as error:
        console.say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    print(folder.absolute())
    return 0


def parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    """The command line; MODEL_NAME and MODEL_REVISION are what it defaults to."""
    top = argparse.ArgumentParser(prog="python -m builder", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("fetch", help="a model's files, in a folder that vLLM serves")
    command.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        default=environ.get("MODEL_NAME"),
        help=f"a folder or a Hugging Face id (default: MODEL_NAME, else {DEFAULT_MODEL})",
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="put it there (default: the user's cache)")
    command.add_argument(
        "--revision",
        metavar="REVISION",
        default=environ.get("MODEL_REVISION") or None,
        help="a branch, a tag or a commit (default: MODEL_REVISION, else the main branch)",
    )
    return top


if __name__ == "__main__":
    main()
