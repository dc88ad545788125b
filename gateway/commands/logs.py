"""`python -m gateway logs`: what the workers of a running gateway have written."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING

from gateway.commands import client
from gateway.commands.client import Place, connected
from gateway.commands.tables import shown_on

if TYPE_CHECKING:
    from gateway.commands import Subparsers


def add(commands: Subparsers) -> None:
    """`logs`."""
    parser = commands.add_parser("logs", help="what workers have written", description=__doc__)
    parser.add_argument("--endpoint", metavar="ID", help="those of one endpoint")
    parser.add_argument("--worker", metavar="ID", help="one worker, as `status` calls it")
    parser.add_argument("--lines", metavar="N", type=int, default=100, help="at most so many (default: 100)")
    parser.add_argument("--follow", "-f", action="store_true", help="and what they write from now on")
    client.arguments(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    asked_for = {"endpoint": args.endpoint, "worker": args.worker, "lines": args.lines}
    query = {name: str(value) for name, value in asked_for.items() if value is not None}
    try:
        asyncio.run(_show(Place.of(args, environ), {**query, **({"follow": "true"} if args.follow else {})}))
    except KeyboardInterrupt:
        return 0
    return 0


async def _show(place: Place, query: Mapping[str, str]) -> None:
    """Print the lines; those of a stream are the data of its events."""
    follows = "follow" in query
    show = shown_on(sys.stdout)
    async with connected(place) as asked, aclosing(asked.lines("/admin/logs", query)) as lines:
        async for line in lines:
            if not follows:
                print(show(line))
            elif line.startswith("data: "):
                print(show(line.removeprefix("data: ")), flush=True)
