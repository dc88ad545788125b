"""Counts what clients' requests use, once each, whatever is killed when.

An answer is counted in one transaction, which is committed before its last bytes are passed on: of a stream
the frame by which clients know that it is whole. So who has all of an answer has been counted. Nothing else
waits for the database. While streams run, what each has made by now is written down once a second, all in one
write (`open_requests`); an answer's own transaction takes its row away. The rows of a gateway that was killed
are counted by another, once: a stream that was cut has cost its client what the last row says, less than a
second before, and a whole answer that was cut nothing. A gateway that was only taken for dead finds the row
counted, and counts what has come since.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Self

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Date,
    Row,
    String,
    Table,
    and_,
    bindparam,
    delete,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from gateway.accounts.keys import Key, Keys
from gateway.accounts.limits import Limits
from gateway.accounts.usage import Entry, Prices, add, kept_name, sums
from gateway.database import reason
from gateway.instances import dead
from gateway.store import Store, metadata
from handler.messages import Call, Request
from handler.usage import Meter, read_along

log = logging.getLogger("gateway")

CHECKPOINT_S = 1.0
SETTLE_MAX_S = 5.0
"""How long the end of an answer waits for a database that does not answer; it is counted all the same."""
COUNTED_KEPT = timedelta(days=2)
_COUNTED = ""
"""The instance of a row that is on its account already."""

_OPEN = Table(
    "open_requests",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("instance", String(32), nullable=False),
    Column("day", Date, nullable=False),
    Column("key_id", String(32), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("model", String(256), nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("cost_nano", BigInteger, nullable=False),
)
_CLOSE = delete(_OPEN).where(_OPEN.c.id == bindparam("open_id"))


@dataclass(eq=False, slots=True)
class _Open:
    """An answer on its way."""

    key: Key
    endpoint_id: str
    model_id: str
    prices: Prices
    meter: Meter = field(init=False)
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    kept: Entry | None = None
    """What the database was last told of it."""
    spent_tokens: int = 0
    """What its key's limit was told of it."""

    def entry(self) -> Entry | None:
        """What it has used by now, or None while nothing was answered."""
        usage = self.meter.usage()
        if not usage.whole and not usage.completion_tokens:
            return None
        tokens = (usage.prompt_tokens, usage.completion_tokens)
        model = usage.model or self.model_id
        return Entry(self.key.id, self.endpoint_id, model, *tokens, self.prices.cost_nano(*tokens))


class Metering:
    """The answers that are on their way, and what was counted of them.

    Open it (`async with`) before the first request: what a killed gateway left is counted then. `instance`
    is this gateway's id (`gateway.instances`). `tell` hears of each answer, once.
    """

    def __init__(
        self,
        store: Store,
        keys: Keys,
        limits: Limits,
        *,
        instance: str | None = None,
        tell: Callable[[Entry], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._keys = keys
        self._limits = limits
        self._tell = tell
        self._instance = instance or secrets.token_hex(8)
        self._open: set[_Open] = set()
        self._failed: deque[tuple[_Open, Entry]] = deque()
        self._turn = threading.Lock()
        self._next: list[tuple[_Open, Entry]] | None = None
        self._counting: Future[None]
        self._ticking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.adopt()
        self._ticking = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._ticking is not None
        self._ticking.cancel()
        await asyncio.wait({self._ticking})
        try:
            await self.checkpoint()
        except SQLAlchemyError as error:
            log.warning("usage could not be written down", extra={"reason": reason(error)})

    async def adopt(self) -> None:
        """Count what gateways have left that are gone."""
        work = partial(_adopt, instance=self._instance, keep=self._store.shared)
        await self._store.write(work)

    def metered(self, call: Call, *, endpoint_id: str, model_id: str, prices: Prices) -> Call:
        """`call`, whose answers are counted for the key that is `Visit.caller`.

        An answer that names no model is counted for `model_id`.
        """

        @contextmanager
        def meter(request: Request, hides: bool) -> Iterator[Meter]:
            one = _Open(self._keys.of(request.visit.caller), endpoint_id, model_id, prices)
            one.meter = Meter(hides=hides, settle=partial(self._settle, one))
            self._open.add(one)
            try:
                yield one.meter
            finally:
                self._close(one)

        return read_along(call, meter)

    async def checkpoint(self) -> None:
        """Write down what every stream has made by now, and what could not be counted before."""
        for _ in range(len(self._failed)):
            self._count(*self._failed.popleft())
        rows: list[dict[str, object]] = []
        today = datetime.now(UTC).date()
        for one in self._open:
            now = one.entry()
            if now is None or now == one.kept:
                continue
            self._spend(one, now)
            one.kept = now
            rows.append(
                {
                    "id": one.id,
                    "instance": self._instance,
                    "day": today,
                    "key_id": now.key_id,
                    "endpoint": now.endpoint_id,
                    "model": kept_name(now.model),
                    "prompt_tokens": now.prompt_tokens,
                    "completion_tokens": now.completion_tokens,
                    "cost_nano": now.cost_nano,
                }
            )
        if rows:
            with self._turn:
                self._next = None  # what ends from now on is counted after this, and takes its row away
            await self._store.write(partial(_keep, rows=rows))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(CHECKPOINT_S)
            try:
                await self.checkpoint()
            except SQLAlchemyError as error:
                log.warning("usage could not be written down", extra={"reason": reason(error)})

    async def _settle(self, one: _Open) -> None:
        """Count what is whole. An answer is not held up by a database that fails: it is tried again.

        Nor for long by one that somebody else has locked: the write has its turn after that.
        """
        if (counting := self._close(one)) is not None:
            over = asyncio.wrap_future(counting)
            over.add_done_callback(asyncio.Future.exception)  # heard by `_over`
            await asyncio.wait({over}, timeout=SETTLE_MAX_S)

    def _close(self, one: _Open) -> Future[None] | None:
        """Count it, if it was not and something was answered."""
        if one not in self._open:
            return None
        self._open.remove(one)
        if (entry := one.entry()) is None:
            return None
        self._tell(entry)
        self._spend(one, entry)
        return self._count(one, entry)

    def _count(self, one: _Open, entry: Entry) -> Future[None]:
        """Put it on its account, in one write with all that ends until that write's turn has come."""
        with self._turn:
            if self._next is None:
                self._next = []
                self._counting = self._store.begin_write(partial(self._write, ended=self._next))
                self._counting.add_done_callback(partial(self._over, ended=self._next))
            self._next.append((one, entry))
            return self._counting

    def _write(self, connection: Connection, ended: Sequence[tuple[_Open, Entry]]) -> None:
        with self._turn:
            self._next = None  # who ends now has the next write
        kept = [one.id for one, _ in ended if one.kept]
        counted = _counted(connection, kept)
        if kept:
            connection.execute(_CLOSE, [{"open_id": open_id} for open_id in kept])
        for entry in sums(_less(entry, counted.get(one.id)) for one, entry in ended):
            add(connection, entry)

    def _over(self, done: Future[None], ended: list[tuple[_Open, Entry]]) -> None:
        if (error := done.exception()) is not None:
            with self._turn:
                if self._next is ended:  # it was not even begun
                    self._next = None
            log.error("usage could not be counted yet", extra={"reason": reason(error)})
            self._failed.extend(ended)

    def _spend(self, one: _Open, entry: Entry) -> None:
        tokens = entry.prompt_tokens + entry.completion_tokens
        self._limits.spend(one.key, tokens - one.spent_tokens)
        one.spent_tokens = tokens


def _keep(connection: Connection, rows: Sequence[dict[str, object]]) -> None:
    # Both ways at once: whether the row of a write that failed is there does not matter.
    counted = _counted(connection, [row["id"] for row in rows])
    if rows := [row for row in rows if row["id"] not in counted]:
        connection.execute(_CLOSE, [{"open_id": row["id"]} for row in rows])
        connection.execute(insert(_OPEN), rows)


def _counted(connection: Connection, ids: Sequence[object]) -> dict[str, Row[Any]]:
    """Those of `ids` that another gateway has counted, as it did."""
    if not ids:
        return {}
    counted = select(_OPEN).where(_OPEN.c.id.in_(ids), _OPEN.c.instance == _COUNTED)
    return {row.id: row for row in connection.execute(counted)}


def _less(entry: Entry, counted: Row[Any] | None) -> Entry:
    """What of `entry` is not on its account yet."""
    if counted is None:
        return entry
    return replace(
        entry,
        prompt_tokens=entry.prompt_tokens - counted.prompt_tokens,
        completion_tokens=entry.completion_tokens - counted.completion_tokens,
        cost_nano=entry.cost_nano - counted.cost_nano,
        requests=0,
    )


def _adopt(connection: Connection, instance: str, *, keep: bool) -> None:
    """Count what gateways have left that are gone. With `keep` one of them may come back, and finds it so."""
    left = and_(_OPEN.c.instance.not_in((_COUNTED, instance)), dead(_OPEN.c.instance))
    rows = connection.execute(select(_OPEN).where(left)).all()
    for row in rows:
        tokens = (row.prompt_tokens, row.completion_tokens)
        add(connection, Entry(row.key_id, row.endpoint, row.model, *tokens, row.cost_nano), row.day)
    if rows and keep:
        connection.execute(update(_OPEN).where(left).values(instance=_COUNTED))
    over = and_(_OPEN.c.instance == _COUNTED, _OPEN.c.day < datetime.now(UTC).date() - COUNTED_KEPT)
    connection.execute(delete(_OPEN).where(over if keep else or_(over, left)))
