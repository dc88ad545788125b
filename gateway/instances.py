"""The gateways that share a database, each alive as long as it says so.

A gateway renews its lease every `BEAT_S`; one whose lease has run out, by the database's clock, is taken off
the list by another, and what bears its id is then anybody's (`dead`). With SQLite there is one gateway
(`gateway.alone`): what others have left is its own at once.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Self

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Float,
    String,
    Table,
    delete,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction

from gateway.store import Store, metadata

log = logging.getLogger("gateway")

LEASE_S = 15.0
"""How long after its last word a gateway is taken for dead: longer than one that stalls can keep the others
from saying theirs (`gateway.database.STALL_MAX_S`)."""
BEAT_S = 3.0

INSTANCES = Table(
    "instances",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("lease_until", Float(53), nullable=False),  # Unix seconds of the database's clock
)


class _now(GenericFunction[float]):  # noqa: N801 - SQL's functions are in lower case
    """Unix seconds, by the clock of the database."""

    type = Float(53)
    inherit_cache = True


@compiles(_now, "sqlite")
def _(*_: Any, **__: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(_now, "postgresql")
def _(*_: Any, **__: Any) -> str:
    return "extract(epoch from clock_timestamp())"


def dead(instance: Column[Any]) -> ColumnElement[bool]:
    """Whether nobody who lives has what bears this id."""
    return or_(instance.is_(None), instance.not_in(select(INSTANCES.c.id)))


Adopt = Callable[[], Awaitable[None]]


class Instance:
    """This gateway among those that share `store`. Used as `async with`, around all that bears its `id`.

    Each of `adopters` is called after every beat: whoever took a gateway off the list may have died of it.
    """

    def __init__(self, store: Store) -> None:
        self.id = secrets.token_hex(8)
        self.adopters: list[Adopt] = []
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._steady_since_s = 0.0
        self._beating: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._store.write(self._enter)
        self._steady_since_s = self._loop.time()
        if self._store.shared:
            self._beating = asyncio.create_task(self._beat_always())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait({self._beating})
        try:
            await self._store.write(lambda connection: _remove(connection, INSTANCES.c.id == self.id))
        except SQLAlchemyError:
            log.warning("the database does not answer; this gateway's lease ends by itself")

    async def beat(self) -> None:
        """Renew the lease, and see who has not."""
        beginning_s = self._loop.time()
        if not await self._store.write(self._renew):
            self._steady_since_s = beginning_s
        # After an outage of the database every lease has run out: who lives has one lease's time to say so.
        if beginning_s - self._steady_since_s < LEASE_S:
            return
        gone = await self._store.write(
            lambda connection: _remove(connection, INSTANCES.c.lease_until < _now())
        )
        if gone:
            log.warning("gateways are gone; what they had is taken over", extra={"gateways": gone})
        for adopt in self.adopters:
            await adopt()

    async def _beat_always(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await self.beat()
            except SQLAlchemyError as error:
                log.warning("the gateway's lease could not be renewed", extra={"reason": str(error)})

    def _enter(self, connection: Connection) -> None:
        if not self._store.shared:
            connection.execute(delete(INSTANCES))
        connection.execute(insert(INSTANCES).values(id=self.id, lease_until=_now() + LEASE_S))

    def _renew(self, connection: Connection) -> bool:
        """Whether the lease still ran."""
        mine = INSTANCES.c.id == self.id
        before = connection.scalar(select(INSTANCES.c.lease_until >= _now()).where(mine))
        if before is None:  # others took this gateway for dead: what it had is theirs
            connection.execute(insert(INSTANCES).values(id=self.id, lease_until=_now() + LEASE_S))
        else:
            connection.execute(update(INSTANCES).where(mine).values(lease_until=_now() + LEASE_S))
        return bool(before)


def _remove(connection: Connection, where: ColumnElement[bool]) -> list[str]:
    return list(connection.scalars(delete(INSTANCES).where(where).returning(INSTANCES.c.id)))
