"""The gateway's parts on a real PostgreSQL: several at a time, one taken for dead, a server that fails."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from sqlalchemy import Connection, event, func, insert, select, text, update

from gateway import instances
from gateway.accounts import key_table
from gateway.accounts.key_table import Following
from gateway.accounts.keys import Key, Keys
from gateway.accounts.limits import Limits
from gateway.accounts.metering import Metering
from gateway.accounts.report import Question, report
from gateway.accounts.usage import Entry, Prices, add
from gateway.admin import Admin
from gateway.app import Gateway
from gateway.batches import table as batch_table
from gateway.batches.run import Means
from gateway.batches.runs import BatchRuns
from gateway.batches.table import Row
from gateway.database import StoreUnusable
from gateway.files.store import File as Kept
from gateway.files.store import FileStore, new_id, put
from gateway.instances import INSTANCES, Instance
from gateway.jobs import claims, table, webhooks
from gateway.jobs.destinations import Allowed
from gateway.jobs.table import NewJob, State
from gateway.jobs.webhooks import Webhooks
from gateway.metrics import Metrics
from gateway.store import AWAY, Store
from handler import batch_object, sse
from handler.errors import RequestError, StorageDown
from handler.messages import Reply, Request, Visit, once, read
from tests import gateways, postgres
from tests.postgres import PASSWORD
from tests.until import until

KEY = Key("key_a", "a", b"")


@pytest.fixture
def url(postgresql: postgres.Server) -> Iterator[str]:
    """An empty database."""
    with postgresql.schema() as url:
        yield url


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """An open one."""
    with closing(Store.open(url)) as store:
        yield store


@pytest.fixture
def other(url: str, store: Store) -> Iterator[Store]:
    """The same database, as another gateway has it."""
    with closing(Store.open(url)) as other:
        yield other


def count(connection: Connection, tokens: int = 1, model: str = "m") -> None:
    """Put tokens on an account."""
    add(connection, Entry("key_a", "e", model, 0, tokens))


def counted(connection: Connection) -> int:
    """All that was put on accounts."""
    return report(connection, Question.parse({})).totals["completion_tokens"]


# --- a server that fails ------------------------------------------------------------------------


@pytest.mark.parametrize("committed", [True, False])
def test_a_commit_that_was_not_answered_is_asked_about(
    store: Store, postgresql: postgres.Server, monkeypatch: pytest.MonkeyPatch, *, committed: bool
) -> None:
    """What was committed is told as done, and what was not as failed: to repeat it counts nothing twice."""
    dialect = store._engine.dialect
    commit = dialect.do_commit

    def lost(connection: Any) -> None:
        monkeypatch.undo()
        if committed:
            commit(connection)
        postgresql.run(f"SELECT pg_terminate_backend({connection.dbapi_connection.info.backend_pid})")
        commit(connection)
        connection.dbapi_connection.execute("SELECT 1")

    monkeypatch.setattr(dialect, "do_commit", lost)
    if committed:
        store.write_now(count)
    else:
        with pytest.raises(AWAY):
            store.write_now(count)
    assert store.read_now(counted) == int(committed)


def test_a_gateway_that_stalls_in_its_write_is_ended(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for it as long as the server lets it, and what it had begun was not done."""
    monkeypatch.setattr("gateway.database.STALL_MAX_S", 1)
    begun, go_on = threading.Event(), threading.Event()

    def stall(connection: Connection) -> None:
        count(connection, 100)
        begun.set()
        go_on.wait()

    stalled = store.begin_write(stall)
    begun.wait()
    monkeypatch.undo()
    other.write_now(count)
    go_on.set()
    with pytest.raises(AWAY):
        stalled.result()
    store.write_now(count)
    assert store.read_now(counted) == 2


@pytest.fixture
def own_server() -> Iterator[postgres.Server]:
    """A server that a test may stop."""
    try:
        with postgres.serving() as server:
            yield server
    except postgres.Missing as why:
        pytest.skip(str(why))


async def test_who_asks_while_there_is_no_database_is_told_so(
    own_server: postgres.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 503 with `Retry-After`, be it stopped or silent; once it is there again all is as before."""
    with closing(Store.open(own_server.database())) as store:
        keys = Keys("secret")
        admin = Admin(store, Following(keys, store))
        gateway = Gateway([admin], keys, Metrics())

        async def ask(method: str) -> int:
            body = b'{"name": "x"}' if method == "POST" else b""
            headers = (("authorization", "Bearer secret"), ("content-type", "application/json"))
            try:
                async with gateway.call(Request(method, "/admin/keys", headers, body)) as reply:
                    await read(reply)
            except StorageDown as away:
                return away.status if "retry-after" in dict(away.headers) else 0
            except RequestError as refused:
                return refused.status
            return reply.status

        assert await ask("GET") == 200
        await asyncio.to_thread(own_server.stop)
        assert [await ask("GET"), await ask("POST")] == [503, 503]
        await asyncio.to_thread(own_server.start)
        assert await ask("GET") == 200
        own_server.pause()
        with monkeypatch.context() as impatient:
            impatient.setattr("gateway.store.PATIENCE_S", 0.2)
            assert [await ask("GET"), await ask("POST")] == [503, 503]
        own_server.go_on()
        await asyncio.to_thread(until, lambda: store.write_now(lambda _: True))
        assert await ask("POST") in {201, 400}  # the silent one may have made it
        await asyncio.to_thread(own_server.stop, crash=True)
        assert await ask("POST") == 503
        await asyncio.to_thread(own_server.start)
        assert await ask("GET") == 200


async def test_a_database_that_can_only_be_read_is_told_as_one_that_is_away(url: str) -> None:
    """As a standby is after a failover: what needs no write is answered, and it passes."""
    with closing(Store.open(url)) as store:
        keys = Keys("secret")
        gateway = Gateway([Admin(store, Following(keys, store))], keys, Metrics())
        headers = (("authorization", "Bearer secret"), ("content-type", "application/json"))

        async def ask(method: str) -> int:
            async with gateway.call(Request(method, "/admin/keys", headers, b'{"name": "x"}')) as reply:
                await read(reply)
                return reply.status

        def read_only(connection: Connection) -> None:
            connection.exec_driver_sql("SET TRANSACTION READ ONLY")

        event.listen(store._engine, "begin", read_only)
        assert await ask("GET") == 200
        with pytest.raises(StorageDown):
            await ask("POST")
        event.remove(store._engine, "begin", read_only)
        assert await ask("POST") == 201


async def test_what_may_be_on_its_way_to_another_gateway_stays_for_a_day(
    store: Store, tmp_path: Path
) -> None:
    """What is older and has no row has been left by one that was killed."""
    now = time.time()
    for name, age_s in {"file-1.part": 3600, "file-2": 90_000, "file-3": 90_000}.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - age_s, now - age_s))
    await FileStore(store, tmp_path, max_file_bytes=1, max_stored_bytes=1).open({"file-3"})
    left = await asyncio.to_thread(lambda: {path.name for path in tmp_path.iterdir()})
    assert left == {"file-1.part", "file-3"}


def test_no_password_is_shown(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Neither of a URL that is wrong nor of one that is refused."""
    wrong = (
        url.replace(PASSWORD, "wrong-secret"),
        "postgresql+psycopg://user:wrong-secret:more@host:port/name",
        "postgresql://user:wrong-secret@127.0.0.1:1/name",
        "mysql://user:wrong-secret@127.0.0.1/name",
    )
    for one in wrong:
        with pytest.raises(StoreUnusable) as refused:
            Store.open(one)
        assert "secret" not in str(refused.value)
        assert refused.value.__cause__ is None
    with closing(Store.open(url)) as store:
        with pytest.raises(Exception, match="hidden") as failed:
            store.write_now(lambda c: c.execute(text("SELECT 1/(:what - 7)"), {"what": 7}))
        assert PASSWORD not in str(failed.value)
    assert PASSWORD not in caplog.text


def test_gateways_that_start_together_make_the_tables_once(url: str) -> None:
    """And all of them work."""
    opened: list[Store] = []
    threads = [threading.Thread(target=lambda: opened.append(Store.open(url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4
    for store in opened:
        store.write_now(count)
        store.close()


def test_a_column_that_an_older_database_lacks_is_made(url: str) -> None:
    """One that may be empty; no other can be guessed."""
    with closing(Store.open(url)) as store:
        store.write_now(lambda c: c.execute(text("ALTER TABLE jobs DROP COLUMN instance")))
    with closing(Store.open(url)) as store:
        assert store.read_now(lambda c: c.execute(select(table.JOBS.c.instance)).all()) == []
        store.write_now(lambda c: c.execute(text("ALTER TABLE jobs DROP COLUMN ttl_s")))
    with pytest.raises(StoreUnusable, match="jobs has no ttl_s"):
        Store.open(url)


# --- two gateways -------------------------------------------------------------------------------


async def test_what_gateways_write_at_once_is_all_there(store: Store, other: Store) -> None:
    """Onto the same accounts, in whichever order: nothing is lost, and nobody waits for another for ever."""
    models = [f"m{n}" for n in range(20)]
    writes = [
        one.write(lambda c, model=model: count(c, 1, model), insist=True)  # type: ignore[misc]
        for number in range(10)
        for one, order in ((store, models), (other, models[::-1]))
        for model in order[number % 3 :]
    ]
    await asyncio.gather(*writes)
    assert await store.read(counted) == len(writes)
    assert await other.read(lambda c: len(report(c, Question.parse({"group": "key,model"})).rows)) == 20


def test_a_key_is_made_first_by_one_of_two(store: Store, other: Store) -> None:
    """And shown once."""
    asked = [one.begin_write(lambda c: key_table.first(c, 0)) for one in (store, other) for _ in range(5)]
    assert len(list(filter(None, [each.result() for each in asked]))) == 1


def test_a_read_sees_one_moment(store: Store, other: Store) -> None:
    """Else a key that is revoked between two looks of a reload would open for ever."""
    store.write_now(lambda c: key_table.create(c, key_table.parse({"name": "a"}, 0)))

    def load(connection: Connection) -> list[Any]:
        before = key_table.load(connection)
        other.write_now(lambda c: key_table.revoke(c, "a", 5))
        return [before, key_table.load(connection)]

    before, after = store.read_now(load)
    assert before == after
    assert store.read_now(key_table.load)[1] == before[1] + 1


async def test_a_living_gateway_is_never_taken_for_dead_and_a_dead_one_is(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an outage in which all leases have run out, every one has a lease's time to say that it lives."""
    monkeypatch.setattr(instances, "BEAT_S", 3600.0)
    async with Instance(store) as a, Instance(other) as b:

        def listed() -> set[str]:
            return store.read_now(lambda c: set(c.scalars(select(INSTANCES.c.id))))

        def outage(connection: Connection) -> None:
            connection.execute(update(INSTANCES).values(lease_until=INSTANCES.c.lease_until - 3600))

        await a.beat()
        assert listed() == {a.id, b.id}
        await asyncio.to_thread(store.write_now, outage)
        await a.beat()
        assert listed() == {a.id, b.id}, "it has not been steady for a lease's time"
        a._steady_since_s -= instances.LEASE_S
        heard: list[str] = []

        async def adopt() -> None:
            heard.append(a.id)

        a.adopters.append(adopt)
        await a.beat()
        assert listed() == {a.id}
        assert heard == [a.id]
        await b.beat()
        assert listed() == {a.id, b.id}, "it was slow, and begins again"


def session_of(instance: Instance) -> int:
    """The process of the server that a gateway's session has."""
    session = instance._presence._session
    assert session is not None
    pid: int = session.scalar(text("SELECT pg_backend_pid()"))
    return pid


def end_session(server: postgres.Server, instance: Instance) -> None:
    """Have the server end a gateway's session, as it does when the process is over."""
    pid = session_of(instance)
    server.run(f"SELECT pg_terminate_backend({pid}, 10000)")


@pytest.fixture
def listed(store: Store) -> Callable[[], set[str]]:
    """The gateways on the list."""
    return lambda: store.read_now(lambda c: set(c.scalars(select(INSTANCES.c.id))))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No beat but the test's own, and no time that a gateway must be silent, or have looked."""
    monkeypatch.setattr(instances, "BEAT_S", 3600.0)
    monkeypatch.setattr(instances, "QUIET_S", 0.0)


async def test_a_gateway_whose_lock_is_free_is_taken_off_though_its_lease_runs(
    store: Store, other: Store, postgresql: postgres.Server, at_once: None, listed: Callable[[], set[str]]
) -> None:
    """And what it had is taken over in the same beat. One that holds it is not."""
    async with Instance(store) as a, Instance(other) as b:
        heard: list[set[str]] = []

        async def adopt() -> None:
            heard.append(listed())

        a.adopters.append(adopt)
        await a.beat()
        end_session(postgresql, b)
        await a.beat()
        assert heard == [{a.id, b.id}, {a.id}]


@pytest.mark.parametrize("why", ["it has spoken", "nobody has looked for so long"])
async def test_a_free_lock_proves_nothing_for_a_while(
    store: Store,
    other: Store,
    postgresql: postgres.Server,
    at_once: None,
    listed: Callable[[], set[str]],
    monkeypatch: pytest.MonkeyPatch,
    why: str,
) -> None:
    """Sessions may have been ended under gateways that live, all at once or one: they have time to say so."""
    monkeypatch.setattr(instances, "QUIET_S", 5.0)
    async with Instance(store) as a, Instance(other) as b:
        end_session(postgresql, b)
        if why == "it has spoken":
            held = a._presence._held
            assert held is not None
            a._presence._held = replace(held, since_s=held.since_s - 5)
        else:
            silent = update(INSTANCES).where(INSTANCES.c.id == b.id)
            earlier = silent.values(lease_until=INSTANCES.c.lease_until - 6)
            await store.write(lambda c: c.execute(earlier))
        await a.beat()
        assert listed() == {a.id, b.id}
        await b.beat()
        monkeypatch.setattr(instances, "QUIET_S", 0.0)
        await a.beat()
        assert listed() == {a.id, b.id}, "it has its lock again"


async def test_a_look_that_took_long_proves_nothing(
    store: Store, other: Store, postgresql: postgres.Server, at_once: None, listed: Callable[[], set[str]]
) -> None:
    """There may have been an outage meanwhile, after which this gateway was the first."""
    async with Instance(store) as a, Instance(other) as b:
        end_session(postgresql, b)
        beginning_s = time.monotonic() - instances.BEAT_S
        beat = partial(a._beat, held=await a._hold(), beginning_s=beginning_s, steady=False)
        await store.write(beat)
        assert listed() == {a.id, b.id}
        await a.beat()
        assert listed() == {a.id}


async def test_a_gateway_that_cant_have_its_lock_is_not_taken_for_dead(
    store: Store, other: Store, postgresql: postgres.Server, at_once: None, listed: Callable[[], set[str]]
) -> None:
    """A session of which only the server does not know that it is lost has it: then leases count."""
    async with Instance(store) as a, Instance(other) as b:
        lost, b._presence._session = b._presence._session, None
        assert lost is not None
        await b.beat()
        lost.close()
        await a.beat()
        assert listed() == {a.id, b.id}


async def test_another_server_proves_nothing(own_server: postgres.Server, at_once: None) -> None:
    """No lock outlives a restart: who lives is not taken for dead by who was sooner."""
    url = own_server.database()
    with closing(Store.open(url)) as store, closing(Store.open(url)) as other:
        async with Instance(store) as a, Instance(other) as b:
            await asyncio.to_thread(own_server.stop)
            await asyncio.to_thread(own_server.start)
            await a.beat()
            assert await store.read(lambda c: set(c.scalars(select(INSTANCES.c.id)))) == {a.id, b.id}


async def test_a_session_that_does_not_answer_keeps_no_gateway_silent(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that it lives, and that its lock means nothing."""
    async with Instance(store) as a:
        go_on = threading.Event()
        monkeypatch.setattr(instances, "BEAT_S", 0.01)
        monkeypatch.setattr(a._presence, "hold", go_on.wait)
        before = await store.read(lambda c: c.execute(select(INSTANCES)).one())
        await a.beat()
        after = await store.read(lambda c: c.execute(select(INSTANCES)).one())
        go_on.set()
        assert after.lease_until > before.lease_until
        assert (before.server is None, after.server) == (False, None)


async def test_jobs_of_the_dead_are_adopted_once_and_those_of_the_living_stay(
    store: Store, other: Store
) -> None:
    """A late word of the dead changes nothing."""
    now = 1000.0

    def claim(connection: Connection, instance: str) -> Any:
        ((job, _),) = claims.claim(connection, "e", 1, background=False, after="", now=now, instance=instance)
        assert claims.begin(connection, job, now)
        return job

    for _ in range(2):
        store.write_now(lambda c: table.add(c, NewJob("e", "k", b"{}"), now))
    for name in ("living", "dying"):
        store.write_now(lambda c, name=name: c.execute(insert(INSTANCES).values(id=name, lease_until=1e12)))  # type: ignore[misc]
    living = store.write_now(lambda c: claim(c, "living"))
    dying = other.write_now(lambda c: claim(c, "dying"))
    assert store.write_now(lambda c: claims.adopt(c, now)) == []
    assert store.read_now(lambda c: table.find(c, dying.id, now)).state is State.IN_PROGRESS  # type: ignore[union-attr]
    store.write_now(lambda c: instances._remove(c, INSTANCES.c.id == "dying"))
    for one in (store, other, store):
        one.write_now(lambda c: claims.adopt(c, now))
    found = store.read_now(lambda c: table.find(c, dying.id, now))
    assert found is not None
    assert (found.state, found.retries) == (State.IN_QUEUE, 1)
    ending = table.Ending(State.COMPLETED, b"[]")
    assert other.write_now(lambda c: claims.end(c, dying, ending, now)) is None, "it was lost"
    assert store.write_now(lambda c: claims.end(c, living, ending, now)) is not None
    assert (
        store.write_now(
            lambda c: claims.claim(c, "e", 1, background=False, after="", now=now, instance="dying")
        )
        == []
    ), "who is taken for dead gets nothing"


class Frames:
    """A stream whose frames come when the test says so."""

    def __init__(self) -> None:
        self.queue = asyncio.Queue[bytes]()

    @asynccontextmanager
    async def call(self, _: Request) -> AsyncIterator[Reply]:
        """The stream."""

        async def frames() -> AsyncIterator[bytes]:
            while frame := await self.queue.get():
                yield frame

        yield Reply(200, (("content-type", "text/event-stream"),), frames())

    def say(self, *tokens: str) -> None:
        """So many more."""
        for token in tokens:
            self.queue.put_nowait(sse.event({"model": "m", "choices": [{"delta": {"content": token}}]}))


async def test_a_gateway_that_was_only_slow_counts_what_has_come_since(store: Store, other: Store) -> None:
    """What the one that took over has counted is not counted again, nor is anything lost."""
    stream = Frames()
    slow = Metering(store, Keys(stored=[KEY]), Limits(), instance="slow")
    call = slow.metered(stream.call, endpoint_id="e", model_id="m", prices=Prices())
    asked = Request("POST", "/v1/chat/completions", (), b'{"stream": true}', visit=Visit(caller=KEY.id))
    async with call(asked) as reply:
        stream.say("a", "b")
        await anext(reply.frames)
        await anext(reply.frames)
        await slow.checkpoint()
        taker = Metering(other, Keys(stored=[KEY]), Limits(), instance="taker")
        for _ in range(2):
            await taker.adopt()
        assert await store.read(counted) == 2
        stream.say("c")
        await anext(reply.frames)
        await slow.checkpoint()
        await taker.adopt()
        assert await store.read(counted) == 2
        stream.queue.put_nowait(
            sse.event({"model": "m", "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}})
        )
        stream.queue.put_nowait(sse.DONE)
        stream.queue.put_nowait(b"")
        await read(reply)
    await taker.adopt()
    totals = await store.read(lambda c: report(c, Question.parse({})).totals)
    assert (totals["requests"], totals["prompt_tokens"], totals["completion_tokens"]) == (1, 9, 4)


async def test_a_webhook_is_sent_by_one_of_two(store: Store, other: Store) -> None:
    """And what the dead had on its way is sent by another."""
    told: list[str] = []

    async def hear(request: web.Request) -> web.Response:
        told.append(request.path)
        return web.Response()

    app = web.Application()
    app.router.add_post("/{name}", hear)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port = runner.addresses[0][1]
        for name in ("a", "b"):
            lives = insert(INSTANCES).values(id=name, lease_until=1e12)
            await store.write(lambda c, lives=lives: c.execute(lives))  # type: ignore[misc]
        for number in range(20):
            url = f"http://127.0.0.1:{port}/{number}"
            await store.write(lambda c, url=url: webhooks.add(c, url, b"{}", 0.0))  # type: ignore[misc]
        held = update(webhooks.WEBHOOKS).where(webhooks.WEBHOOKS.c.id == 1).values(instance="dead")
        await store.write(lambda c: c.execute(held))
        allowed = Allowed.of(["127.0.0.1"])
        both = [Webhooks(on, allowed, instance=name) for on, name in ((store, "a"), (other, "b"))]
        for one in both:
            one.start()

        def left() -> int:
            count = select(func.count()).select_from(webhooks.WEBHOOKS)
            return store.read_now(lambda c: c.execute(count).scalar_one())

        await asyncio.to_thread(until, lambda: not left())
        for one in both:
            await one.close()
        assert sorted(told) == sorted(f"/{number}" for number in range(20))
    finally:
        await runner.cleanup()


# --- batches ------------------------------------------------------------------------------------


@dataclass
class Lines:
    """An endpoint that answers lines with their own text; those after the first `free` wait at the gate."""

    free: int
    gate: asyncio.Event
    asked: int = 0

    @asynccontextmanager
    async def ask(self, request: Request) -> AsyncIterator[Reply]:
        """A `Call`."""
        self.asked += 1
        if self.asked > self.free:
            await self.gate.wait()
        yield Reply(200, (), once(b'{"usage": {"prompt_tokens": 1, "completion_tokens": 1}}'))


async def test_a_batch_is_gone_on_with_by_another_and_its_last_gateway_writes_nothing(
    store: Store, other: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every line is in the output once and counted once, though the first one comes back and goes on."""
    caplog.set_level(logging.WARNING)
    keys = Keys(stored=[KEY])
    folder = tmp_path / "files"

    def runs(on: Store, lines: Lines, instance: str) -> BatchRuns:
        files = FileStore(on, folder, max_file_bytes=1 << 20, max_stored_bytes=1 << 20)
        endpoints = {"local": gateways.endpoint(lines.ask, capacity=1)}
        return BatchRuns(Means(on, files, keys, endpoints, 10_000, instance=instance))

    slow, quick = Lines(3, asyncio.Event()), Lines(100, asyncio.Event())
    async with AsyncExitStack() as stack:
        await store.write(lambda c: c.execute(insert(INSTANCES).values(id="slow", lease_until=1e12)))
        await store.write(lambda c: c.execute(insert(INSTANCES).values(id="quick", lease_until=1e12)))
        first = await stack.enter_async_context(runs(store, slow, "slow"))
        second = await stack.enter_async_context(runs(other, quick, "quick"))
        file_id, wanted = new_id("file-"), 8
        line = (
            '{"custom_id": "%d", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}'
        )
        raw = "".join(f"{line % n}\n" for n in range(wanted)).encode()
        (folder / file_id).write_bytes(raw)
        kept = Kept(file_id, KEY.id, "batch", "in", len(raw), "", 0, None)
        await store.write(lambda c: put(c, kept))
        began = batch_object.begin(
            new_id("batch_"),
            input_file_id=file_id,
            endpoint="/v1/chat/completions",
            model=None,
            metadata=None,
            now=first.means.now,
        )
        row = Row(began["id"], KEY.id, "local", file_id, new_id("file-"), new_id("file-"), None, began)
        await first.submit(row, lambda _: None)

        def now() -> Row:
            return store.read_now(lambda c: batch_table.one(c, row.id))

        await asyncio.to_thread(until, lambda: now().object["request_counts"]["completed"] == 3)
        await second.adopt()
        assert now().instance == "slow", "it lives"
        await store.write(lambda c: instances._remove(c, INSTANCES.c.id == "slow"))
        await second.adopt()
        await asyncio.to_thread(until, lambda: now().over)
        slow.gate.set()  # it was only slow
        await asyncio.to_thread(until, lambda: not first._runs)
        done = now().object
        assert (done["status"], done["request_counts"]["completed"]) == ("completed", wanted)
        output = (folder / done["output_file_id"]).read_bytes().splitlines()
        assert len(output) == wanted
        assert quick.asked == wanted - 3
        assert await store.read(counted) == wanted


def test_a_name_that_postgresql_cant_keep_is_counted_all_the_same(store: Store) -> None:
    """Workers of others may say anything."""
    store.write_now(lambda c: count(c, 1, "m\0\ud800" + "x" * 300))
    assert store.read_now(counted) == 1


def test_what_holds_while_the_database_is_away(own_server: postgres.Server) -> None:
    """A commit whose outcome is asked for until there is a server: who writes meanwhile hears no."""
    with closing(Store.open(own_server.database())) as store:
        commit = store._engine.dialect.do_commit

        def crash(connection: Any) -> None:
            store._engine.dialect.do_commit = commit  # type: ignore[method-assign]
            own_server.stop(crash=True)
            commit(connection)

        store._engine.dialect.do_commit = crash  # type: ignore[method-assign,assignment]
        unsure = store.begin_write(count)
        until(lambda: own_server.process is not None and own_server.process.poll() is not None)
        with pytest.raises(AWAY):
            store.write_now(count)
        assert not unsure.done()
        own_server.start()
        with pytest.raises(AWAY):
            unsure.result()
        store.write_now(count)
        assert store.read_now(counted) == 1
