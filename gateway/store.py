"""What the gateway keeps, in one database: SQLite in a file of its own, or what `DATABASE_URL` names.

Modules declare their tables on `metadata` and do their work as functions of a connection. Reads run in a few
threads beside each other. Writes run one after the other in one thread, many in one transaction: what waits
while one commit is on its way shares the next.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from sqlalchemy import Connection, Engine, MetaData, create_engine, event
from sqlalchemy.exc import SQLAlchemyError

from handler.errors import StartError

metadata = MetaData()
"""Every table, each declared by the module that owns it."""

READERS = 4
WRITES_MAX = 256
"""How many writes share a transaction at most: the first of them waits for the last."""
BUSY_TIMEOUT_S = 30.0
"""How long a write waits for another process's, of a command line say."""

_READS = {"firsttoken_reads": True}
_Result = TypeVar("_Result")
_Work = Callable[[Connection], Any]


class StoreUnusable(StartError):
    """The database can't be opened, or holds what this version does not know."""

    exit_code = 74


class Store:
    """An open database. `read` and `write` take a function of a connection and return what it returns."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._readers = ThreadPoolExecutor(READERS, "store-reader")
        self._writes: queue.SimpleQueue[tuple[_Work, Future[Any]] | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, name="store-writer", daemon=True)
        self._writer.start()

    @classmethod
    def open(cls, url: str) -> Self:
        """Open the database at `url`, an SQLAlchemy URL, and make the tables that it lacks.

        A file of SQLite is made for its owner alone. Raises `StoreUnusable`.
        """
        try:
            engine = _sqlite(url) if url.startswith("sqlite") else create_engine(url, pool_pre_ping=True)
            with engine.begin() as connection:
                metadata.create_all(connection)
        except (SQLAlchemyError, OSError, ImportError) as error:
            why = getattr(error, "orig", None) or error
            raise StoreUnusable(f"the gateway's database can't be opened: {why}") from None
        return cls(engine)

    async def read(self, work: Callable[[Connection], _Result]) -> _Result:
        """Run `work` in a thread, on what is committed by now."""

        def run() -> _Result:
            return self.read_now(work)

        return await asyncio.get_running_loop().run_in_executor(self._readers, run)

    async def write(self, work: Callable[[Connection], _Result]) -> _Result:
        """Run `work` in its turn; committed once this returns.

        `work` is not cancelled with its caller: once asked for, it is done. One that raises has changed
        nothing, and takes no other with it.
        """
        return await asyncio.shield(asyncio.wrap_future(self.begin_write(work)))

    def begin_write(self, work: Callable[[Connection], _Result]) -> Future[_Result]:
        """Ask for a `write` and wait for nothing; what is done once it is, is done in another thread."""
        done: Future[_Result] = Future()
        self._writes.put((work, done))
        return done

    def read_now(self, work: Callable[[Connection], _Result]) -> _Result:
        """`read` for a command line."""
        with self._engine.connect().execution_options(**_READS) as connection:
            return work(connection)

    def write_now(self, work: Callable[[Connection], _Result]) -> _Result:
        """`write` for a command line."""
        return self.begin_write(work).result()

    def close(self) -> None:
        """Do every write that was asked for, then let go of the database."""
        self._writes.put(None)
        self._writer.join()
        self._readers.shutdown()
        self._engine.dispose()

    def _write_all(self) -> None:
        while (item := self._writes.get()) is not None:
            batch = [item]
            with suppress(queue.Empty):
                while len(batch) < WRITES_MAX:
                    item = self._writes.get_nowait()
                    if item is None:
                        self._writes.put(None)  # seen again once these are done
                        break
                    batch.append(item)
            self._commit(batch)

    def _commit(self, batch: list[tuple[_Work, Future[Any]]]) -> None:
        outcomes: list[tuple[Future[Any], Any, BaseException | None]] = []
        try:
            with self._engine.begin() as connection:
                for work, done in batch:
                    try:
                        with connection.begin_nested():
                            outcomes.append((done, work(connection), None))
                    except Exception as error:  # noqa: BLE001 - told to whoever asked
                        outcomes.append((done, None, error))
        except Exception as error:  # noqa: BLE001 - of the whole transaction: nothing was done
            outcomes = [(done, None, error) for _, done in batch]
        for done, result, failure in outcomes:
            if failure is None:
                done.set_result(result)
            else:
                done.set_exception(failure)


def _sqlite(url: str) -> Engine:
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})
    if engine.url.database:
        path = Path(engine.url.database)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)

    @event.listens_for(engine, "connect")
    def _(connection: Any, _: object) -> None:
        connection.isolation_level = None  # Python's driver would begin transactions in its own way
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")  # outlives any process, if not the power
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        reads = connection.get_execution_options().keys() & _READS
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine
