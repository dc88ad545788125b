"""Every batch that is not over, each run to its end; a gateway goes on with those of one that is gone.

Of gateways that share a database and the folder of files, each runs its own. One that takes a batch over
copies what counts of its results first: the last one, which may only have been slow, can't write there.

Of a key and an endpoint one batch is asked at a time, the oldest first, and few of an endpoint: what they
hold in memory is bounded. They are checked before their turn, so that a client hears of a bad line soon.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from gateway.batches import results, table
from gateway.batches.run import BatchRun, Means
from gateway.batches.table import Row
from gateway.database import reason
from gateway.files.store import new_id, to_the_end
from handler import batch_object
from handler.batch_object import Batch
from handler.errors import Conflict

log = logging.getLogger("gateway")

ASKED_MAX = 4
"""How many batches of an endpoint are asked at a time, of different keys."""
SWEEP_S = 600.0
"""How often expired files are looked for."""
LOOK_S = 1.0
"""How late it is heard of at most that another gateway has cancelled a batch, or taken it over."""
AGAIN_S, AGAIN_MAX_S = 1.0, 60.0
"""When a batch is tried again that could not be gone on with: at first, and at most."""


class BatchRuns:
    """Runs what `means` has, for as long as it is entered."""

    def __init__(self, means: Means) -> None:
        self.means = means
        self._runs: dict[str, BatchRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns: dict[tuple[str, str], asyncio.Lock] = {}
        self._endpoints_turns: dict[str, asyncio.Semaphore] = {}
        self._stopping = asyncio.Event()

    async def __aenter__(self) -> Self:
        rows = await self.means.store.read(table.unfinished)
        writing = [file_id for row in rows for file_id in (row.output_file_id, row.error_file_id)]
        await self.means.files.open(writing)
        await self.adopt()
        self._keep(self._sweep())
        if self.means.store.shared:
            self._keep(self._look_around())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def stop(self) -> None:
        """Ask no more lines; what has ended is written down."""
        self._stopping.set()
        for run in self._runs.values():
            run.stop()

    async def adopt(self) -> None:
        """Go on with batches of gateways that are gone, as far as their inputs are here."""
        if self._stopping.is_set():
            return
        store, files = self.means.store, self.means.files
        left = await store.read(table.left)
        here = {row.id for row in left if not store.shared or files.path(row.input_file_id).exists()}
        if here:
            adopting = partial(table.adopt, ids=here, instance=self.means.instance)
            for row in await store.write(adopting):
                self._keep(self._run(row, adopted=store.shared))

    async def submit(self, row: Row, check: Callable[[Connection], None]) -> Batch:
        """Write `row` down and run it, unless `check` raises."""
        mine = replace(row, instance=self.means.instance)

        def put(connection: Connection) -> None:
            check(connection)
            table.put(connection, mine)

        async def begin() -> Batch:
            await self.means.store.write(put)
            self._keep(self._run(mine))
            return row.object

        return await to_the_end(begin())  # a client that leaves now leaves a batch that runs

    async def cancel(self, batch_id: str) -> Batch:
        """Have a batch be cancelled. Raises `Conflict` if it is past that."""
        now = self.means.now

        def how(batch: Batch) -> Batch:
            if batch["status"] not in {"validating", "in_progress", "cancelling"}:
                raise Conflict(f"Cannot cancel a batch with status '{batch['status']}'.")
            return batch_object.moved(batch, "cancelling", now)

        async def end() -> Batch:
            batch = await self.means.store.write(partial(table.change, batch_id=batch_id, how=how))
            if run := self._runs.get(batch_id):
                run.cancel()
            return batch

        return await to_the_end(end())

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, row: Row, *, adopted: bool = False) -> None:
        again_s = AGAIN_S
        while not self._stopping.is_set():
            try:
                if adopted:
                    row, adopted = await self._moved(row), False
                run = self._runs[row.id] = BatchRun(self.means, row, self._turn(row))
                await run.run()
            except table.Taken:
                log.warning("a batch is another gateway's by now", extra={"batch": row.id})
                return
            except SQLAlchemyError as error:
                why = {"batch": row.id, "again_s": again_s, "reason": reason(error)}
                log.warning("a batch could not be gone on with", extra=why)
            except Exception:  # of one batch: the others go on
                log.exception(
                    "a batch could not be gone on with", extra={"batch": row.id, "again_s": again_s}
                )
            else:
                return
            finally:
                self._runs.pop(row.id, None)
            await self._pause(again_s)
            again_s = min(2 * again_s, AGAIN_MAX_S)
            if (found := await self._again(row)) is None:
                return
            row = found

    async def _again(self, row: Row) -> Row | None:
        """The batch as it is by now, None if it is not this gateway's any more."""
        while not self._stopping.is_set():
            try:
                found = await self.means.store.read(partial(table.one, batch_id=row.id))
            except SQLAlchemyError:  # as it was before, it must not be gone on with: more may be done by now
                await self._pause(AGAIN_S)
            else:
                return found if found.instance == self.means.instance else None
        return None

    async def _moved(self, row: Row) -> Row:
        """`row`, whose results are copies of what counts of the last gateway's."""
        mine = replace(row, output_file_id=new_id("file-"), error_file_id=new_id("file-"))
        await asyncio.to_thread(results.copy, self.means.files, row, mine)
        await self.means.store.write(partial(table.move, row=mine))
        return mine

    async def _look_around(self) -> None:
        """Hear what other gateways have done to the batches that run here."""
        while not self._stopping.is_set():
            await self._pause(LOOK_S)
            try:
                found = await self.means.store.read(partial(table.standing, ids=tuple(self._runs)))
            except SQLAlchemyError as error:
                log.warning("batches can't be looked for", extra={"reason": reason(error)})
                continue
            for batch_id, (owner, batch) in found.items():
                if (run := self._runs.get(batch_id)) is None:
                    continue
                if owner != self.means.instance:
                    run.stop()
                elif batch["cancelling_at"]:
                    run.cancel()

    @asynccontextmanager
    async def _turn(self, row: Row) -> AsyncIterator[None]:
        one = self._turns.setdefault((row.key_id, row.endpoint_id), asyncio.Lock())
        few = self._endpoints_turns.setdefault(row.endpoint_id, asyncio.Semaphore(ASKED_MAX))
        async with one, few:
            yield

    async def _sweep(self) -> None:
        """Delete what has expired, now and again."""
        files = self.means.files
        while not self._stopping.is_set():
            try:
                expired, used = await files.expired(), await self.means.store.read(table.inputs)
                await files.delete([file_id for file_id in expired if file_id not in used])
            except (SQLAlchemyError, OSError) as error:  # it will do the next time
                log.warning("expired files could not be deleted", extra={"reason": reason(error)})
            await self._pause(SWEEP_S)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
