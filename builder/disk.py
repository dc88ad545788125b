"""Room on the disk: asked for before the work, and named where it ends during it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from builder.console import size
from handler.errors import NoResources

FULL = (errno.ENOSPC, errno.EDQUOT)


def need(folder: Path, wanted_bytes: int) -> None:
    """Raise `NoResources` unless the disk that has `folder` has room for `wanted_bytes` more."""
    free_bytes = shutil.disk_usage(folder).free
    if wanted_bytes > free_bytes:
        raise NoResources(
            f"{folder.parent} has {size(free_bytes)} free and the model needs {size(wanted_bytes)}"
        )


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Raise `NoResources` where the disk that has `folder` is full before the block is done."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise NoResources(f"the disk is full that has {folder.parent}") from error
