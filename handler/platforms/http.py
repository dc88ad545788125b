"""Plain HTTP: the gateway's local workers, load balancers, Kubernetes, a machine of one's own.

The server runs on the engine's loop, so a token crosses no thread on its way out. Until the engine
is there, a `Lobby` has the port.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from prometheus_client import REGISTRY, CollectorRegistry

from handler import edge, metrics, slots, traces
from handler.bridge import across
from handler.drain import RETRY_AFTER_S, STOPPING, Drain
from handler.engine import Engine
from handler.errors import EngineFailed, NotAdmitted, StartError, StartFailed
from handler.listener import listen, listen_unix
from handler.phases import Phases
from handler.platforms import door
from handler.platforms.lobby import Lobby
from handler.platforms.stop import from_elsewhere, on_signal
from handler.server import Server, config, end
from handler.settings import Settings
from handler.supervision import Notifier
from handler.waiting import kept_alive

log = logging.getLogger(__name__)

FLUSH_S = 2.0
"""What is answered may still be on its way to a client that reads slowly."""


def open(settings: Settings) -> Http:  # noqa: A001 - each platform has one
    """The platform, with its ports. Raises `NoResources` for one that is taken, before a model is loaded."""
    if settings.uds:
        return Http(settings)
    listener = listen(settings.host, settings.port)
    if settings.port_health is None or settings.port_health == settings.port:
        return Http(settings, listener)
    try:
        health = listen(settings.host, settings.port_health, setting="PORT_HEALTH")
    except StartError:
        listener.close()
        raise
    return Http(settings, listener, health)


class Http:
    """One worker behind a port, or behind a unix socket.

    Who connects to the socket knows by `NOTIFY_SOCKET` when there is something to connect to, and
    why there is nothing; on a port that is answered to whoever asks.
    """

    def __init__(
        self, settings: Settings, listener: socket.socket | None = None, health: socket.socket | None = None
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._health = health
        self._lobby: Lobby | None = None

    def fit(self) -> None:
        """Nothing is asked of the machine."""

    def prepare(self) -> None:
        """Answer the probes, and hold what comes."""
        if self._listener is not None:
            self._lobby = Lobby(self._settings, self._listener, self._health)
            self._lobby.open()
            log.info("listening", extra={"address": self._listener.getsockname()})

    def run(self, engine: Engine, phases: Phases, notifier: Notifier) -> None:
        """Serve until SIGTERM or SIGINT, then drain. Raises `EngineFailed` when the engine dies."""
        server = _Server(self._settings, engine, phases)
        engine.dead.add_done_callback(lambda _: server.stop())
        on_signal(server.stop)
        self._serve(server, engine, phases, notifier)
        if engine.is_dead:
            raise EngineFailed("the engine died; what it held was answered with an error")

    def _serve(self, server: _Server, engine: Engine, phases: Phases, notifier: Notifier) -> None:
        listener = self._listener or listen_unix(Path(self._settings.uds or ""))
        address = listener.getsockname()
        serving = engine.submit(server.serve(listener, notifier))
        if self._lobby is not None:
            self._lobby.admit(
                across(server.call, engine.loop),
                phases.report(),
                state=server.state,
            )
        notifier.ready(phases.report(), self._settings.max_concurrency or engine.capacity())
        log.info("ready", extra={"address": address})
        serving.result()
        if self._lobby is not None:
            self._lobby.close(door.LINGER_S)

    def fail(self, failure: StartError, notifier: Notifier) -> None:
        """Answer every request with `failure` until SIGTERM or SIGINT. Raises it on a unix socket."""
        if self._lobby is None:
            self.prepare()
        if self._lobby is None:
            raise failure
        stop: SimpleQueue[None] = SimpleQueue()  # what a signal handler may use, whatever it interrupts
        on_signal(partial(stop.put, None))
        self._lobby.refuse(partial(StartFailed, failure))
        notifier.status(f"can't start: {failure}")
        stop.get()
        notifier.stopping()
        self._lobby.close(door.LINGER_S)

    def refuse(self, failure: StartError | None) -> None:
        """Answer what is held with `failure`; None: that the worker is stopping."""
        if self._lobby is not None and self._lobby.listens:
            self._lobby.refuse(_stopping if failure is None else partial(StartFailed, failure))
            self._lobby.emptied(door.LINGER_S)


class _Server:
    def __init__(
        self, settings: Settings, engine: Engine, phases: Phases, registry: CollectorRegistry = REGISTRY
    ) -> None:
        self._registry = registry
        self._settings = settings
        self._engine = engine
        self._drain = Drain()
        self._stop = asyncio.Event()
        limited = settings.max_concurrency
        call = engine.call if limited is None else slots.limit(engine.call, limited)
        call = edge.openai(call, engine_is_dead=lambda: engine.is_dead)
        if limited is not None:
            call = kept_alive(call, settings.keep_alive_s)
        self.call = self._drain.wrap(call)
        metrics.register(
            phases, running=engine.running, in_flight=lambda: self._drain.in_flight, registry=registry
        )

    def stop(self) -> None:
        """Begin to drain; any thread may say so."""
        from_elsewhere(self._engine.loop, self._stop.set)()

    async def serve(self, listener: socket.socket, notifier: Notifier) -> None:
        """Answer requests until `stop`, then finish what runs."""
        app = door.application(
            self.call, self._settings, self.state, self._registry, followed=traces.here(self._settings)
        )
        server = Server(config(app, links=self._settings.uds is not None))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await self._stop.wait()
        deadline_s = asyncio.get_running_loop().time() + self._settings.drain_timeout_s
        notifier.stopping()
        log.info("draining", extra={"in_flight": self._drain.in_flight})
        ended = await self._drain.finish(self._settings.drain_timeout_s)
        log.info("drained", extra={"ended_early": ended})
        # What is open now has been answered, or has sent half a body, which may never be a request.
        left_s = deadline_s - asyncio.get_running_loop().time()
        end(server, min(max(door.LINGER_S, left_s), FLUSH_S))
        await serving

    def state(self) -> str:
        """One of those of `door.State`; for any thread."""
        if self._engine.is_dead:
            return "dead"
        return "draining" if self._stop.is_set() else "ready"


def _stopping() -> NotAdmitted:
    return NotAdmitted("The worker is stopping.", retry_after_s=RETRY_AFTER_S, code=STOPPING)
