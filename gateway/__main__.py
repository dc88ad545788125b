"""`python -m gateway`: settings, database, listener, upstream, server. Exit codes are sysexits'."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import math
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from gateway import key_table
from gateway.admin import Admin
from gateway.alone import alone
from gateway.app import Gateway, Part
from gateway.clients import Clients
from gateway.commands import keys as keys_command
from gateway.commands import usage as usage_command
from gateway.console import Address, Console
from gateway.endpoint import Endpoint
from gateway.endpoints import Endpoints
from gateway.key_table import Following
from gateway.keys import Keys
from gateway.limits import Limits
from gateway.metering import Metering
from gateway.metrics import EndpointMetrics, Metrics
from gateway.page import Page
from gateway.page.session import Session
from gateway.parts import OpenAI, Operations
from gateway.scrape import Target
from gateway.settings import UPSTREAMS, GatewaySettings
from gateway.store import Store
from gateway.upstreams.control_plane import ControlPlane
from gateway.upstreams.events import Event, StartFailed
from gateway.upstreams.keeper import KILL_GRACE_S, Keep, Keeper
from gateway.upstreams.launch import Fresh, Launcher, WarmParent
from gateway.upstreams.line import Line
from gateway.upstreams.local import LocalUpstream
from gateway.upstreams.runpod import RunpodUpstream
from gateway.usage import Prices
from handler import baked, early, logs
from handler.admission import Admission
from handler.errors import StartError
from handler.listener import listen
from handler.server import Server, config
from handler.usage import metered
from handler.waiting import Room

WORKER = (sys.executable, "-m", "handler")
INTERRUPTED = 130
COMMANDS = (keys_command, usage_command)
"""Those beside `serve`, each a module of `gateway.commands`."""


def main(argv: Sequence[str] | None = None, worker: Sequence[str] = WORKER) -> int:
    """Run the gateway in front of `worker`, a command; returns an exit code of sysexits.h."""
    parser = argparse.ArgumentParser(
        prog="python -m gateway",
        description="Serve an OpenAI-compatible URL. Settings come from the environment.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serving = commands.add_parser("serve", help="serve; also without a command")
    serving.add_argument("--upstream", choices=UPSTREAMS, help="how the worker is asked (UPSTREAM)")
    for command in COMMANDS:
        command.add(commands)
    args = parser.parse_args(argv)
    given = {"UPSTREAM": args.upstream} if getattr(args, "upstream", None) else {}
    try:
        if "run" in args:
            return int(args.run(args, os.environ))
        settings = GatewaySettings.from_environ({**os.environ, **baked.names(os.environ), **given})
        logs.to_stderr("gateway", settings.log_level)
        logs.to_stderr("handler", settings.log_level)
        logs.to_stderr("uvicorn", "WARNING")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve(settings, os.environ, worker))
    except StartError as error:
        print(f"firsttoken: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before the loop took over
        return INTERRUPTED


async def serve(settings: GatewaySettings, environ: Mapping[str, str], worker: Sequence[str]) -> int:
    """Listen, keep the worker, and answer until a signal comes.

    Returns 0 once drained, or the exit code of a first worker that can never start.
    """
    with (
        listen(settings.host, settings.port) as listener,  # before a key is made that nobody would see
        alone(settings.database_url),
        closing(Store.open(settings.database_url)) as store,
    ):
        return await answer(settings, environ, worker, listener, store)


async def answer(
    settings: GatewaySettings,
    environ: Mapping[str, str],
    worker: Sequence[str],
    listener: socket.socket,
    store: Store,
) -> int:
    """`serve`, with what it has opened."""
    keys = Keys(settings.api_key)
    first = None if settings.api_key else await store.write(partial(key_table.first, now_s=time.time()))
    limits = Limits()
    following = Following(keys, store)
    await following.look()
    metrics = Metrics()
    own = metrics.endpoint(settings.endpoint_id)
    address = Address(
        _base_url(settings, listener), settings.model_id, first, given=settings.api_key is not None
    )
    console = Console(address, sys.stdout, sys.stderr)
    exit_code = 0

    def tell(event: Event) -> None:
        console(event)
        own.tell(event)
        if (
            isinstance(event, StartFailed)
            and event.permanent
            and settings.start == "now"
            and upstream.starts == 1
        ):
            nonlocal exit_code
            exit_code = event.exit_code  # nobody has been served: say so where it was started
            stop()

    upstream = open_upstream(settings, environ, worker, own, tell)
    admission = Admission(
        upstream,
        room=Room(
            limit=settings.queue_limit,
            others=lambda: upstream.in_line,
            tell_waited_s=own.held_s.observe,
        ),
        queue_timeout_s=settings.queue_timeout_s,
        keep_alive_s=settings.keep_alive_s,
        check=partial(early.check, model=early.only_model(settings.model_id, environ)),
    )
    operations = Operations(
        keys,
        metrics,
        health=lambda: {
            "status": "ok",
            **upstream.health,
            "waiting": admission.waiting,
        },
        open_metrics=_is_loopback(settings.host),
    )
    metering = Metering(store, keys, limits)
    call = Clients(keys, limits, metering).call(
        metered(admission.call, own.count),
        endpoint_id=settings.endpoint_id,
        model_id=settings.model_id,
        prices=Prices(settings.price_input, settings.price_output),
    )
    endpoints = Endpoints([Endpoint(settings, admission.call, call, OneWorker(upstream, admission))])
    metrics.watch(
        lambda: [endpoint.status() for endpoint in endpoints.values()],
        lambda: [Target(settings.endpoint_id, name, call) for name, call in upstream.askable.items()],
    )
    parts: list[Part] = [
        OpenAI(endpoints),
        Admin(store, following),
        operations,
        Session(keys, endpoints),
        Page.open(),
    ]
    gateway = Gateway(parts, keys, metrics, limits)
    app = gateway.app(max_body_bytes=settings.max_body_bytes, cors_origins=settings.cors_origins)
    shutdown_s = math.ceil(settings.drain_timeout_s + 2 * KILL_GRACE_S)
    server = Server(config(app, shutdown_s=shutdown_s))

    def stop() -> None:
        server.should_exit = True
        upstream.stop_taking()

    def interrupt() -> None:
        if server.should_exit:  # a second Ctrl-C
            upstream.kill()
            os._exit(INTERRUPTED)
        stop()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_signal_handler(signal.SIGINT, interrupt)
    async with metering, upstream, running(following.run()):
        if settings.start != "now":
            console.waits_for_request()
        await server.serve(sockets=[listener])
    console.close()
    return exit_code


@dataclass(frozen=True, slots=True)
class OneWorker:
    """The only worker of `upstream`, and those who wait for it."""

    upstream: Keeper
    admission: Admission

    @property
    def capacity(self) -> int:
        """How many requests it works on at once: it has not said, so one."""
        return int(self.upstream.ready)

    def status(self) -> Mapping[str, Any]:
        """Its state, and how many wait."""
        return {
            "waiting": self.admission.waiting,
            "capacity": self.capacity,
            "workers": [{"state": self.upstream.state}],
            **self.upstream.health,
        }


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """`work` beside the block, and cancelled after it."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


def open_upstream(
    settings: GatewaySettings,
    environ: Mapping[str, str],
    worker: Sequence[str],
    metrics: EndpointMetrics,
    tell: Callable[[Event], None],
) -> Keeper:
    """The upstream that `settings` name, whose workers are `worker`, a command."""

    def launcher(folder: Path) -> Launcher:
        return WarmParent(worker, folder / "parent.sock") if settings.warm_parent else Fresh(worker)

    keep: Keep = {
        "at_once": settings.start == "now",
        "start_timeout_s": settings.start_timeout_s,
        "drain_timeout_s": settings.drain_timeout_s,
        "tell": tell,
    }
    if settings.upstream == "local":
        return LocalUpstream(launcher, environ, **keep)
    line = Line(
        metrics,
        limit=settings.queue_limit,
        queue_timeout_s=settings.queue_timeout_s,
        execution_timeout_s=settings.execution_timeout_s,
    )
    return RunpodUpstream(launcher, environ, ControlPlane(settings.endpoint_id, line, metrics), **keep)


def _base_url(settings: GatewaySettings, listener: socket.socket) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - shown, not bound
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}/v2/{settings.endpoint_id}/openai/v1"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
