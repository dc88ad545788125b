"""The worker's HTTP server, as it is, around a scripted application instead of vLLM's."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from prometheus_client import CollectorRegistry

from handler.asgi import call_app
from handler.engine import Engine
from handler.listener import listen, listen_unix
from handler.phases import Phases
from handler.platforms.http import _Server
from handler.settings import Settings
from handler.supervision import Notifier
from tests.scripted_app import ScriptedApp

HOST = "127.0.0.1"


class ScriptedEngine:
    """What the platforms ask of an engine: a call, the loop it lives on, and whether it lives."""

    def __init__(self, app: ScriptedApp, settings: Settings) -> None:
        self._app = app
        self.loop = asyncio.get_running_loop()
        self.call = call_app(app, keep_alive_s=settings.keep_alive_s)
        self.dead: concurrent.futures.Future[None] = concurrent.futures.Future()

    @property
    def is_dead(self) -> bool:
        """Whether the test has killed it."""
        return self.dead.done()

    def running(self) -> int:
        """How many calls of the application have not ended."""
        return sum(seen.ended is None for seen in self._app.seen)


@dataclass(frozen=True, slots=True)
class ServedWorker:
    """A worker that serves on `port` of the loopback, or on `uds`."""

    engine: ScriptedEngine
    server: _Server
    serving: asyncio.Task[None]
    port: int
    uds: Path | None

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to it."""
        if self.uds is not None:
            return await asyncio.open_unix_connection(str(self.uds))
        return await asyncio.open_connection(HOST, self.port)


@asynccontextmanager
async def worker(app: ScriptedApp, environ: Mapping[str, str] | None = None) -> AsyncIterator[ServedWorker]:
    """A worker with the settings of `environ`, drained at the end."""
    settings = Settings.from_environ({"DRAIN_TIMEOUT_S": "0", **(environ or {})})
    uds = Path(settings.uds) if settings.uds else None
    listener = listen_unix(uds) if uds else listen(HOST, 0)
    phases = Phases(0.0)
    phases.done()
    engine = ScriptedEngine(app, settings)
    server = _Server(settings, cast("Engine", engine), phases, CollectorRegistry())
    serving = asyncio.create_task(server.serve(listener, Notifier(None)))
    try:
        yield ServedWorker(engine, server, serving, 0 if uds else listener.getsockname()[1], uds)
    finally:
        server.stop()
        await serving
