"""The commands beside `serve`, one file each: `add(subparsers)` gives it its arguments and its `run`.

What they share: `client` asks a running gateway, `tables` is what a terminal shows, and `chat` talks as
`conversation` and `terminal` have it.

`run(args, environ)` returns the exit code. It prints its answer on stdout and all else on stderr, and raises
`StartError`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gateway import data_folder
from gateway.settings import KeptSettings

if TYPE_CHECKING:
    from gateway.store import Store

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 - it has no other name


INTERRUPTED = 130
"""What shells say of a command that Ctrl-C has ended."""


@contextmanager
def kept(environ: Mapping[str, str], *, made: bool = True) -> Iterator[Store]:
    """The gateway's database, for a command that works beside it; not `made`, it has to be there already.

    Raises `StartError`, in the block too.
    """
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415 - which half of the commands do without

    from gateway.database import StoreUnusable, reason  # noqa: PLC0415 - as above
    from gateway.store import Store  # noqa: PLC0415 - as above

    settings = KeptSettings.from_environ(environ)
    data_folder.check(settings.data_dir, serves=False)
    data_folder.check_database(settings.database_url, settings.data_dir, serves=False)
    store = Store.open(settings.database_url, made=made)
    try:
        yield store
    except SQLAlchemyError as error:
        raise StoreUnusable(f"the gateway's database can't be used: {reason(error)}") from None
    finally:
        store.close()
