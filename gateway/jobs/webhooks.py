"""Tells what came of jobs to the URLs that were given with them.

What is to be told is written down with the job's end, so that it survives whatever happens to the gateway.
It is told at least once: a gateway that is killed between an answer and its note of it tells it again.

The URLs are strangers': each leads only where it may (`destinations`), no redirect is followed, and only the
job is sent.
"""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import aiohttp
from aiohttp.abc import AbstractResolver
from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Delete,
    Float,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    Update,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.exc import SQLAlchemyError
from yarl import URL

from gateway.database import reason
from gateway.instances import dead
from gateway.jobs.destinations import Allowed, Guard, is_address
from gateway.jobs.lookups import Lookups
from gateway.store import Store, metadata

log = logging.getLogger(__name__)

TRIES_MAX = 3
AGAIN_S = 10.0
"""As RunPod has them: two more tries, ten seconds apart."""
TIMEOUT_S = 10.0
AT_ONCE = 128
HOST_AT_ONCE = 4
"""Of them, to one host: one that is dead holds each for `TIMEOUT_S`, and nobody else's wait for it."""
LARGE_BYTES = 1 << 20
LARGE_AT_ONCE = 8
"""How many larger ones are in memory at once: they may have 20 MB."""
DATABASE_AGAIN_S = 1.0
LOOK_S = 5.0
"""How often what another gateway has left is looked for."""

WEBHOOKS = Table(
    "job_webhooks",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("url", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("due_at", Float(53), nullable=False),
    Column("instance", String(32)),  # the gateway that sends it
    Index("job_webhooks_due", "due_at", "host"),
    sqlite_autoincrement=True,
)


def add(connection: Connection, url: str, body: bytes, now: float) -> None:
    """Have `body` sent to `url`, in the transaction of `connection`."""
    host = URL(url).host or ""
    connection.execute(insert(WEBHOOKS).values(url=url, host=host, body=body, tries=0, due_at=now))


@dataclass(frozen=True, slots=True)
class Waiting:
    """A webhook that is to be sent, after `tries`."""

    id: int
    url: str
    host: str
    size_bytes: int
    tries: int
    due_at: float


class Webhooks:
    """Sends what is written down, and again what was not answered with 200.

    A few at a time to each host, and many in all: a host that does not answer has its own wait.
    What this gateway, `instance`, has on its way is no other's to send.
    """

    def __init__(
        self,
        store: Store,
        allowed: Allowed,
        *,
        instance: str | None = None,
        clock: Callable[[], float] = time.time,
        resolver: AbstractResolver | None = None,
        again_s: float = AGAIN_S,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._store = store
        self._allowed = allowed
        self._instance = instance
        self._clock = clock
        self._resolver = resolver
        self._again_s = again_s
        self._timeout_s = timeout_s
        self._news = asyncio.Event()
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._sending: dict[int, str] = {}
        """The hosts of those that are on their way, by id."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to send, what an earlier gateway has left first."""
        self._task = asyncio.create_task(self._send_all())

    def wake(self) -> None:
        """There is something to send."""
        self._news.set()

    async def close(self) -> None:
        """Send no more; the next gateway does."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _send_all(self) -> None:
        guard = Guard(self._allowed, self._resolver or Lookups())
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=AT_ONCE, resolver=guard, use_dns_cache=False, force_close=True
                ),
                timeout=aiohttp.ClientTimeout(total=self._timeout_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"user-agent": "firsttoken", "content-type": "application/json"},
            ) as session,
            asyncio.TaskGroup() as tasks,
        ):
            while True:
                self._news.clear()
                try:
                    wait_s = await self._begin_due(session, tasks)
                except SQLAlchemyError as error:
                    log.warning("webhooks can't be read", extra={"reason": reason(error)})
                    wait_s = DATABASE_AGAIN_S
                try:
                    async with asyncio.timeout(wait_s):
                        await self._news.wait()
                except TimeoutError:
                    pass

    async def _begin_due(self, session: aiohttp.ClientSession, tasks: asyncio.TaskGroup) -> float | None:
        """Begin to send what is due, as far as there is room.

        Returns how long until something else is due; None if it takes news for that.
        """
        while room := AT_ONCE - len(self._sending):
            hosts = Counter(self._sending.values())
            full = [host for host, number in hosts.items() if number >= HOST_AT_ONCE]
            wanted = partial(_next, list(self._sending), full, room, self._ours)
            found = await self._store.read(wanted)
            if not found:
                return self._look_s
            for waiting in found:
                wait_s = waiting.due_at - self._clock()
                if wait_s > 0:
                    return min(wait_s, self._look_s or wait_s)
                if hosts[waiting.host] < HOST_AT_ONCE:  # else the next look leaves its host out
                    hosts[waiting.host] += 1
                    self._sending[waiting.id] = waiting.host
                    tasks.create_task(self._send(session, waiting))
        return self._look_s

    @property
    def _ours(self) -> ColumnElement[bool]:
        """What no other gateway that lives has on its way."""
        return or_(dead(WEBHOOKS.c.instance), WEBHOOKS.c.instance == self._instance)

    @property
    def _look_s(self) -> float | None:
        """How long until what another gateway has left is looked for."""
        return LOOK_S if self._store.shared else None

    async def _take(self, waiting: Waiting) -> bool:
        """Whether it is this gateway's to send, and from now on no other's."""
        if not self._store.shared:
            return True
        due = (WEBHOOKS.c.id == waiting.id, WEBHOOKS.c.due_at == waiting.due_at, self._ours)
        taking = update(WEBHOOKS).where(*due).values(instance=self._instance)
        return await self._store.write(lambda connection: connection.execute(taking).rowcount > 0)

    async def _send(self, session: aiohttp.ClientSession, waiting: Waiting) -> None:
        try:
            if not await self._take(waiting):
                return
            async with self._large if waiting.size_bytes > LARGE_BYTES else nullcontext():
                body = partial(_body, waiting.id)
                why = await self._refused(session, URL(waiting.url), await self._store.read(body))
            await self._note(waiting, why)
        except SQLAlchemyError as error:
            log.warning("a webhook can't be read", extra={"reason": reason(error)})
            await asyncio.sleep(DATABASE_AGAIN_S)
        finally:
            del self._sending[waiting.id]
            self._news.set()

    async def _note(self, waiting: Waiting, why: str | None) -> None:
        """Write down what came of it. A full disk has nothing sent again."""
        mine = WEBHOOKS.c.id == waiting.id
        change: Delete | Update = delete(WEBHOOKS).where(mine)
        if why is not None and waiting.tries + 1 < TRIES_MAX:
            again_at = self._clock() + self._again_s
            again = {"tries": waiting.tries + 1, "due_at": again_at, "instance": None}
            change = update(WEBHOOKS).where(mine).values(again)
        elif why is not None:
            log.warning("webhook given up", extra={"host": waiting.host, "reason": why})

        def note(connection: Connection) -> None:
            connection.execute(change)

        while True:
            try:
                return await self._store.write(note)
            except SQLAlchemyError as error:
                log.warning("what came of a webhook can't be written", extra={"reason": reason(error)})
                await asyncio.sleep(DATABASE_AGAIN_S)

    async def _refused(self, session: aiohttp.ClientSession, url: URL, body: bytes) -> str | None:
        """Send once; why that was not enough, None if it was."""
        host = url.host or ""
        if is_address(host) and not self._allowed.host(host) and not self._allowed.address(host):
            return "no address of the internet"  # no name that the guard would see
        try:
            async with session.post(url, data=io.BytesIO(body), allow_redirects=False) as response:
                return None if response.status == 200 else f"answered with {response.status}"
        except TimeoutError:
            return f"no answer within {self._timeout_s:g} s"
        except Exception as error:  # noqa: BLE001 - a stranger's server must not end those of others
            return type(error).__name__


def _next(
    sending: Sequence[int],
    full: Sequence[str],
    most: int,
    ours: ColumnElement[bool],
    connection: Connection,
) -> list[Waiting]:
    """The next of `ours` to be sent but for those that are `sending` and those to hosts that are `full`."""
    wanted = (
        select(
            *(WEBHOOKS.c[name] for name in ("id", "url", "host", "tries", "due_at")),
            func.length(WEBHOOKS.c.body).label("size_bytes"),
        )
        .where(ours, WEBHOOKS.c.id.not_in(sending), WEBHOOKS.c.host.not_in(full))
        .order_by(WEBHOOKS.c.due_at)
        .limit(most)
    )
    return [Waiting(**row) for row in connection.execute(wanted).mappings()]


def _body(number: int, connection: Connection) -> bytes:
    found: bytes = connection.execute(select(WEBHOOKS.c.body).where(WEBHOOKS.c.id == number)).scalar_one()
    return found
