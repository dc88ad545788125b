"""Opens the gateway's database, in which a write is alone: SQLite or PostgreSQL.

A transaction that only reads says so (`READS`); every other one waits for its turn as it begins, on
PostgreSQL among all gateways (docs/decisions/0020-one-writer.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, MetaData, create_engine, event, inspect, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.schema import CreateColumn

from handler.errors import StartError

BUSY_TIMEOUT_S = 30.0
"""How long a write waits for another process's, of a command line say."""

CONNECT_TIMEOUT_S = 5
DEAD_AFTER_S = 10
"""A connection over which nothing comes back for so long is given up."""
STALL_MAX_S = 5
"""A gateway that stops within a transaction, in which it is alone, has so long until the server ends it."""
_WRITER = 0x66_74_6F_6B
"""The advisory lock of whoever writes."""

READS = {"firsttoken_reads": True}
"""The execution options of a connection that does not write."""


class StoreUnusable(StartError):
    """The database can't be opened, or holds what this version does not know."""

    exit_code = 74


def reason(error: BaseException) -> str:
    """What a person needs of an error of the database's: its first line, without SQL and SQLAlchemy's links.

    What follows is the statement, or that the same was tried at each address of a host.
    """
    if isinstance(error, SQLAlchemyError):
        error = getattr(error, "orig", None) or error
        said = str(error.args[0]) if isinstance(error, SQLAlchemyError) and error.args else str(error)
    else:
        said = str(error)
    return said.strip().partition("\n")[0].rstrip() or type(error).__name__


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


def connect(url: URL, connections: int) -> Engine:
    """An engine for the database at `url`, with up to `connections` of PostgreSQL's at a time.

    A file of SQLite is made for its owner alone.
    """
    return _sqlite(url) if url.get_backend_name() == "sqlite" else _postgresql(url, connections)


def make_tables(connection: Connection, metadata: MetaData) -> None:
    """Make what the database lacks of the tables of `metadata`, columns too.

    Raises `StoreUnusable` for a column that rows without it can't be given.
    """
    metadata.create_all(connection)
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


def _postgresql(url: URL, connections: int) -> Engine:
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
        pool_size=connections,
        max_overflow=0,
        pool_pre_ping=True,  # what was lost while nobody used it is found here
        hide_parameters=True,  # what people asked belongs in no log
        connect_args={name: value for name, value in given.items() if name not in url.query},
    )

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        if not connection.get_execution_options().keys() & READS:
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
        reads = connection.get_execution_options().keys() & READS
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine
