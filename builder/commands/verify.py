"""`python -m builder verify`: whether a bake is what was baked, and a line for each file that is not.

Changes nothing. Exit codes: 0 it is, 65 it is not, 66 there is none.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from builder.console import Console, size
from builder.progress import progress
from handler import baked
from handler.errors import ManifestMismatch, ModelNotFound
from handler.manifest import NAME, Manifest, differences, is_bake

HELP = "compare a bake with its manifest"


def arguments(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> None:  # noqa: ARG001 - as each
    """The bake, and how closely to look."""
    parser.add_argument("bake", metavar="DIR", type=Path, help="a folder that was baked")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="as a worker does: all sizes, and the bytes of small files",
    )


def run(options: argparse.Namespace, environ: Mapping[str, str], console: Console) -> int:  # noqa: ARG001
    """Compare, and print what differs. Raises `StartError`."""
    bake: Path = options.bake
    if not is_bake(bake):
        raise ModelNotFound(f"{bake} was not baked: there is no {NAME} in it")
    manifest = Manifest.load(bake)
    total_bytes = sum(file.size_bytes for file in manifest.files.values())
    with progress(console, "comparing", 0 if options.quick else total_bytes) as advance:
        different = list(differences(bake, manifest, full=not options.quick, told=advance))
    for difference in different:
        print(difference)
    for reason in baked.misfits(bake, manifest) if manifest.made_with else ():
        console.say(f"a worker here would not use its caches: {reason}")
    files = f"{len(manifest.files)} files, {size(total_bytes)}"
    if different:
        console.say(f"{bake}: {len(different)} of {files} are not as baked")
        return ManifestMismatch.exit_code
    console.say(f"{bake} is what was baked: {files}{', by size' if options.quick else ''}")
    return 0
