"""A gateway that answers: the signals that it heeds, and how it stops."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
from contextlib import suppress

from gateway.app import Gateway
from gateway.assembly import Assembly
from gateway.commands import INTERRUPTED
from gateway.console import Console
from gateway.endpoints.endpoints import Endpoints
from gateway.settings import GatewaySettings
from gateway.upstreams.events import Event, StartFailed, Starting
from gateway.upstreams.pool import KILL_GRACE_S
from handler.errors import BadSettings, NotAdmitted
from handler.server import Server, config
from handler.supervision import Notifier

log = logging.getLogger("gateway")


class Running:
    """Runs a gateway until a signal, or until the first worker of its only endpoint can never start."""

    def __init__(self, settings: GatewaySettings, console: Console) -> None:
        self._settings = settings
        self._console = console
        self._assembly: Assembly | None = None
        self._notifier = Notifier(None)
        self._servers: list[Server] = []
        self._reloads: set[asyncio.Task[None]] = set()
        self._starts = 0
        self._stopping = False
        self.exit_code = 0

    def begin(self, assembly: Assembly, notifier: Notifier) -> None:
        """Heed signals, and say that requests are taken."""
        self._assembly, self._notifier = assembly, notifier
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop)
        loop.add_signal_handler(signal.SIGINT, self.interrupt)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        if len(assembly.endpoints) > 1:
            self._console.shows_all()
        elif self._settings.start != "now":
            self._console.waits_for_request()
        notifier.ready({})
        if self._stopping:  # a worker was fast
            self.stop()

    async def answer(self, gateway: Gateway, listener: socket.socket) -> None:
        """Answer whoever connects to `listener`, until it stops."""
        settings = self._settings
        app = gateway.app(max_body_bytes=settings.max_body_bytes, cors_origins=settings.cors_origins)
        server = Server(config(app, shutdown_s=math.ceil(settings.drain_timeout_s + 2 * KILL_GRACE_S)))
        server.should_exit = self._stopping
        self._servers.append(server)
        await server.serve(sockets=[listener])

    def tell(self, endpoint_id: str, event: Event) -> None:
        """Tell what happens to workers, and stop where the only endpoint's first can never start."""
        self._console(endpoint_id, event)
        self._starts += isinstance(event, Starting)
        first = self._settings.endpoints_file is None and self._settings.start == "now" and self._starts == 1
        if first and isinstance(event, StartFailed) and event.permanent:
            self.exit_code = event.exit_code  # nobody has been served: say so where it was started
            self.stop()

    def stop(self) -> None:
        """Take nothing more, let what runs finish, then end."""
        if not self._stopping:
            log.info("stopping", extra={"drain_timeout_s": self._settings.drain_timeout_s})
        self._stopping = True
        self._notifier.stopping()
        for server in self._servers:
            server.should_exit = True
        if self._assembly is not None:
            self._assembly.stop()

    def interrupt(self) -> None:
        """Stop; the second time at once."""
        if self._stopping and self._assembly is not None:
            self._assembly.endpoints.kill()
            os._exit(INTERRUPTED)
        self.stop()
        log.info("Ctrl-C again ends what still runs")

    def reload(self) -> None:
        """Read the endpoints' description again. What comes of it is in the log."""
        assert self._assembly is not None, "a signal that is heeded since"
        task = asyncio.create_task(self._reload(self._assembly.endpoints))
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self, endpoints: Endpoints) -> None:
        with suppress(BadSettings, NotAdmitted):
            await endpoints.reload()
