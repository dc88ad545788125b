"""What pyproject.toml wants, a line each, for the Dockerfile; the standard library only.

    python requirements.py EXTRA... < pyproject.toml

A stage of its own writes this down: another line of pyproject.toml, or of the code, installs nothing again.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

ALONE = ["fetch"]
"""An extra that needs none of the plain dependencies."""


def requirements(pyproject: BinaryIO, extras: Sequence[str]) -> Iterator[str]:
    """What an installation with `extras` needs. Raises `KeyError` for an extra that is none."""
    project = tomllib.load(pyproject)["project"]
    if list(extras) != ALONE:
        yield from project["dependencies"]
    for extra in extras:
        yield from project["optional-dependencies"][extra]


if __name__ == "__main__":
    print(*requirements(sys.stdin.buffer, sys.argv[1:]), sep="\n")
