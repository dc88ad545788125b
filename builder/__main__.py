"""What is done before run time: a model fetched, its caches made, both proven and shipped."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from builder import disk
from builder.console import Console
from handler.errors import NoResources, StartError

COMMANDS = ("plan", "bake", "fetch", "warm", "seal", "verify", "push", "pull")
"""Each is a module of `builder.commands`."""

INPUT_OUTPUT = 74
"""EX_IOERR: a file or folder can't be read or written."""


def main() -> None:
    """Run the command that the arguments name, and exit with its status."""
    # A SIGTERM ends what was started for the work as Ctrl-C does: by an exception.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run(sys.argv[1:], os.environ, sys.stderr))


def run(argv: Sequence[str], environ: Mapping[str, str], stream: TextIO) -> int:
    """Run the command `argv`; what it is doing goes to `stream`.

    Returns the exit status, from sysexits.h where it is an error.
    """
    named = [name for name in COMMANDS if [name] == argv[:1]]
    options = parser(environ, named or COMMANDS).parse_args(argv)
    console = Console(stream, options.command)
    try:
        status: int = options.run(options, environ, console)
        sys.stdout.flush()
    except StartError as error:
        console.say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `... | head` has seen enough; nor does Python's end say more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a folder that is a file, or may not be read or written, a disk that is full
        files = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        console.say(f"{files}: {error.strerror}" if files else str(error))
        return NoResources.exit_code if error.errno in disk.FULL else INPUT_OUTPUT
    return status


def parser(environ: Mapping[str, str], names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The command line with the commands `names`; `environ` has what it defaults to.

    Only their modules are imported: the image fetches with the few files of ours that a fetch needs.
    """
    top = argparse.ArgumentParser(prog="python -m builder", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name in names:
        command = importlib.import_module(f"builder.commands.{name}")
        added = commands.add_parser(name, help=command.HELP, description=command.__doc__)
        command.arguments(added, environ)
        added.set_defaults(run=command.run)
    return top


if __name__ == "__main__":
    main()
