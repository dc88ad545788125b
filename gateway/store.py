"""What the gateway keeps, in one database: SQLite in a file of its own, or what `DATABASE_URL` names.

Modules declare their tables on `metadata` and do their work as functions of a connection. Reads run in a few
threads beside each other. Writes run one after the other in one thread, many in one transaction: what waits
while one commit is on its way shares the next.

A write is alone in the database, on PostgreSQL among all gateways too (docs/decisions/0020-one-writer.md):
what it has read is so until it commits. A read sees one moment.
"""

from __future__ import annotations

import asyncio
import queue
import re
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    DateTime,
    Engine,
    MetaData,
    String,
    Table,
    select,
    text,
)
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    InternalError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)

from gateway.database import READS, StoreUnusable, connect, make_tables, parsed, reason

metadata = MetaData()
"""Every table, each declared by the module that owns it."""

READERS = 4
WRITES_MAX = 256
"""How many writes share a transaction at most: the first of them waits for the last."""

PATIENCE_S = 15.0
"""How long whoever asks waits for a database that does not answer."""
AGAIN_S = 0.25
_WRITERS = Table(
    "writers",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
)
"""The last transaction of each store that several share: who does not hear of a commit finds it here."""
_SIGN = text(
    "INSERT INTO writers (id, number, at) "
    "SELECT :id, :number, now() WHERE pg_current_xact_id_if_assigned() IS NOT NULL "  # if it has written
    "ON CONFLICT (id) DO UPDATE SET number = excluded.number, at = excluded.at"
)
_SWEEP = text("DELETE FROM writers WHERE at < now() - interval '1 day'")

_UNHELD = re.compile(r"[\0\ud800-\udfff]")

_Result = TypeVar("_Result")
_Work = Callable[[Connection], Any]
_Asked = tuple[_Work, Future[Any]]


class StoreAway(SQLAlchemyError):
    """The database does not answer. Nothing was done."""


class OutcomeUnknown(StoreAway):
    """The database does not answer, and may have done what it was asked for."""


AWAY = (OperationalError, InterfaceError, InternalError, ProgrammingError, StoreAway)
"""What is raised while there is no database, or one that can't be written, or lacks a table: SQLite has one
error for these, PostgreSQL a class for each. It may be there the next time."""


def holds(text: str) -> bool:
    """Whether a row can have that `text`: PostgreSQL's have no zero, and half a surrogate is in no UTF-8."""
    return _UNHELD.search(text) is None


class Store:
    """An open database. `read` and `write` take a function of a connection and return what it returns.

    `shared`: other gateways may have it open too.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._id = secrets.token_hex(8)
        self._number = 0
        self.shared = engine.dialect.name == "postgresql"
        self._readers = ThreadPoolExecutor(READERS, "store-reader")
        self._writes: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._writer = threading.Thread(target=self._write_all, name="store-writer", daemon=True)
        self._writer.start()

    @classmethod
    def open(cls, url: str, *, made: bool = True) -> Self:
        """Open the database at `url`, an SQLAlchemy URL, and make the tables and columns that it lacks.

        A file of SQLite is `made` for its owner alone, or has to be there. Raises `StoreUnusable`, which
        shows no password.
        """
        at = parsed(url)
        if not made and at.get_backend_name() == "sqlite" and at.database and not Path(at.database).exists():
            raise StoreUnusable(f"nothing is kept in {at.database}, there is no such file; see DATA_DIR")
        try:
            engine = connect(at, READERS + 1)  # and the one that writes
            try:
                with engine.begin() as connection:
                    make_tables(connection, metadata)
                    if at.get_backend_name() == "postgresql":
                        connection.execute(_SWEEP)
            except BaseException:
                engine.dispose()
                raise
        except ModuleNotFoundError as error:
            raise StoreUnusable(f"{error.name} is missing: pip install 'firsttoken[postgres]'") from None
        except (SQLAlchemyError, OSError, ImportError) as error:
            why = reason(error)
            if at.password:
                why = why.replace(str(at.password), "***")
            raise StoreUnusable(f"the gateway's database can't be opened: {why}") from None
        return cls(engine)

    async def read(self, work: Callable[[Connection], _Result]) -> _Result:
        """Run `work` in a thread, on what is committed by now. Raises `StoreAway` if that takes too long."""

        def run() -> _Result:
            return self.read_now(work)

        reading = asyncio.get_running_loop().run_in_executor(self._readers, run)
        reading.add_done_callback(_heard)
        await asyncio.wait({reading}, timeout=PATIENCE_S if self.shared else None)
        if not reading.done():
            raise StoreAway(f"the database has not answered for {PATIENCE_S:g} s")
        return reading.result()

    async def write(self, work: Callable[[Connection], _Result], *, insist: bool = False) -> _Result:
        """Run `work` in its turn; committed once this returns.

        `work` is not cancelled with its caller: once asked for, it is done. One that raises has changed
        nothing, and takes no other with it. A database that does not answer is waited for: with `insist`
        until it is known whether `work` was done, else for `PATIENCE_S`; then that is `OutcomeUnknown`.
        """
        done = self.begin_write(work)
        writing = asyncio.wrap_future(done)
        writing.add_done_callback(_heard)
        await asyncio.wait({writing}, timeout=PATIENCE_S if self.shared and not insist else None)
        if writing.done():
            return writing.result()
        if done.cancel():
            raise StoreAway(f"the database has not answered for {PATIENCE_S:g} s")
        raise OutcomeUnknown("the database does not answer; whether it was done is not known")

    def begin_write(self, work: Callable[[Connection], _Result]) -> Future[_Result]:
        """Ask for a `write` and wait for nothing; what is done once it is, is done in another thread."""
        done: Future[_Result] = Future()
        self._writes.put((work, done))
        return done

    def read_now(self, work: Callable[[Connection], _Result]) -> _Result:
        """`read` for a command line."""
        with self._engine.connect().execution_options(**READS) as connection:
            if self.shared:
                connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            return work(connection)

    def write_now(self, work: Callable[[Connection], _Result]) -> _Result:
        """`write` for a command line."""
        return self.begin_write(work).result()

    def session(self) -> Connection:
        """A connection of its own, to be closed; each statement is a transaction. For locks that end with it.

        Raises `SQLAlchemyError`.
        """
        connection = self._engine.connect().execution_options(**READS, isolation_level="AUTOCOMMIT")
        connection.detach()
        return connection

    def give_up(self) -> None:
        """Wait no longer for a database that is away: who insists hears that it is."""
        self._closing.set()

    def close(self) -> None:
        """Do every write that was asked for, then let go of the database."""
        self._closing.set()
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
            self._commit([one for one in batch if one[1].set_running_or_notify_cancel()])

    def _commit(self, batch: list[_Asked]) -> None:
        outcomes: list[tuple[Future[Any], Any, BaseException | None]] = []
        signed = False
        self._number += 1
        try:
            with self._engine.begin() as connection:
                for work, done in batch:
                    try:
                        with connection.begin_nested():
                            outcomes.append((done, work(connection), None))
                    except Exception as error:
                        if connection.invalidated:
                            raise
                        outcomes.append((done, None, error))
                if self.shared:
                    signed = connection.execute(_SIGN, {"id": self._id, "number": self._number}).rowcount > 0
        except Exception as error:  # noqa: BLE001 - of the whole transaction
            if (failure := self._outcome(error, asked=signed)) is not None:
                outcomes = [(done, None, failure) for _, done in batch]
        for done, result, raised in outcomes:
            if raised is None:
                done.set_result(result)
            else:
                done.set_exception(raised)

    def _outcome(self, error: Exception, *, asked: bool) -> Exception | None:
        """What `error` of a transaction means: None if it was done; `asked` for its commit it may be."""
        try:
            if asked and self._committed():
                return None
        except OutcomeUnknown as unknown:
            return unknown
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            return StoreAway(f"the connection to the database is lost: {reason(error)}")
        return error

    def _committed(self) -> bool:
        """Whether the server has committed the last transaction, of whose commit it did not tell.

        Asks until there is an answer; who wants to write meanwhile is refused. Raises `OutcomeUnknown` if
        there is none by the end.
        """
        mine = select(_WRITERS.c.number).where(_WRITERS.c.id == self._id)
        while True:
            try:
                with self._engine.begin() as connection:  # alone: that one is over
                    return bool(connection.scalar(mine) == self._number)
            except SQLAlchemyError:
                self._refuse_all()
            if self._closing.wait(AGAIN_S):
                raise OutcomeUnknown("the database does not answer; whether it was done is not known")

    def _refuse_all(self) -> None:
        """Refuse what waits to be written."""
        last = False
        with suppress(queue.Empty):
            while True:
                if (item := self._writes.get_nowait()) is None:
                    last = True
                elif item[1].set_running_or_notify_cancel():
                    item[1].set_exception(StoreAway("the database does not answer"))
        if last:
            self._writes.put(None)


def _heard(done: asyncio.Future[Any]) -> None:
    """Whoever asked may have left: what became of it is nobody's loss then."""
    if not done.cancelled():
        done.exception()
