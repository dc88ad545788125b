"""A gateway from its first socket to its last answer: what it is made of, and the signals that it heeds."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from typing import Any

from gateway import batch_table, door, key_table
from gateway.admin import Admin
from gateway.alone import alone
from gateway.app import Gateway, Part
from gateway.batch_run import Means
from gateway.batch_runs import BatchRuns
from gateway.batches import Batches
from gateway.clients import Clients
from gateway.console import Address, Console
from gateway.control import Control
from gateway.endpoints import Changes, Endpoints
from gateway.endpoints_file import Description, describe
from gateway.file_store import FileStore
from gateway.files import Files
from gateway.jobs import Jobs
from gateway.jobs.account import Account
from gateway.jobs.routes import JobRoutes, worker_counts
from gateway.jobs.webhooks import Allowed, Webhooks
from gateway.key_table import Following
from gateway.keys import Keys
from gateway.limits import Limits
from gateway.metering import Metering
from gateway.metrics import Metrics
from gateway.page import Page
from gateway.page.session import Session
from gateway.parts import OpenAI, Operations
from gateway.scrape import Target
from gateway.settings import GatewaySettings
from gateway.site import Site
from gateway.store import Store
from gateway.upstreams import folder
from gateway.upstreams.events import Event, StartFailed, Starting
from gateway.upstreams.pool import KILL_GRACE_S
from gateway.usage import Prices
from handler import traces
from handler.errors import BadSettings, NotAdmitted
from handler.listener import listen
from handler.server import Server, config
from handler.supervision import Notifier

INTERRUPTED = 130


async def serve(
    settings: GatewaySettings, description: Description, environ: Mapping[str, str], worker: Sequence[str]
) -> int:
    """Listen, keep workers, each a `worker` command, and answer until a signal comes.

    Returns 0 once drained, or the exit code of a first worker that can never start.
    """
    traced = traces.open(settings)
    with (
        listen(settings.host, settings.port) as listener,  # before a key is made that nobody would see
        alone(settings.database_url),
        closing(Store.open(settings.database_url)) as store,
        door.listen(settings.data_dir) as owners,
    ):
        folder.sweep()
        metrics, limits, keys = Metrics(), Limits(), Keys(settings.api_key)
        made = None if settings.api_key else await store.write(partial(key_table.first, now_s=time.time()))
        following = Following(keys, store)
        await following.look()
        console = Console(_addresses(settings, description, listener, made), sys.stdout, sys.stderr)
        async with Metering(store, keys, limits, tell=metrics.used) as metering:
            site = Site(
                worker,
                environ,
                logs=settings.data_dir / "logs",
                metrics=metrics,
                traces=traced,
                clients=Clients(keys, limits, metering),
                tell=lambda endpoint_id, event: running.tell(endpoint_id, event),  # noqa: PLW0108 - made below
            )
            endpoints = Endpoints(description.endpoints, site.serve, partial(_again, environ))
            metrics.watch(
                lambda: [endpoint.status() for endpoint in endpoints.values()],
                partial(_targets, endpoints),
            )
            account = Account(keys, limits, partial(_terms, endpoints))
            webhooks = Allowed.of(settings.webhook_hosts)
            jobs = Jobs(
                store,
                endpoints,
                costs=account,
                limit=settings.jobs_limit,
                webhooks=Webhooks(store, webhooks),
                drain_s=settings.drain_timeout_s,
            )
            endpoints.listen(partial(_wake, jobs))
            control = Control(endpoints, jobs.counts)
            files = FileStore(
                store,
                settings.data_dir / "files",
                max_file_bytes=settings.max_file_bytes,
                max_stored_bytes=settings.max_stored_bytes,
            )
            batches = BatchRuns(Means(store, files, keys, endpoints, settings.max_body_bytes))
            parts: list[Part] = [
                Files(files, endpoints, keys, batch_table.check_delete),
                Batches(batches, endpoints, keys),
                JobRoutes(jobs, endpoints, account, webhooks, partial(_workers, endpoints)),
                OpenAI(endpoints),
                Admin(store, following),
                control,
                Operations(keys, metrics, endpoints, open_metrics=_is_loopback(settings.host)),
                Session(keys, endpoints),
                Page.open(),
            ]
            stops = [control.stop, jobs.stop_taking, batches.stop]
            running = Running(settings, console, endpoints, stops)
            async with endpoints, jobs, batches, beside(following.run()):
                running.begin(Notifier(environ.get("NOTIFY_SOCKET")))
                await asyncio.gather(
                    running.answer(Gateway(parts, keys, metrics, limits, traced), listener),
                    running.answer(Gateway(parts, door.Owner(), metrics, limits, traced), owners),
                )
        console.close()
        if traced is not None:
            traced.close()
        return running.exit_code


class Running:
    """A gateway that answers: what it is told meanwhile, and how it stops; `stops` hear of that."""

    def __init__(
        self,
        settings: GatewaySettings,
        console: Console,
        endpoints: Endpoints,
        stops: Sequence[Callable[[], None]],
    ) -> None:
        self._settings = settings
        self._console = console
        self._endpoints = endpoints
        self._stops = stops
        self._notifier = Notifier(None)
        self._servers: list[Server] = []
        self._reloads: set[asyncio.Task[None]] = set()
        self._starts = 0
        self._stopping = False
        self.exit_code = 0

    def begin(self, notifier: Notifier) -> None:
        """Heed signals, and say that requests are taken."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop)
        loop.add_signal_handler(signal.SIGINT, self.interrupt)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        if len(self._endpoints) > 1:
            self._console.shows_all()
        elif self._settings.start != "now":
            self._console.waits_for_request()
        self._notifier = notifier
        notifier.ready({})

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
        self._stopping = True
        self._notifier.stopping()
        for server in self._servers:
            server.should_exit = True
        for stop in self._stops:
            stop()
        self._endpoints.stop_taking()

    def interrupt(self) -> None:
        """Stop; the second time at once."""
        if self._stopping:
            self._endpoints.kill()
            os._exit(INTERRUPTED)
        self.stop()

    def reload(self) -> None:
        """Read the endpoints' description again. What comes of it is in the log."""
        task = asyncio.create_task(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        with suppress(BadSettings, NotAdmitted):
            await self._endpoints.reload()


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """`work` beside the block, and cancelled after it."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


def _again(environ: Mapping[str, str]) -> Description:
    settings, description = describe(environ)
    if settings.endpoints_file is None:
        raise BadSettings(["no ENDPOINTS_FILE is set: what the environment says holds until the next start"])
    return description


def _wake(jobs: Jobs, changes: Changes) -> None:
    """Begin what was left for endpoints that are there again."""
    for endpoint_id in changes.added:
        jobs.wake(endpoint_id)


def _terms(endpoints: Endpoints, endpoint_id: str) -> tuple[str, Prices]:
    """The model of an endpoint, and what it costs."""
    settings = endpoints.described(endpoint_id)
    return settings.model_id, Prices(settings.price_input, settings.price_output)


def _workers(endpoints: Endpoints, endpoint_id: str) -> Mapping[str, int]:
    """The workers of an endpoint, as RunPod counts them."""
    return worker_counts((view.state, view.in_flight) for view in endpoints[endpoint_id].workers.views)


def _targets(endpoints: Endpoints) -> list[Target]:
    """The workers that say how they are."""
    return [
        Target(endpoint_id, worker_id, call)
        for endpoint_id, endpoint in endpoints.items()
        for worker_id, call in endpoint.workers.askable.items()
    ]


def _addresses(
    settings: GatewaySettings, description: Description, listener: socket.socket, made: str | None
) -> dict[str, Address]:
    """Where each endpoint is; `made` is a key that is to be shown."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - shown, not bound
    base = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    return {
        one.id: Address(
            f"{base}/v2/{one.id}/openai/v1",
            one.settings.model_id,
            made,
            given=settings.api_key is not None,
        )
        for one in description.endpoints
    }


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
