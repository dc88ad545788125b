"""What is left of keys' limits, told among the gateways that share a database.

Nothing that a client asks waits for it: buckets are in memory (`gateway.accounts.limits`). Once a second, and
sooner once more was taken than flows in, a gateway adds what was taken from its buckets to a row for each,
and reads the rows of all. Who has nothing to add only reads. A row outlives its gateways, so that a new one
finds buckets as they are, and is gone a minute after its bucket is full. While the database is away each
gateway counts by itself, and tells it afterwards.

Times in rows are the database's; what is computed with them are differences, so that clocks of machines may
say what they like.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Self

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Float,
    String,
    Table,
    delete,
    select,
    text,
)
from sqlalchemy.exc import SQLAlchemyError

from gateway.accounts.limits import MINUTE_S, TELL_S, Bucket, BucketId, Level, Limits
from gateway.database import reason
from gateway.store import Store, metadata

log = logging.getLogger("gateway")

REST_S = 0.05
"""Who is in a hurry tells again after so long, or as long as the last time has taken if that is longer."""
KEPT_S = MINUTE_S
"""How long a row of a full bucket is kept, for those who have not heard of what was taken."""

TABLE = Table(
    "key_levels",
    metadata,
    Column("key_id", String(32), primary_key=True),
    Column("what", String(8), primary_key=True),
    Column("since", Float(53), nullable=False),
    Column("taken", BigInteger, nullable=False),
    Column("full_at", Float(53), nullable=False),
)
_COLUMNS = tuple(column.name for column in TABLE.columns)
_NOW = text("SELECT extract(epoch FROM clock_timestamp())::float8")
_PUT = text(
    # One statement, however many: to send a row by itself takes longer than to write it.
    f"INSERT INTO {TABLE.name} ({', '.join(_COLUMNS)}) "  # noqa: S608 - names of ours
    "SELECT * FROM unnest(CAST(:key_id AS text[]), CAST(:what AS text[]), CAST(:since AS float8[]), "
    "CAST(:taken AS bigint[]), CAST(:full_at AS float8[])) "
    "ON CONFLICT (key_id, what) DO UPDATE "
    "SET since = excluded.since, taken = excluded.taken, full_at = excluded.full_at"
)


class Levels:
    """Tells of `limits`, and has them hear, while it is open (`async with`).

    A store that no others share is left alone.
    """

    def __init__(self, store: Store, limits: Limits) -> None:
        self._store = store
        self._limits = limits
        self._hurried, self._ending = asyncio.Event(), asyncio.Event()
        self._telling: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._store.shared:
            await self.exchange()
            self._limits.hurry = self._hurried.set
            self._telling = asyncio.create_task(self._tell_always())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._telling is not None:
            self._ending.set()
            self._hurried.set()
            await self._telling

    async def exchange(self) -> None:
        """Tell what was taken here, and hear what was elsewhere. If it fails, that is told the next time."""
        taken = self._limits.untold()
        told = {name: bucket.untold for name, bucket in taken.items()}
        work = partial(_exchange, taken=taken, clock=self._limits.clock)
        if taken:  # however long it takes: who does not know whether it was done can't count on
            levels = await asyncio.wrap_future(self._store.begin_write(work))
        else:
            levels = await self._store.read(work)
        self._limits.hear(levels, told)

    async def _tell_always(self) -> None:
        while not self._ending.is_set():
            rest_s = await self._try_exchange()
            await _heard_within(self._ending, rest_s)
            await _heard_within(self._hurried, TELL_S - rest_s)
            self._hurried.clear()
        await self._try_exchange()

    async def _try_exchange(self) -> float:
        """Returns how long to rest, whoever is in a hurry."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            await self.exchange()
        except SQLAlchemyError as error:
            log.warning("limits could not be told or heard", extra={"reason": reason(error)})
            return TELL_S
        return min(TELL_S, max(REST_S, loop.time() - began_s))


async def _heard_within(event: asyncio.Event, timeout_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


def _exchange(
    connection: Connection, taken: Mapping[BucketId, Bucket], clock: Callable[[], float]
) -> dict[BucketId, Level]:
    """The levels of all, by `clock`, with what was `taken` added."""
    # What is not known of the time on the way makes levels lower: what is too high would be told to all.
    before_s = clock()
    database_s = float(connection.execute(_NOW).scalar_one())
    after_s = clock()
    levels = {
        (key_id, what): Level(since_s, taken_by_all, full_at - database_s + after_s)
        for key_id, what, since_s, taken_by_all, full_at in connection.execute(select(TABLE))
    }
    if taken:
        rows = []
        for name, bucket in taken.items():
            levels[name] = level = bucket.tell(levels.get(name), after_s, database_s)
            rows.append((*name, level.since_s, level.taken, level.full_s - before_s + database_s))
        connection.execute(_PUT, dict(zip(_COLUMNS, map(list, zip(*rows, strict=True)), strict=True)))
        connection.execute(delete(TABLE).where(TABLE.c.full_at < database_s - KEPT_S))
    return levels
