"""The worker's HTTP server and the gateway's, as they are, around a scripted application."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from prometheus_client import CollectorRegistry

from gateway.accounts.keys import Keys
from gateway.settings import GatewaySettings
from gateway.upstreams.link import Link
from handler.asgi import call_app, serve
from handler.engine import Engine
from handler.listener import listen, listen_unix
from handler.phases import Phases
from handler.platforms import http
from handler.platforms.http import Http, _Server
from handler.platforms.lobby import Lobby
from handler.server import Server, config
from handler.settings import Settings
from handler.supervision import Notifier
from tests import gateways
from tests.raw_http import ask
from tests.scripted_app import ScriptedApp

HOST = "127.0.0.1"
COLD_START_S = 4.25


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

    def submit(self, work: Coroutine[Any, Any, None]) -> concurrent.futures.Future[None]:
        """Run `work` on the engine's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def capacity(self) -> int:
        """How many requests it works on at once."""
        return 8

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


@dataclass(slots=True)
class StartingWorker:
    """A worker whose engine comes when the test says so. It serves on `port`."""

    app: ScriptedApp
    settings: Settings
    platform: Http
    lobby: Lobby
    port: int
    engine: ScriptedEngine | None = None
    server: _Server | None = None
    serving: asyncio.Task[None] | None = None

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to it."""
        return await asyncio.open_connection(HOST, self.port)

    async def held(self, count: int) -> None:
        """Return once `count` requests wait."""
        while self.lobby.waiting != count:
            await ask(self, "GET", "/health")  # a round trip through its loop

    def become_ready(self) -> None:
        """The model is loaded; the engine's loop is the test's."""
        phases = Phases(0.0, clock=lambda: COLD_START_S)
        phases.done()
        engine = cast("Engine", ScriptedEngine(self.app, self.settings))
        self.engine = cast("ScriptedEngine", engine)
        self.server = _Server(self.settings, engine, phases, CollectorRegistry())
        self.serving = asyncio.create_task(
            asyncio.to_thread(self.platform._serve, self.server, engine, phases, Notifier(None))
        )

    async def close(self) -> None:
        """End it, drained if it was ready."""
        if self.server is None or self.serving is None:
            await asyncio.to_thread(self.lobby.close, 0.0)
        else:
            self.server.stop()
            await self.serving


@asynccontextmanager
async def starting(
    app: ScriptedApp, environ: Mapping[str, str] | None = None
) -> AsyncIterator[StartingWorker]:
    """A worker on a port of its own that is about to load its model."""
    settings = Settings.from_environ({"PORT": "0", "DRAIN_TIMEOUT_S": "0", **(environ or {})})
    platform = http.open(settings)
    platform.prepare()
    assert platform._lobby is not None
    assert platform._listener is not None
    port = platform._listener.getsockname()[1]
    worker = StartingWorker(app, settings, platform, platform._lobby, port)
    try:
        yield worker
    finally:
        await worker.close()
        platform._listener.close()


@asynccontextmanager
async def application(app: ScriptedApp, uds: Path) -> AsyncIterator[None]:
    """The application by itself at the socket `uds`: an engine for a worker in another process."""
    server = Server(config(serve(call_app(app), max_body_bytes=1 << 30), idle_s=5, shutdown_s=1, links=True))
    serving = asyncio.create_task(server.serve(sockets=[listen_unix(uds)]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


@asynccontextmanager
async def gateway(app: ScriptedApp, key: str, uds: Path) -> AsyncIterator[int]:
    """The port of a gateway that wants `key` and asks a worker at the socket `uds`."""
    settings = GatewaySettings.from_environ({"DRAIN_TIMEOUT_S": "0"})
    async with worker(app, {"UDS": str(uds)}):
        link = Link(uds)
        gate = gateways.one(link.call, Keys(key), endpoint_id=settings.endpoint_id)
        asgi = gate.app(max_body_bytes=settings.max_body_bytes, cors_origins=())
        server = Server(config(asgi, shutdown_s=2))
        listener = listen(HOST, 0)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await serving
            await link.close()
