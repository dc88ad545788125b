"""A worker process of this machine that is asked through a unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Unpack

from gateway.upstreams import WorkerLost
from gateway.upstreams.keeper import KILL_GRACE_S, Keep, Keeper
from gateway.upstreams.launch import Launcher
from gateway.upstreams.process import WorkerProcess
from gateway.upstreams.proxy import Refused, SocketProxy
from handler.messages import Call, Reply, Request

NOTICE_S = 2.0
"""How long a broken connection may be ahead of the news that its process died."""


class LocalUpstream(Keeper):
    """At most one worker process at a time, behind a unix socket in a private folder."""

    def __init__(
        self, launcher: Callable[[Path], Launcher], environ: Mapping[str, str], **keep: Unpack[Keep]
    ) -> None:
        super().__init__(launcher, environ, **keep)
        self._proxy: SocketProxy | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """Ask the worker. Raises `WorkerLost` while it has answered nothing."""
        worker, proxy = self._worker, self._proxy
        if worker is None or proxy is None:
            raise WorkerLost("There is no worker.")
        loop = asyncio.get_running_loop()
        asked_s = loop.time()
        async with AsyncExitStack() as stack:
            try:
                reply = await stack.enter_async_context(proxy.call(request))
            except Refused:
                worker.leave()  # it may live on and finish what it holds
                raise
            except WorkerLost as lost:
                lost.worked_s = loop.time() - asked_s
                # Its connections may end before the news of its death: don't ask the dead again.
                await asyncio.wait({worker.exited}, timeout=NOTICE_S)
                if worker.exited.done():
                    self._forget(worker)
                raise
            if reply.status == 503 and worker.is_leaving():
                raise WorkerLost("The worker is stopping.")
            yield reply

    @property
    def askable(self) -> Mapping[str, Call]:
        """The worker, while it is ready."""
        worker, proxy = self._worker, self._proxy
        return {} if worker is None or proxy is None else {worker.path.name: proxy.call}

    def _told(self, worker: WorkerProcess) -> Mapping[str, str]:
        return {"PLATFORM": "http", "UDS": str(_socket(worker))}

    def _opened(self, worker: WorkerProcess) -> None:
        self._proxy = SocketProxy(_socket(worker))

    def _lost(self, worker: WorkerProcess) -> None:
        _socket(worker).unlink(missing_ok=True)
        if self._proxy is not None:
            task = asyncio.create_task(self._proxy.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            self._proxy = None

    async def _close(self) -> None:
        if self._closing:
            _, slow = await asyncio.wait(self._closing, timeout=KILL_GRACE_S)
            for task in slow:
                task.cancel()


def _socket(worker: WorkerProcess) -> Path:
    return worker.path.with_suffix(".sock")
