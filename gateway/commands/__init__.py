"""The commands beside `serve`, one file each: `add(subparsers)` gives it its arguments and its `run`.

`run(args, environ)` returns the exit code. It prints its answer on stdout and all else on stderr, and raises
`StartError`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gateway.settings import KeptSettings
from gateway.store import Store

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - it has no other name


@contextmanager
def kept(environ: Mapping[str, str]) -> Iterator[Store]:
    """The gateway's database, for a command that works beside it. Raises `StartError`."""
    store = Store.open(KeptSettings.from_environ(environ).database_url)
    try:
        yield store
    finally:
        store.close()
