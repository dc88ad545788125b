"""`python -m gateway`: the command line. Exit codes are sysexits'."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence

import uvloop

from gateway.commands import INTERRUPTED
from gateway.endpoints.file import describe
from gateway.settings import UPSTREAMS
from handler import logs
from handler.errors import StartError, UsageError
from handler.plain import plain

WORKER = (sys.executable, "-m", "handler")
COMMANDS = ("check", "status", "logs", "chat", "keys", "usage")
"""Those beside `serve`, each a module of `gateway.commands`."""

log = logging.getLogger("gateway")


def main(argv: Sequence[str] | None = None, worker: Sequence[str] = WORKER) -> int:
    """Run a command, or the gateway, whose workers are `worker`; returns an exit code of sysexits.h."""
    given = sys.argv[1:] if argv is None else argv
    args = parser([name for name in COMMANDS if [name] == given[:1]] or COMMANDS).parse_args(given)
    try:
        _check_text(given)
        if "run" in args:
            return int(args.run(args, os.environ))
        return run({**os.environ, **_given(args)}, worker)
    except StartError as error:
        print(plain(f"firsttoken: {error}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before the loop took over
        return INTERRUPTED
    except BrokenPipeError:  # `... | head` has seen enough; nor does Python's end say more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _check_text(given: Sequence[str]) -> None:
    """Raise `UsageError` for bytes that are no text: no name has them, nor could the database hold them."""
    try:
        "".join(given).encode()
    except UnicodeEncodeError:
        raise UsageError("the arguments are not all UTF-8") from None


def parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The command line with the commands `names`: only their modules are imported, which takes its time."""
    top = argparse.ArgumentParser(
        prog="python -m gateway",
        description="Serve OpenAI-compatible URLs. Settings come from the environment.",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    serving = commands.add_parser("serve", help="serve; also without a command")
    serving.add_argument("--endpoints", metavar="FILE", help="the endpoints to serve (ENDPOINTS_FILE)")
    serving.add_argument("--upstream", choices=UPSTREAMS, help="how workers are asked (UPSTREAM)")
    for name in names:
        importlib.import_module(f"gateway.commands.{name}").add(commands)
    return top


def _given(args: argparse.Namespace) -> dict[str, str]:
    """The settings among the arguments."""
    options = {"UPSTREAM": "upstream", "ENDPOINTS_FILE": "endpoints"}
    return {name: value for name, option in options.items() if (value := getattr(args, option, None))}


def run(environ: Mapping[str, str], worker: Sequence[str]) -> int:
    """Serve what `environ` describes, until a signal comes."""
    settings, description = describe(environ)
    logs.to_stderr("gateway", settings.log_level)
    logs.to_stderr("handler", settings.log_level)
    for library in ("uvicorn", "asyncio"):
        logs.to_stderr(library, "WARNING")
    for note in description.notes:
        log.warning(note)
    serve = importlib.import_module("gateway.serve").serve  # all that a gateway is, and no command needs
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return int(runner.run(serve(settings, description, environ, worker)))


if __name__ == "__main__":
    sys.exit(main())
