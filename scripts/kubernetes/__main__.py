"""Render every overlay and say what is wrong with it: `make lint-kubernetes`."""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.kubernetes.check import FOLDER, Unrenderable, combined, found, overlays


def main() -> int:
    """Returns the exit status."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor() as pool:
        folders = [*overlays(FOLDER), *combined(FOLDER, Path(name))]
        faults = [*pool.map(_told, folders)]
    for fault in (fault for of in faults for fault in of):
        print(fault, file=sys.stderr)
    return 1 if any(faults) else 0


def _told(folder: Path) -> list[str]:
    try:
        return [f"{folder.name}: {fault}" for fault in found(folder)]
    except Unrenderable as error:
        return [f"{folder.name}: {error}"]


if __name__ == "__main__":
    sys.exit(main())
