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
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    Connection,
    DateTime,
    Engine,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.schema import CreateColumn

from handler.errors import StartError

metadata = MetaData()
"""Every table, each declared by the module that owns it."""

READERS = 4
WRITES_MAX = 256
"""How many writes share a transaction at most: the first of them waits for the last."""
BUSY_TIMEOUT_S = 30.0
"""How long a write waits for another process's, of a command line say."""

CONNECT_TIMEOUT_S = 5
DEAD_AFTER_S = 10
"""A connection over which nothing comes back for so long is given up."""
STALL_MAX_S = 5
"""A gateway that stops within a transaction, in which it is alone, has so long until the server ends it."""
PATIENCE_S = 15.0
"""How long whoever asks waits for a database that does not answer."""
AGAIN_S = 0.25
_WRITER = 0x66_74_6F_6B
"""The advisory lock of whoever writes."""
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

_READS = {"firsttoken_reads": True}
_Result = TypeVar("_Result")
_Work = Callable[[Connection], Any]
_Asked = tuple[_Work, Future[Any]]


class StoreUnusable(StartError):
    """The database can't be opened, or holds what this version does not know."""

    exit_code = 74


class StoreAway(SQLAlchemyError):
    """The database does not answer. Nothing was done."""


class OutcomeUnknown(StoreAway):
    """The database does not answer, and may have done what it was asked for."""


AWAY = (OperationalError, InterfaceError, StoreAway)
"""What is raised while there is no database; it may be there the next time."""


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
            engine = _sqlite(at) if at.get_backend_name() == "sqlite" else _postgresql(at)
            try:
                with engine.begin() as connection:
                    _make_tables(connection)
            except BaseException:
                engine.dispose()
                raise
        except ModuleNotFoundError as error:
            raise StoreUnusable(f"{error.name} is missing: pip install 'firsttoken[postgres]'") from None
        except (SQLAlchemyError, OSError, ImportError) as error:
            why = str(getattr(error, "orig", None) or error)
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
        with self._engine.connect().execution_options(**_READS) as connection:
            if self.shared:
                connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            return work(connection)

    def write_now(self, work: Callable[[Connection], _Result]) -> _Result:
        """`write` for a command line."""
        return self.begin_write(work).result()

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
            return StoreAway(f"the connection to the database is lost: {error.orig}")
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


def parsed(url: str) -> URL:
    """`url` with the driver that is used. Raises `StoreUnusable`, which shows nothing of it."""
    try:
        found = make_url(url)
        backend = found.get_backend_name()
    except (ArgumentError, ValueError):
        raise StoreUnusable("DATABASE_URL can't be understood") from None
    if backend in {"postgres", "postgresql"} and "+" not in found.drivername:
        return found.set(drivername="postgresql+psycopg")
    if backend not in {"sqlite", "postgresql"}:
        raise StoreUnusable(f"DATABASE_URL is for {backend}, and the gateway knows SQLite and PostgreSQL")
    return found


def _heard(done: asyncio.Future[Any]) -> None:
    """Whoever asked may have left: what became of it is nobody's loss then."""
    if not done.cancelled():
        done.exception()


def _make_tables(connection: Connection) -> None:
    metadata.create_all(connection)
    if connection.dialect.name == "postgresql":
        connection.execute(_SWEEP)
    found = inspect(connection).get_multi_columns()
    for table in metadata.sorted_tables:
        there = {column["name"] for column in found.get((None, table.name), ())}
        for column in table.columns:
            if column.name in there:
                continue
            if not column.nullable:
                raise StoreUnusable(f"the database is of another version: {table.name} has no {column.name}")
            made = CreateColumn(column).compile(dialect=connection.dialect)
            connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {made}")


def _postgresql(url: URL) -> Engine:
    given = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "keepalives_idle": DEAD_AFTER_S,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": DEAD_AFTER_S * 1000,
        "application_name": "firsttoken",
    }
    engine = create_engine(
        url,
        pool_size=READERS + 1,  # and the one that writes
        max_overflow=0,
        pool_pre_ping=True,  # what was lost while nobody used it is found here
        hide_parameters=True,  # what people asked belongs in no log
        connect_args={name: value for name, value in given.items() if name not in url.query},
    )

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        if not connection.get_execution_options().keys() & _READS:
            connection.exec_driver_sql(
                f"SELECT set_config('idle_in_transaction_session_timeout', '{STALL_MAX_S}s', true), "
                f"pg_advisory_xact_lock({_WRITER})"
            )

    return engine


def _sqlite(url: URL) -> Engine:
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S}, hide_parameters=True)
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
