"""One worker's time on one batch: from taking it over to its end, or to handing it on.

Lives on the engine's loop; what waits for AWS is in threads.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from handler import batch_object
from handler.batch_ask import Asker
from handler.batch_lines import FILE_MAX_BYTES, REQUESTS_MAX, Item, Progress
from handler.batch_object import Batch
from handler.batch_source import Plan, Source
from handler.batch_window import Pace, Part, Window
from handler.errors import (
    AwsFailed,
    BadRequest,
    BatchLost,
    NotFound,
    RequestError,
    UpstreamFailed,
)
from handler.platforms import batch_record as record
from handler.platforms.batch_lease import Lease, Leases
from handler.platforms.batch_store import BatchStore, Input
from handler.platforms.batch_upload import Seen
from handler.platforms.lambda_messages import Shift
from handler.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

TRIES = 3
"""How often a conditional write is tried: somebody else may have changed the object meanwhile."""
DOUBT_S = 5.0
"""A worker that ends this soon after a 5xx may be ending because of it: the shift has failed then."""


@dataclass(frozen=True, slots=True)
class Times:
    """The durations of a shift, in seconds."""

    lease_s: float = 60.0
    handover_s: float = 60.0
    """A shift begins no more lines this long before its deadline; those that run get half of it."""
    save_s: float = 10.0
    """How often batch.json is written at most."""
    pause_s: float = 1.0
    """How long a line waits before it is asked again; twice as long each time."""


@dataclass(frozen=True, slots=True)
class Means:
    """What every batch of a worker is worked on with. `now` is Unix time."""

    settings: Settings
    leases: Leases
    times: Times
    pace: Callable[[int], Pace]
    now: Callable[[], float]
    threads: Executor

    def thread(self, work: Callable[..., T], *arguments: Any) -> Awaitable[T]:
        """Do `work` in a thread."""
        return asyncio.get_running_loop().run_in_executor(self.threads, partial(work, *arguments))


class BatchShift:
    """What the holder of `lease` does within `shift`."""

    def __init__(self, means: Means, store: BatchStore, lease: Lease, shift: Shift) -> None:
        self._means = means
        self._store = store
        self._lease = lease
        self._shift = shift
        left_s = shift.deadline_s - _loop_s()
        kept_s = min(means.times.handover_s, left_s / 4)
        self._stop_s = shift.deadline_s - kept_s
        self._threads_stop_s = time.monotonic() + left_s - kept_s
        self._ended = False
        self._given: Input | None = None
        self._batch: Batch = {}
        self._seen = Seen(None)
        self._saved_s = -math.inf
        self._window: Window | None = None
        self._refusal: RequestError | None = None
        self._overtaken = False
        self._asker = Asker(shift.call, means.times.pause_s)

    async def run(self) -> bool:
        """Whether the batch is over; False: there was no time for all of it. Raises `BatchLost`."""
        working = asyncio.ensure_future(self._work())
        beating = asyncio.ensure_future(self._beat())
        try:
            await asyncio.wait({working, beating}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                beating.result()
            over = await working
        finally:
            self._ended = True
            for task in (working, beating):
                task.cancel()
            await asyncio.gather(working, beating, return_exceptions=True)
        if not over and self._shift.stopping.is_set() and _loop_s() - self._asker.fault_s < DOUBT_S:
            raise UpstreamFailed("the worker ends with an answer that blames the engine")
        return over

    # --- one thing after the other -------------------------------------------------------------

    async def _work(self) -> bool:
        self._given, self._batch, self._seen = await self._means.thread(self._take_over)
        if self._given is None or batch_object.is_over(self._batch):
            return True
        log.info("a batch is worked on", extra=self._fields())
        if self._given.size_bytes > FILE_MAX_BYTES:
            why = f"The file has {self._given.size_bytes} bytes, and a batch may have {FILE_MAX_BYTES}."
            return await self._fail(BadRequest(why, code="file_too_large"))
        plan = await self._means.thread(self._source().scan, self._goes_on)
        if plan is None:
            return False
        if plan.total > REQUESTS_MAX:
            why = f"The file has more than {REQUESTS_MAX} requests."
            return await self._fail(BadRequest(why, code="too_many_requests"))
        if not plan.total:
            return await self._fail(BadRequest("The file has no requests.", code="empty_file"))
        counts = {**self._batch["request_counts"], "total": plan.total}
        self._batch = {**self._batch, "endpoint": plan.endpoint, "request_counts": counts}
        if self._batch["status"] == "validating":
            self._move("in_progress")
            await self._save()
        return await self._ask_all(plan) and await self._finish()

    def _take_over(self) -> tuple[Input | None, Batch, Seen]:
        """Write batch.json as its new holder: from then on nobody else can. Raises `BatchLost`."""
        version, now = self._lease.version, self._means.now()
        for _ in range(TRIES):
            said, seen = self._store.load()
            given = self._store.head()
            if given is not None and given.version != version:
                raise BatchLost("its input was replaced")
            if given is None and not record.is_of(said, version):
                raise BatchLost("its input was deleted")
            if record.is_of(said, version):
                batch = said
            else:
                assert given is not None, "else it was deleted"
                batch = record.begin(self._store.place, given, self._means.settings.model_id, now)
            if batch_object.is_over(batch):
                return given, batch, seen
            if given is None:
                why = NotFound("The input was deleted before the batch was over.", code="input_deleted")
                batch = batch_object.failed(batch, [(None, why)], now)
            batch = record.taken(batch, self._lease.attempt)
            if saved := self._store.save(batch, seen):
                return given, batch, saved
        raise UpstreamFailed("batch.json changes all the time")

    async def _ask_all(self, plan: Plan) -> bool:
        """Work the lines off; whether all are."""
        await self._look()
        while True:
            progress = await self._means.thread(self._progress)
            self._batch = batch_object.counted(self._batch, progress)
            read = partial(self._read, self._source().items(progress, plan.duplicates))
            pace = self._means.pace(self._shift.most)
            window = self._window = Window(progress, read, self._asker.ask, self._write, pace)
            if self._refusal is not None:
                window.refuse(self._refusal)
            stopping = asyncio.ensure_future(self._stop_in_time(window))
            try:
                all_done = await window.run()
                break
            except BatchLost:
                # A part may have been written by the holder that this one has replaced: then it counts.
                lost = not self._overtaken
                if lost or not await self._means.thread(self._means.leases.renew, self._lease):
                    raise
                self._overtaken = False
            finally:
                self._window = None
                stopping.cancel()
        if not all_done:
            await self._save()
        return all_done

    async def _finish(self) -> bool:
        """Make the results of the parts; whether there was time to."""
        store, version = self._store, self._lease.version
        if self._batch["status"] != "cancelling":
            self._move("finalizing")
        for _ in range(TRIES):
            seen = await self._means.thread(store.results)
            await self._save()  # nobody has taken the batch over since `results`
            if await self._means.thread(store.merge, version, seen, self._goes_on):
                break
            if not self._goes_on():
                return False
        else:
            raise UpstreamFailed("the files of results change all the time")
        counts = self._batch["request_counts"]
        self._batch["output_file_id"] = store.place.uri("output.jsonl") if counts["completed"] else None
        self._batch["error_file_id"] = store.place.uri("error.jsonl") if counts["failed"] else None
        status = "expired" if self._batch["expired_at"] else "completed"
        self._move("cancelled" if self._batch["cancelling_at"] else status)
        await self._save()
        log.info("a batch is over", extra=self._fields())
        return True

    async def _fail(self, why: RequestError) -> bool:
        self._batch = batch_object.failed(self._batch, [(None, why)], self._means.now())
        await self._save()
        log.info("a batch is over", extra=self._fields())
        return True

    # --- lines ---------------------------------------------------------------------------------

    def _source(self) -> Source:
        given = self._given
        assert given is not None, "the batch has an input"
        return Source(
            partial(self._store.read, given),
            given.size_bytes,
            f"{self._store.place.name}@{given.version}",
            self._means.settings.max_body_bytes,
        )

    def _progress(self) -> Progress:
        starts = self._store.parts(self._lease.version)
        return self._store.progress(self._lease.version, starts[-1]) if starts else Progress()

    async def _read(self, items: Iterator[Sequence[Item]]) -> Sequence[Item]:
        return await self._means.thread(next, items, ())

    async def _write(self, part: Part) -> None:
        if not await self._means.thread(self._store.put_part, self._lease.version, part):
            self._overtaken = True
            raise BatchLost("another worker has written the same part")
        self._batch = batch_object.counted(self._batch, part.progress)
        if _loop_s() - self._saved_s >= self._means.times.save_s:
            await self._save()

    # --- time ----------------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Keep the lease, and hear what becomes of the batch. Raises `BatchLost` once it is another's."""
        every_s, kept_s = self._means.times.lease_s / 4, _loop_s()
        while True:
            await asyncio.sleep(every_s)
            try:
                if not await self._means.thread(self._means.leases.renew, self._lease):
                    raise BatchLost("its lease was taken")
                kept_s = _loop_s()
                await self._look()
            except AwsFailed as error:
                if _loop_s() - kept_s > self._means.times.lease_s:
                    raise
                log.warning("the lease is not renewed yet", extra={"reason": str(error)})

    async def _look(self) -> None:
        """Whether the rest of the batch is not to be asked any more."""
        if self._given is None or not self._may_refuse():
            return
        cancelled = await self._means.thread(self._store.is_cancelled, self._given.modified)
        if not self._may_refuse():
            return
        if cancelled or self._batch["cancelling_at"]:
            self._move("cancelling")
            why, code = "The batch was cancelled before this was asked.", "batch_cancelled"
        elif self._means.now() >= self._batch["expires_at"]:
            self._batch = {**self._batch, "expired_at": int(self._means.now())}
            why, code = "The batch had expired before this was asked.", "batch_expired"
        else:
            return
        self._refusal = BadRequest(why, code=code)
        self._saved_s = -math.inf  # the next part tells it
        if self._window is not None:
            self._window.refuse(self._refusal)

    def _may_refuse(self) -> bool:
        status = self._batch.get("status")
        return self._refusal is None and status in {"validating", "in_progress", "cancelling"}

    async def _stop_in_time(self, window: Window) -> None:
        began_s = _loop_s()
        try:
            async with asyncio.timeout_at(self._stop_s):
                await self._shift.stopping.wait()
        except TimeoutError:
            had_s, grace_s = self._stop_s - began_s, (self._shift.deadline_s - self._stop_s) / 2
            window.stop(grace_s, head_is_late=had_s > grace_s)
        else:
            window.stop(self._means.settings.drain_timeout_s / 2)

    def _goes_on(self) -> bool:
        """Whether there is time left; for any thread."""
        return (
            not self._ended and not self._shift.stopping.is_set() and time.monotonic() < self._threads_stop_s
        )

    # --- batch.json ----------------------------------------------------------------------------

    def _move(self, status: str) -> None:
        self._batch = batch_object.moved(self._batch, status, self._means.now())

    async def _save(self) -> None:
        """Write batch.json as it is now. Raises `BatchLost` if another has written it."""
        seen = await self._means.thread(self._store.save, self._batch, self._seen)
        if seen is None:
            raise BatchLost("another worker has written batch.json")
        self._seen, self._saved_s = seen, _loop_s()

    def _fields(self) -> dict[str, Any]:
        counts = self._batch["request_counts"]
        return {
            "batch": self._store.place.id,
            "status": self._batch["status"],
            "attempt": self._lease.attempt,
            **counts,
        }


def _loop_s() -> float:
    return asyncio.get_running_loop().time()
