"""Worker processes of this machine that are asked through unix sockets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from gateway.upstreams import WorkerLost
from gateway.upstreams.launch import Launcher
from gateway.upstreams.link import Link
from gateway.upstreams.pool import KILL_GRACE_S, Keep, WorkerPool
from gateway.upstreams.proxy import Refused
from gateway.upstreams.worker import Worker
from handler.messages import Call, Reply, Request

log = logging.getLogger("gateway")

NOTICE_S = 2.0
"""How long a broken connection may be ahead of the news that its process died."""
PROBE_EVERY_S = 5.0
HUNG_S = 30.0
"""A worker that answers no `GET /ping` for so long hangs. It has nothing to do with how long an answer takes:
the worker's loop says it, which is held up for moments by a prefill, on a CPU too (`handler.core_thread`)."""


class LocalPool(WorkerPool):
    """Workers behind unix sockets in a private folder. One that hangs is killed, and replaced."""

    def __init__(
        self,
        launcher: Callable[[Path], Launcher],
        environ: Mapping[str, str],
        keep: Keep,
        *,
        probe_every_s: float = PROBE_EVERY_S,
        hung_s: float = HUNG_S,
    ) -> None:
        super().__init__(launcher, environ, keep)
        self._probe_every_s = probe_every_s
        self._hung_s = hung_s
        self._links: dict[Worker, Link] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """Ask the least loaded worker. Raises `WorkerLost` while it has answered nothing."""
        ready = [worker for worker in self._links if worker.takes]
        if not ready:
            raise WorkerLost("There is no worker.")
        worker = min(ready, key=lambda worker: (worker.in_flight / worker.slots, worker.number))
        worker.begin()
        self._look_soon()
        try:
            async with AsyncExitStack() as stack:
                yield await self._ask(worker, request, stack)
        finally:
            worker.finish()
            self._freed(worker)

    @property
    def askable(self) -> Mapping[str, Call]:
        """The ready workers."""
        return {worker.id: link.call for worker, link in self._links.items() if worker.serves}

    async def _ask(self, worker: Worker, request: Request, stack: AsyncExitStack) -> Reply:
        asked_s = self._loop.time()
        process = worker.process
        try:
            reply = await stack.enter_async_context(self._links[worker].call(request))
        except Refused:
            process.leave()  # it may live on and finish what it holds
            raise
        except WorkerLost as lost:
            lost.worked_s = self._loop.time() - asked_s
            # Its connection may end before the news of its death: don't ask the dead again.
            worker.doubts += 1
            try:
                await asyncio.wait({process.exited}, timeout=NOTICE_S)
            finally:
                worker.doubts -= 1
            raise
        if reply.status == 503 and process.is_leaving():
            raise WorkerLost("The worker is stopping.")
        worker.answered = True
        return reply

    async def _watch(self, worker: Worker) -> None:
        link = self._links[worker]
        while True:
            await asyncio.sleep(self._probe_every_s)
            try:
                async with asyncio.timeout(self._hung_s):
                    with suppress(WorkerLost):  # it ends, and its process says so
                        async with link.call(Request("GET", "/ping")):
                            pass
            except TimeoutError:
                why = f"it has not answered for {self._hung_s:g} s"
                log.error("worker hangs", extra={"worker": worker.id, "reason": why})  # noqa: TRY400 - no news in a trace
                worker.process.kill(why)
                return

    def _told(self, worker: Worker) -> Mapping[str, str]:
        return {"PLATFORM": "http", "UDS": str(_socket(worker))}

    def _opened(self, worker: Worker) -> None:
        self._links[worker] = Link(_socket(worker))

    def _retire(self, worker: Worker, *, retired: bool) -> None:
        """Nothing to tell the worker: it is not asked any more."""

    def _lost(self, worker: Worker) -> None:
        _socket(worker).unlink(missing_ok=True)
        if link := self._links.pop(worker, None):
            task = self._loop.create_task(link.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close(self) -> None:
        if self._closing:
            _, slow = await asyncio.wait(self._closing, timeout=KILL_GRACE_S)
            for task in slow:
                task.cancel()


def _socket(worker: Worker) -> Path:
    return worker.path.with_suffix(".sock")
