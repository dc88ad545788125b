"""`python -m gateway check`: whether a gateway would start with these settings, without starting it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gateway import data_folder
from gateway.commands.tables import table
from gateway.endpoints.file import Described, describe

if TYPE_CHECKING:
    from gateway.commands import Subparsers


def add(commands: Subparsers) -> None:
    """`check`."""
    parser = commands.add_parser(
        "check", help="say what is wrong with the settings and the endpoints", description=__doc__
    )
    parser.add_argument("--endpoints", metavar="FILE", help="where they are described (ENDPOINTS_FILE)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    given = {"ENDPOINTS_FILE": args.endpoints} if args.endpoints else {}
    settings, description = describe({**environ, **given})
    data_folder.check(settings.data_dir, serves=True)
    for note in description.notes:
        print(f"firsttoken: {note}", file=sys.stderr)
    print(table([("endpoint", "model", "upstream", "workers"), *map(_row, description.endpoints)]), end="")
    return 0


def _row(described: Described) -> tuple[str, ...]:
    settings = described.settings
    workers = f"{settings.min_workers} to {settings.max_workers}"
    return described.id, settings.model_id, settings.upstream, workers
