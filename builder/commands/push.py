"""`python -m builder push`: a sealed bake into an object store that speaks S3."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from builder.console import Console
from builder.push import push
from builder.s3 import Location

HELP = "a sealed bake into an object store"


def arguments(parser: argparse.ArgumentParser, _: Mapping[str, str]) -> None:
    """What the command takes; boto3 finds endpoint and credentials by itself."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder that was sealed")
    parser.add_argument("location", metavar="s3://bucket/prefix", help="where it is to be")
    parser.add_argument("--replace", action="store_true", help="also where another bake is")


def run(options: argparse.Namespace, _: Mapping[str, str], console: Console) -> int:
    """Upload it. Raises `StartError`."""
    push(options.folder, Location.parse(options.location), console, replace=options.replace)
    return 0
