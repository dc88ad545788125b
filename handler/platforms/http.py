"""Plain HTTP: the gateway's local workers, load balancers, Kubernetes, a machine of one's own.

The server runs on the engine's loop, so a token crosses no thread on its way out.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import uvicorn
from prometheus_client import REGISTRY, CollectorRegistry

from handler import asgi, edge, metrics
from handler.auth import Keyring
from handler.drain import Drain
from handler.engine import Engine
from handler.errors import EngineFailed, StartError, json_reply
from handler.listener import listen, listen_unix
from handler.messages import Call, Reply, Request
from handler.phases import Phases
from handler.settings import Settings
from handler.supervision import Notifier

log = logging.getLogger(__name__)

KEEP_ALIVE_TIMEOUT_S = 75
"""Longer than proxies keep an idle connection (60 s is usual), so that theirs ends first."""

PROBES = ("/health", "/ready", "/ping")
"""Answered without a key; they say nothing but yes or no."""

LINGER_S = 0.5
"""What connections get after the drain's deadline: to be sent their last frame, or to be cut off."""


def open(settings: Settings) -> Http:  # noqa: A001 - each platform has one
    """The platform. Raises `NoResources` for a port that is taken, before a model is loaded for it."""
    if not settings.uds and settings.port:
        listen(settings.host, settings.port).close()
    return Http(settings)


class Http:
    """One worker behind a port, or behind a unix socket."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def fit(self) -> None:
        """Nothing is asked of the machine."""

    def prepare(self) -> None:
        """Nothing takes time."""

    def run(self, engine: Engine, phases: Phases, notifier: Notifier) -> None:
        """Serve until SIGTERM or SIGINT, then drain. Raises `EngineFailed` when the engine dies."""
        settings = self._settings
        listener = listen_unix(Path(settings.uds)) if settings.uds else listen(settings.host, settings.port)
        server = _Server(settings, engine, phases)
        engine.dead.add_done_callback(lambda _: server.stop())
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda *_: server.stop())
        serving = engine.submit(server.serve(listener, notifier))
        notifier.ready(phases.report())
        log.info("ready", extra={"address": listener.getsockname()})
        serving.result()
        if engine.is_dead:
            raise EngineFailed("the engine died; what it held was answered with an error")

    def fail(self, failure: StartError, notifier: Notifier) -> None:
        """Answer every request with `failure`."""
        raise failure


class _Server:
    def __init__(
        self, settings: Settings, engine: Engine, phases: Phases, registry: CollectorRegistry = REGISTRY
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._engine = engine
        self._drain = Drain()
        self._stop = asyncio.Event()
        metrics.register(
            phases, running=engine.running, in_flight=lambda: self._drain.in_flight, registry=registry
        )

    def stop(self) -> None:
        """Begin to drain; any thread may say so."""
        with suppress(RuntimeError):  # a second signal, after the engine's loop has closed
            self._engine.loop.call_soon_threadsafe(self._stop.set)

    async def serve(self, listener: socket.socket, notifier: Notifier) -> None:
        """Answer requests until `stop`, then finish what runs."""
        server = uvicorn.Server(
            uvicorn.Config(
                self._app(),
                loop="none",
                http="httptools",
                ws="none",
                lifespan="off",
                proxy_headers=False,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_TIMEOUT_S,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await self._stop.wait()
        deadline_s = asyncio.get_running_loop().time() + self._settings.drain_timeout_s
        notifier.stopping()
        log.info("draining", extra={"in_flight": self._drain.in_flight})
        ended = await self._drain.finish(self._settings.drain_timeout_s)
        log.info("drained", extra={"ended_early": ended})
        # Whoever has sent half a body or reads no more is no request that could be finished.
        left_s = deadline_s - asyncio.get_running_loop().time()
        server.config.timeout_graceful_shutdown = max(LINGER_S, left_s)  # type: ignore[assignment] # a float will do
        server.should_exit = True
        await serving

    def _app(self) -> asgi.App:
        settings = self._settings
        openai = edge.openai(self._engine.call, engine_is_dead=lambda: self._engine.is_dead)
        guarded = settings.auth and settings.api_key and not settings.uds  # a unix socket has an owner
        keys = Keyring.of(settings.api_key) if guarded and settings.api_key else None

        def check(request: Request) -> None:
            if keys is not None and request.path not in PROBES:
                keys.check(request)

        return asgi.serve(
            _with_probes(self._drain.wrap(openai), self._engine, self._registry),
            max_body_bytes=settings.max_body_bytes,
            check=check,
            front=partial(edge.front, cors_origins=settings.cors_origins),
        )


def _with_probes(call: Call, engine: Engine, registry: CollectorRegistry) -> Call:
    @asynccontextmanager
    async def probed(request: Request) -> AsyncIterator[Reply]:
        if request.method in {"GET", "HEAD"} and request.path in PROBES:
            yield (
                json_reply(503, {"status": "dead"})
                if engine.is_dead
                else json_reply(200, {"status": "ready"})
            )
        elif request.method == "GET" and request.path == "/metrics":
            yield metrics.exposition(registry)
        else:
            async with call(request) as reply:
                yield reply

    return probed
