"""`python -m builder pull`: a bake out of an object store that speaks S3; its folder on standard output."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from builder.console import Console
from builder.pull import pull
from builder.s3 import Location

HELP = "a bake out of an object store, each file checked"


def arguments(parser: argparse.ArgumentParser, _: Mapping[str, str]) -> None:
    """What the command takes; boto3 finds endpoint and credentials by itself."""
    parser.add_argument("location", metavar="s3://bucket/prefix", help="where push put it")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where it is to be; a worker's MODEL_NAME")


def run(options: argparse.Namespace, _: Mapping[str, str], console: Console) -> int:
    """Download it and print its folder. Raises `StartError`."""
    pull(Location.parse(options.location), options.folder, console)
    print(options.folder.absolute())
    return 0
