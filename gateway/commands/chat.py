"""`python -m gateway chat`: talk to an endpoint, in a terminal or through a pipe."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.commands import INTERRUPTED, client
from gateway.commands.client import Client, Place, connected
from gateway.commands.conversation import Conversation
from gateway.commands.tables import shown_on
from gateway.commands.terminal import Answering, history
from handler.errors import Unreachable, UsageError
from handler.plain import plain

if TYPE_CHECKING:
    from gateway.commands import Subparsers

PROMPT = "> "
HELP = """\
/system TEXT   what the model is told before everything; without TEXT: nothing
/model NAME    another model
/clear         begin anew
/save FILE     write the conversation to a file, as JSON
/help          this
Ctrl-C stops an answer; Ctrl-C again, or Ctrl-D, leaves.
"""


def add(commands: Subparsers) -> None:
    """`chat`."""
    parser = commands.add_parser("chat", help="talk to an endpoint in the terminal", description=__doc__)
    parser.add_argument("--endpoint", metavar="ID", help="the endpoint (default: the first one)")
    parser.add_argument("--model", metavar="NAME", help="the model (default: the endpoint's)")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before everything")
    client.arguments(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    place = Place.of(args, environ)
    with asyncio.Runner() as runner:
        opening = connected(place)
        asked = runner.run(opening.__aenter__())
        try:
            conversation = runner.run(_begin(asked, args))
            if sys.stdin.isatty() and sys.stdout.isatty():
                with history(place.folder):
                    return _talk(runner, asked, conversation)
            return _answer_once(runner, asked, conversation)
        except KeyboardInterrupt:
            return INTERRUPTED
        finally:
            runner.run(opening.__aexit__(None, None, None))


async def _begin(asked: Client, args: argparse.Namespace) -> Conversation:
    """The conversation that the arguments ask for."""
    endpoint_id = args.endpoint or asked.place.endpoint_id
    if endpoint_id is None:
        shown = (await asked.get("/health")).get("endpoints")
        if not shown:
            raise Unreachable(f"{asked.place} has no endpoint for this key")
        endpoint_id = shown[0]["id"]
    return Conversation(endpoint_id, args.model, args.system)


def _answer_once(runner: asyncio.Runner, asked: Client, conversation: Conversation) -> int:
    """Answer all that is on standard input, with nothing but the answer on standard output."""
    if not (text := sys.stdin.read().strip()):
        raise UsageError("there is nothing on standard input to answer")
    runner.run(_print(asked, conversation, text))
    return 0


async def _print(asked: Client, conversation: Conversation, text: str) -> None:
    show = shown_on(sys.stdout)
    async for part in conversation.ask(asked, text):
        sys.stdout.write(show(part))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _talk(runner: asyncio.Runner, asked: Client, conversation: Conversation) -> int:
    """Ask and answer until the user leaves."""
    of = f"{conversation.model or 'the model'} of endpoint {conversation.endpoint_id}"
    print(f"{plain(of)}; /help says more")
    while True:
        try:
            line = input(PROMPT).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line.startswith("/"):
            _obey(runner, asked, conversation, line)
        elif line:
            answering = Answering(sys.stdout)
            try:
                runner.run(answering.show(asked, conversation, line))
            except KeyboardInterrupt:
                answering.stopped()
            except Unreachable as error:
                answering.failed(str(error))


def _obey(runner: asyncio.Runner, asked: Client, conversation: Conversation, line: str) -> None:
    """Do what a line that begins with a slash says."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    match command:
        case "/help":
            print(HELP, end="")
        case "/system":
            conversation.system = rest or None
        case "/clear":
            conversation.clear()
        case "/model" if rest:
            try:
                runner.run(conversation.choose(asked, rest))
            except KeyboardInterrupt:
                print("\n[stopped]")
            except Unreachable as error:
                print(plain(str(error)))
        case "/model":
            print(plain(conversation.model or "the endpoint's own"))
        case "/save" if rest:
            try:
                conversation.save(Path(rest).expanduser())
            except OSError as error:
                print(f"{rest}: {error.strerror}")
        case _:
            print("what is that? /help says what there is")
