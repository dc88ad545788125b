"""One batch on its way: checked, asked line by line, and made two files of.

What has ended without a gap is written behind what is there (`handler.batch_window`), is on the disk, and
then one commit says so, with what the batch has used. A gateway that is killed loses what was not committed:
the next one cuts it off and asks that again. So every line is answered once, and counted once.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from sqlalchemy import Connection

from gateway.accounts import usage
from gateway.accounts.clients import permit
from gateway.accounts.keys import Keys
from gateway.accounts.usage import Entry, Prices
from gateway.batches import table
from gateway.batches.check import Checked, check
from gateway.batches.results import Results, made_files
from gateway.batches.table import Row
from gateway.endpoints.endpoint import Endpoint
from gateway.files import store as file_store
from gateway.files.store import FileStore, to_the_end
from gateway.store import Store
from handler import batch_object
from handler.batch_ask import Asker
from handler.batch_lines import Item, Outcome, Progress
from handler.batch_object import Batch
from handler.batch_source import Source
from handler.batch_window import Pace, Part, Window
from handler.errors import BadRequest, NotAdmitted, NotFound, RequestError
from handler.messages import Reply, Request, Visit

log = logging.getLogger("gateway")

PACE = Pace(most=1, part_lines=500, part_bytes=1 << 20, part_s=1.0, held_bytes=16 << 20, ahead_bytes=4 << 20)
PAUSE_S = 1.0
"""How long a line waits before it is asked again, at first."""
GONE_RETRY_S = 30.0
CHECKED_MAX = 2
"""How many inputs are looked through at a time: each keeps a thread busy."""


@dataclass(frozen=True, slots=True)
class Means:
    """What every batch is run with."""

    store: Store
    files: FileStore
    keys: Keys
    endpoints: Mapping[str, Endpoint]
    max_body_bytes: int
    tell: Callable[[Entry], None] = lambda _: None
    """Hears what was counted."""
    instance: str | None = None
    """This gateway's id."""
    checking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(CHECKED_MAX), repr=False)

    @property
    def now(self) -> float:
        """Unix time."""
        return self.files.now()


class BatchRun:
    """Runs the batch of `row` to its end. `turn` is entered before lines are asked, and left after."""

    def __init__(self, means: Means, row: Row, turn: AbstractAsyncContextManager[None]) -> None:
        self._means = means
        self._row = row
        self._turn = turn
        self._model: str | None = row.object["model"]
        self._progress = Progress.load(row.progress) if row.progress else Progress()
        self._asker = Asker(self._call, PAUSE_S)
        self._window: Window | None = None
        self._refusal: RequestError | None = None
        self._ends_as = "completed"
        self._refused = asyncio.Event()
        self._stops = False

    async def run(self) -> None:
        """Return once the batch is over, or stopped. Raises what may be better later, as for a full disk."""
        began = self._row.object
        expiry = asyncio.get_running_loop().call_later(began["expires_at"] - self._means.now, self._expire)
        if began["cancelling_at"]:
            self.cancel()
        try:
            if not began["request_counts"]["total"] and not await self._validate():
                return
            async with AsyncExitStack() as stack:
                await self._enter(stack)
                if not await self._ask_all():
                    return
            expiry.cancel()
            await self._finish()
        except FileNotFoundError:
            why = NotFound("A file of the batch is gone.", code="file_not_found")
            await self._change(lambda batch: batch_object.failed(batch, [(None, why)], self._means.now))
        finally:
            expiry.cancel()

    def cancel(self) -> None:
        """Ask no more: the rest is told that it was cancelled."""
        why = BadRequest("The batch was cancelled before this was asked.", code="batch_cancelled")
        self._refuse(why, "cancelled")

    def stop(self) -> None:
        """Let go of the batch: what has ended is written, and the next gateway goes on with the rest."""
        self._stops = True
        if self._window is not None:
            self._window.stop(0.0)
        self._refused.set()

    def _expire(self) -> None:
        why = "This request could not be executed before the completion window expired."
        self._refuse(BadRequest(why, code="batch_expired"), "expired")

    def _refuse(self, why: RequestError, ends_as: str) -> None:
        if self._refusal is None:
            self._refusal, self._ends_as = why, ends_as
            self._refused.set()
            if self._window is not None:
                self._window.refuse(why)

    # --- one thing after the other -------------------------------------------------------------

    async def _validate(self) -> bool:
        """Whether the batch's lines can be asked. If not it has failed, or was stopped."""
        async with self._means.checking:
            checked = await asyncio.to_thread(self._check)
        if checked is None:
            return False
        faults, now = checked.faults, self._means.now

        def how(batch: Batch) -> Batch:
            counts = {**batch["request_counts"], "total": checked.total}
            batch = {**batch, "request_counts": counts, "model": checked.model}
            if faults:
                return batch_object.failed({**batch, "request_counts": {**counts, "total": 0}}, faults, now)
            return batch if batch["cancelling_at"] else batch_object.moved(batch, "in_progress", now)

        self._model = checked.model
        await self._change(how)
        return not faults

    def _check(self) -> Checked | None:
        with self._source() as source:
            return check(
                source,
                self._row.object["endpoint"],
                default_model=self._default_model(),
                refuse=self._refuse_line,
                goes_on=lambda: not self._stops,
            )

    async def _ask_all(self) -> bool:
        """Work the lines off; whether all are."""
        with self._source() as source, Results(self._means.files, self._row) as results:
            items = source.items(self._progress, ())
            window = Window(
                self._progress,
                partial(self._read, items),
                self._ask,
                partial(self._write, results),
                replace(PACE, most=self._most()),
            )
            self._window = window
            if self._refusal is not None:
                window.refuse(self._refusal)
            try:
                return not self._stops and await window.run()
            finally:
                self._window = None

    async def _finish(self) -> None:
        """Make files of what was written."""

        def finalizing(batch: Batch) -> Batch:
            return (
                batch if batch["cancelling_at"] else batch_object.moved(batch, "finalizing", self._means.now)
            )

        await self._change(finalizing)
        files = await asyncio.to_thread(made_files, self._means.files, self._row)
        output, errors = files

        def how(batch: Batch) -> Batch:
            status = "cancelled" if batch["cancelling_at"] else self._ends_as
            ids = {"output_file_id": output and output.id, "error_file_id": errors and errors.id}
            return batch_object.moved(batch, status, self._means.now, **ids)

        def commit(connection: Connection) -> Batch:
            for file in files:
                if file is not None:
                    file_store.put(connection, file)
            return table.change(connection, self._row.id, how, self._means.instance)

        done = await self._means.store.write(commit, insist=True)
        log.info(
            "a batch is over", extra={"batch": done["id"], "status": done["status"], **done["request_counts"]}
        )

    # --- lines ---------------------------------------------------------------------------------

    async def _read(self, items: Iterator[Sequence[Item]]) -> Sequence[Item]:
        return await asyncio.to_thread(next, items, ())

    async def _ask(self, item: Item) -> Outcome:
        try:
            return await self._asker.ask(item)
        finally:
            if self._window is not None:
                self._window.allow(self._most())

    def _call(self, request: Request) -> AbstractAsyncContextManager[Reply]:
        means, key_id = self._means, self._row.key_id
        if not means.keys.of(key_id).opens(means.now):
            why = BadRequest("The key of the batch is valid no more.", code="batch_cancelled")
            self._refuse(why, "cancelled")
            raise why
        if self._endpoint is None:
            raise NotAdmitted("The endpoint is gone.", retry_after_s=GONE_RETRY_S)
        left_s = max(0.0, self._row.object["expires_at"] - means.now)
        return self._endpoint.ask(
            replace(request, visit=Visit(caller=key_id, background=True, wait_s=left_s))
        )

    def _most(self) -> int:
        """How many lines are in work: all places of the endpoint's workers, and a few wait for the next.

        Those show that there is work for more of them.
        """
        places = self._endpoint.capacity if self._endpoint else 0
        return places + max(1, places // 4)

    async def _write(self, results: Results, part: Part) -> None:
        await to_the_end(self._commit(results, part))

    async def _commit(self, results: Results, part: Part) -> None:
        sizes = await asyncio.to_thread(results.append, b"".join(part.outputs), b"".join(part.errors))
        after, used = part.progress, self._used(part.progress)
        columns = {"progress": after.dump(), "output_bytes": sizes[0], "error_bytes": sizes[1]}

        def commit(connection: Connection) -> Batch:
            if used.requests:
                usage.add(connection, used)
            return table.change(
                connection,
                self._row.id,
                lambda batch: batch_object.counted(batch, after),
                self._means.instance,
                **columns,
            )

        batch = await self._means.store.write(commit, insist=True)
        if used.requests:
            self._means.tell(used)
        self._progress = after
        if batch["cancelling_at"]:
            self.cancel()

    def _used(self, after: Progress) -> Entry:
        """What was used since the last commit, if it is `after` now."""
        before, endpoint = self._progress, self._endpoint
        prompt_tokens = after.input_tokens - before.input_tokens
        completion_tokens = after.output_tokens - before.output_tokens
        prices = (
            Prices(endpoint.settings.price_input, endpoint.settings.price_output) if endpoint else Prices()
        )
        return Entry(
            key_id=self._row.key_id,
            endpoint_id=self._row.endpoint_id,
            model=self._model or self._default_model(),
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cost_nano=prices.cost_nano(prompt_tokens, completion_tokens),
            requests=after.completed - before.completed,
        )

    # --- parts of it ---------------------------------------------------------------------------

    async def _enter(self, stack: AsyncExitStack) -> None:
        """Wait for the batch's turn, unless there is nothing to ask any more."""
        entering = asyncio.ensure_future(stack.enter_async_context(self._turn))
        refused = asyncio.ensure_future(self._refused.wait())
        try:
            await asyncio.wait({entering, refused}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (entering, refused):
                task.cancel()
            await asyncio.wait({entering, refused})

    async def _change(self, how: Callable[[Batch], Batch]) -> None:
        batch_id, owner = self._row.id, self._means.instance
        await self._means.store.write(
            lambda connection: table.change(connection, batch_id, how, owner), insist=True
        )

    @contextmanager
    def _source(self) -> Iterator[Source]:
        with self._means.files.path(self._row.input_file_id).open("rb") as file:

            def fetch(start: int, end: int) -> bytes:
                file.seek(start)
                return file.read(end - start)

            size_bytes = file.seek(0, os.SEEK_END)
            yield Source(fetch, size_bytes, self._row.id, self._means.max_body_bytes)

    @property
    def _endpoint(self) -> Endpoint | None:
        """The endpoint that is asked, None while it is gone: the next reload may bring it back."""
        return self._means.endpoints.get(self._row.endpoint_id)

    def _default_model(self) -> str:
        return self._endpoint.model_id if self._endpoint else ""

    def _refuse_line(self, request: Request) -> None:
        """Raise what the key or the endpoint is sure to refuse `request` with."""
        if endpoint := self._endpoint:
            permit(self._means.keys.of(self._row.key_id), request, endpoint.model_id)
            endpoint.refuse(request)
