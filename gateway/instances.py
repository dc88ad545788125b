"""The gateways that share a database, each alive as long as it says so.

A gateway renews its lease every `BEAT_S`; one whose lease has run out, by the database's clock, is taken off
the list by another, and what bears its id is then anybody's (`dead`). One whose process is over is taken off
as soon as that is sure (`gateway.presence`): leases are for machines that are gone, and for processes that
stand still. With SQLite there is one gateway (`gateway.alone`): what others have left is its own at once.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from functools import partial
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

from gateway import presence
from gateway.database import reason
from gateway.presence import Held, Presence
from gateway.store import Store, metadata

log = logging.getLogger("gateway")

LEASE_S = 15.0
"""How long after its last word a gateway is taken for dead: longer than one that stalls can keep the others
from saying theirs (`gateway.database.STALL_MAX_S`)."""
BEAT_S = 1.0
QUIET_S = 3.0
"""How long a gateway whose lock is free has said nothing that is taken for dead: some beats."""

INSTANCES = Table(
    "instances",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("lease_until", Float(53), nullable=False),  # Unix seconds of the database's clock
    Column("server", Float(53)),  # at which it holds its lock (`gateway.presence.Held`)
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
        self._presence = Presence(store, self.id)
        self._holding: asyncio.Future[Held | None] | None = None
        self._steady_since_s = 0.0
        self._beating: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        held = await self._hold() if self._store.shared else None
        await self._store.write(partial(self._enter, held=held))
        self._steady_since_s = time.monotonic()
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
        if self._holding is not None:
            await asyncio.wait({self._holding})
            await asyncio.to_thread(self._presence.close)

    async def beat(self) -> None:
        """Renew the lease, see who is gone, and take over what they have left."""
        held = await self._hold()
        beginning_s = time.monotonic()
        # After an outage of the database every lease has run out: who lives has one lease's time to say so.
        steady = beginning_s - self._steady_since_s >= LEASE_S
        beat = partial(self._beat, held=held, beginning_s=beginning_s, steady=steady)
        lived, gone = await self._store.write(beat)
        if not lived:
            self._steady_since_s = beginning_s
        if gone:
            log.warning("gateways are gone; what they had is taken over", extra={"gateways": gone})
        for adopt in self.adopters:
            await adopt()

    async def _hold(self) -> Held | None:
        """This gateway's lock. A session that does not answer keeps nobody from saying that it lives."""
        if self._holding is None or self._holding.done():
            self._holding = self._loop.run_in_executor(None, self._presence.hold)
        await asyncio.wait({self._holding}, timeout=BEAT_S)
        return self._holding.result() if self._holding.done() else None

    async def _beat_always(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await self.beat()
            except SQLAlchemyError as error:
                log.warning("the gateway's lease could not be renewed", extra={"reason": reason(error)})

    def _enter(self, connection: Connection, held: Held | None) -> None:
        if not self._store.shared:
            connection.execute(delete(INSTANCES))
        connection.execute(insert(INSTANCES).values(self._row(held)))

    def _beat(
        self, connection: Connection, held: Held | None, *, beginning_s: float, steady: bool
    ) -> tuple[bool, list[str]]:
        """Whether the lease still ran, and who is gone."""
        now_s = time.monotonic()
        mine = INSTANCES.c.id == self.id
        before = connection.scalar(select(INSTANCES.c.lease_until >= _now()).where(mine))
        if before is None:  # others took this gateway for dead: what it had is theirs
            connection.execute(insert(INSTANCES).values(self._row(held)))
        else:
            connection.execute(update(INSTANCES).where(mine).values(self._row(held)))
        gone: list[str] = []
        # A write that had to wait for its connection may come after an outage that the lock was taken before.
        if held is not None and now_s - held.since_s >= QUIET_S and now_s - beginning_s < BEAT_S:
            silent = select(INSTANCES.c.id).where(
                INSTANCES.c.server == held.server, INSTANCES.c.lease_until < _now() + (LEASE_S - QUIET_S)
            )
            ended = presence.ended(connection, connection.scalars(silent).all())
            gone += _remove(connection, INSTANCES.c.id.in_(ended))
        if before and steady:
            gone += _remove(connection, INSTANCES.c.lease_until < _now())
        return bool(before), gone

    def _row(self, held: Held | None) -> dict[str, Any]:
        server = None if held is None else held.server
        return {"id": self.id, "lease_until": _now() + LEASE_S, "server": server}


def _remove(connection: Connection, where: ColumnElement[bool]) -> list[str]:
    return list(connection.scalars(delete(INSTANCES).where(where).returning(INSTANCES.c.id)))
