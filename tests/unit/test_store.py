"""The gateway's database: what is written is kept, what fails is not, and nobody waits for nothing."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import pytest
from sqlalchemy import Column, Connection, Integer, Table, insert, select
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from gateway.database import StoreUnusable, reason
from gateway.store import Store, StoreAway, metadata

NUMBERS = Table("test_numbers", metadata, Column("number", Integer, primary_key=True))


def put(number: int, connection: Connection) -> int:
    """Write `number` down."""
    connection.execute(insert(NUMBERS).values(number=number))
    return number


def numbers(connection: Connection) -> list[int]:
    """What is written."""
    return list(connection.scalars(select(NUMBERS.c.number).order_by(NUMBERS.c.number)))


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """An open one."""
    store = Store.open(database_url)
    yield store
    store.close()


async def test_what_is_written_is_read(store: Store) -> None:
    """By whoever asks after the write returned."""
    assert await store.write(lambda connection: put(7, connection)) == 7
    assert await store.read(numbers) == [7]
    assert store.read_now(numbers) == [7]


async def test_a_write_that_fails_takes_no_other_with_it(store: Store) -> None:
    """They may share a transaction."""
    outcomes = await asyncio.gather(
        *(store.write(lambda connection, n=n: put(n, connection)) for n in [1, 2, 2, 3]),  # type: ignore[misc]
        return_exceptions=True,
    )
    assert [outcome for outcome in outcomes if isinstance(outcome, int)] == [1, 2, 3]
    assert isinstance(outcomes[2], IntegrityError)
    assert await store.read(numbers) == [1, 2, 3]


async def test_of_an_error_a_person_gets_the_databases_own_words(store: Store) -> None:
    """Neither SQL nor a link to SQLAlchemy's pages, of which nobody who runs a gateway has any use."""
    await store.write(lambda connection: put(7, connection))
    with pytest.raises(IntegrityError) as caught:
        await store.write(lambda connection: put(7, connection))
    assert "sqlalche.me" in str(caught.value)
    said = reason(caught.value)
    assert said in {
        "UNIQUE constraint failed: test_numbers.number",
        'duplicate key value violates unique constraint "test_numbers_pkey"',
    }


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PoolTimeout("QueuePool limit reached", code="3o7r"), "QueuePool limit reached"),
        (StoreAway("the database does not answer"), "the database does not answer"),
        (PermissionError(13, "Permission denied"), "[Errno 13] Permission denied"),
        (OperationalError("SELECT 1", {}, Exception("refused\n\tIs it running?")), "refused"),
        (OperationalError("SELECT 1", {}, ValueError()), "ValueError"),
    ],
)
def test_a_reason_is_one_line(error: Exception, said: str) -> None:
    """Whatever has raised it."""
    assert reason(error) == said


async def test_a_write_is_done_though_its_caller_was_cancelled(store: Store) -> None:
    """Once asked for it is done, so that nobody has to guess."""
    writing = asyncio.create_task(store.write(lambda connection: put(1, connection)))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    await store.write(lambda connection: put(2, connection))
    assert await store.read(numbers) == [1, 2]


async def test_closing_does_what_was_asked_for(database_url: str) -> None:
    """And another process finds it."""
    store = Store.open(database_url)
    writes = [asyncio.ensure_future(store.write(lambda c, n=n: put(n, c))) for n in range(300)]  # type: ignore[misc]
    await asyncio.sleep(0)
    store.close()
    await asyncio.gather(*writes)
    again = Store.open(database_url)
    assert again.read_now(numbers) == list(range(300))
    again.close()


def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    """Keys are hashed in it, but what people asked is not; its folder need not be there."""
    store = Store.open(f"sqlite:///{tmp_path}/data/gateway.db")
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
    for file in (tmp_path / "data").iterdir():
        assert file.stat().st_mode & 0o077 == 0, file
    assert store.read_now(numbers) == []
    store.close()


def test_a_database_that_cant_be_opened_is_said_in_words(tmp_path: Path) -> None:
    """No traceback for a wrong path."""
    (tmp_path / "file").write_text("not a database, but long enough to be taken for one" * 100)
    with pytest.raises(StoreUnusable, match="can't be opened"):
        Store.open(f"sqlite:///{tmp_path}/file")
    with pytest.raises(StoreUnusable, match="can't be opened"):
        Store.open(f"sqlite:///{tmp_path}/file/below/it.db")


def _write_and_tell(url: str, told: Pipe) -> None:
    store = Store.open(url)
    for number in range(1_000_000):
        store.write_now(lambda connection, n=number: put(n, connection))  # type: ignore[misc]
        told.send(number)


def test_what_was_answered_for_survives_a_kill(database_url: str) -> None:
    """`kill -9` between any two writes loses none that had returned."""
    heard, told = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_write_and_tell, args=(database_url, told))
    process.start()
    told.close()
    while heard.recv() < 50:
        pass
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    last = 50
    try:
        while True:
            last = heard.recv()
    except EOFError:
        pass
    store = Store.open(database_url)
    kept = store.read_now(numbers)
    store.close()
    assert kept[: last + 1] == list(range(last + 1))
    assert len(kept) <= last + 2
