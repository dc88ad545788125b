"""What the Dockerfile does that takes more than a line of shell; the standard library only.

python image.py requirements EXTRA... < pyproject.toml > requirements.txt
python image.py settle FOLDER...
"""

from __future__ import annotations

import compileall
import os
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

SECOND_NS = 10**9


def main(argv: Sequence[str], pyproject: BinaryIO) -> None:
    """Do what `argv` says."""
    match argv:
        case ["requirements", *extras] if extras:
            print(*requirements(pyproject, extras), sep="\n")
        case ["settle", *folders] if folders:
            for folder in folders:
                settle(folder)
        case _:
            sys.exit("usage: image.py requirements EXTRA... < pyproject.toml, or image.py settle FOLDER...")


def requirements(pyproject: BinaryIO, extras: Iterable[str]) -> Iterator[str]:
    """What pyproject.toml wants with `extras`, a line each; the extra `fetch` wants nothing beside itself.

    A stage of its own writes this down, so that another line of pyproject.toml, or of the code, installs
    nothing again. Raises `KeyError` for an extra that is none.
    """
    project = tomllib.load(pyproject)["project"]
    extras = list(extras)
    if extras != ["fetch"]:
        yield from project["dependencies"]
    for extra in extras:
        yield from project["optional-dependencies"][extra]


def settle(folder: str) -> None:
    """Compile the modules in `folder` that are not, and take the fractions off its modification times.

    uv installs without compiling, as the base image for GPUs did, and whoever runs the image may not
    write there. A layer keeps whole seconds only (containerd's pkg/archive/tar.go: "truncate timestamp
    for compatibility"): a cache that was made before the image was pushed and names its files after
    nanoseconds is not found after it was pulled.
    """
    compileall.compile_dir(folder, quiet=2, workers=0)  # not every file is for this Python: templates, tests
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent), *(Path(parent, name) for name in (*folders, *files))):
            if (changed_ns := path.lstat().st_mtime_ns) % SECOND_NS:
                whole_ns = changed_ns // SECOND_NS * SECOND_NS
                os.utime(path, ns=(whole_ns, whole_ns), follow_symlinks=False)


if __name__ == "__main__":
    main(sys.argv[1:], sys.stdin.buffer)
