"""Counts what clients' requests use, once each, whatever is killed when.

An answer is counted in one transaction, which is committed before its last bytes are passed on: of a stream
the frame by which clients know that it is whole. So who has all of an answer has been counted. Nothing else
waits for the database. While streams run, what each has made by now is written down once a second, all in one
write (`open_requests`); an answer's own transaction takes its row away. The rows of a gateway that was killed
are counted, and taken away, by the next one at its start: a stream that was cut has cost its client what the
last row says, less than a second before, and a whole answer that was cut nothing.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Self

from sqlalchemy import BigInteger, Column, Connection, Date, String, Table, bindparam, delete, insert, select
from sqlalchemy.exc import SQLAlchemyError

from gateway.keys import Key, Keys
from gateway.limits import Limits
from gateway.store import Store, metadata
from gateway.usage import Entry, Prices, add, sums
from handler.messages import Call, Reply, Request
from handler.usage import Meter, with_usage

log = logging.getLogger("gateway")

CHECKPOINT_S = 1.0
SETTLE_MAX_S = 5.0
"""How long an answer waits until it is on its account, where another process has the database."""

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
    names this gateway among those that share a database. `tell` hears of each answer, once.
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
        await self._store.write(partial(_adopt, instance=self._instance))
        self._ticking = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._ticking is not None
        self._ticking.cancel()
        await asyncio.wait({self._ticking})
        await self.checkpoint()

    def metered(self, call: Call, *, endpoint_id: str, model_id: str, prices: Prices) -> Call:
        """`call`, whose answers are counted for the key that is `Visit.caller`.

        An answer that names no model is counted for `model_id`.
        """

        @asynccontextmanager
        async def counted(request: Request) -> AsyncIterator[Reply]:
            if request.method != "POST":
                async with call(request) as reply:
                    yield reply
                return
            asked, hides = with_usage(request)
            async with call(asked) as reply:
                if reply.status >= 400:
                    yield reply
                    return
                one = _Open(self._keys.of(request.visit.caller), endpoint_id, model_id, prices)
                one.meter = Meter(hides=hides, settle=partial(self._settle, one))
                self._open.add(one)
                try:
                    yield one.meter.read(reply)
                finally:
                    self._close(one)

        return counted

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
                    "model": now.model[:256],
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
                log.warning("usage could not be written down", extra={"reason": str(error)})

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
        if kept := [{"open_id": one.id} for one, _ in ended if one.kept]:
            connection.execute(_CLOSE, kept)
        for entry in sums(entry for _, entry in ended):
            add(connection, entry)

    def _over(self, done: Future[None], ended: Sequence[tuple[_Open, Entry]]) -> None:
        if (error := done.exception()) is not None:
            log.error("usage could not be counted yet", extra={"reason": str(error)})
            self._failed.extend(ended)

    def _spend(self, one: _Open, entry: Entry) -> None:
        tokens = entry.prompt_tokens + entry.completion_tokens
        self._limits.spend(one.key, tokens - one.spent_tokens)
        one.spent_tokens = tokens


def _keep(connection: Connection, rows: Sequence[dict[str, object]]) -> None:
    # Both ways at once: whether the row of a write that failed is there does not matter.
    connection.execute(_CLOSE, [{"open_id": row["id"]} for row in rows])
    connection.execute(insert(_OPEN), rows)


def _adopt(connection: Connection, instance: str) -> None:
    """Count what other gateways have left. With SQLite none of them lives (`gateway.alone`)."""
    left = _OPEN.c.instance != instance
    for row in connection.execute(select(_OPEN).where(left)).all():
        tokens = (row.prompt_tokens, row.completion_tokens)
        add(connection, Entry(row.key_id, row.endpoint, row.model, *tokens, row.cost_nano), row.day)
    connection.execute(delete(_OPEN).where(left))
