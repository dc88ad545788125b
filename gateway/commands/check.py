"""`python -m gateway check`: whether a gateway would start with these settings, without starting it.

It looks at no port, no database and no hub.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from gateway import data_folder
from gateway.commands.tables import table
from gateway.endpoints.file import Described, describe
from handler import listener, model
from handler.errors import ModelNotFound
from handler.table import in_store

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
    data_folder.check_database(settings.database_url, settings.data_dir, serves=True)
    for note in description.notes:
        print(f"firsttoken: {note}", file=sys.stderr)
    listener.resolve(settings.host, settings.port)
    _check_models(description.endpoints, several=settings.endpoints_file is not None)
    print(table([("endpoint", "model", "upstream", "workers"), *map(_row, description.endpoints)]), end="")
    return 0


def _check_models(endpoints: Iterable[Described], *, several: bool) -> None:
    """Raise `ModelNotFound` for each model whose workers would not find its folder here."""
    faults = []
    for described in endpoints:
        name = described.settings.model_name
        if described.settings.upstream == "http" or in_store(name):
            continue
        try:
            model.is_folder(name)
        except ModelNotFound as error:
            faults.append(f"endpoint {described.id!r}: {error}" if several else str(error))
    if len(faults) > 1:
        raise ModelNotFound("\n".join(["models are not there:", *(f"  - {fault}" for fault in faults)]))
    if faults:
        raise ModelNotFound(faults[0])


def _row(described: Described) -> tuple[str, ...]:
    settings = described.settings
    workers = f"{settings.min_workers} to {settings.max_workers}"
    return described.id, settings.model_id, settings.upstream, workers
