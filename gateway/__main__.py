"""`python -m gateway`: settings, listener, upstream, server. Exit codes are sysexits'."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import uvloop

from gateway.admission import Admission, Tell
from gateway.app import Gateway
from gateway.console import Address, Console
from gateway.keys import Keys
from gateway.metrics import Metrics
from gateway.parts import OpenAI, Operations
from gateway.settings import UPSTREAMS, GatewaySettings
from gateway.upstreams import WORKER_STATES, folder
from gateway.upstreams.control_plane import ControlPlane
from gateway.upstreams.devices import Devices
from gateway.upstreams.events import Event, Ready, StartFailed
from gateway.upstreams.launch import Fresh, Launcher, WarmParent
from gateway.upstreams.line import Line
from gateway.upstreams.local import LocalPool
from gateway.upstreams.pool import KILL_GRACE_S, Keep, WorkerPool
from gateway.upstreams.runpod import RunpodPool
from handler import baked, early, logs
from handler.errors import StartError
from handler.listener import listen
from handler.server import Server, config

WORKER = (sys.executable, "-m", "handler")
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None, worker: Sequence[str] = WORKER) -> int:
    """Run the gateway in front of `worker`, a command; returns an exit code of sysexits.h."""
    parser = argparse.ArgumentParser(
        prog="python -m gateway",
        description="Serve an OpenAI-compatible URL. Settings come from the environment.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serving = commands.add_parser("serve", help="serve; also without a command")
    serving.add_argument("--upstream", choices=UPSTREAMS, help="how the worker is asked (UPSTREAM)")
    args = parser.parse_args(argv)
    given = {"UPSTREAM": args.upstream} if getattr(args, "upstream", None) else {}
    try:
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
    """Listen, keep workers, and answer until a signal comes.

    Returns 0 once drained, or the exit code of a first worker that can never start.
    """
    listener = listen(settings.host, settings.port)
    folder.sweep()
    keys = Keys.open(settings.api_key)
    metrics = Metrics()
    console = Console(
        Address(_base_url(settings, listener), settings.model_id, keys.shown), sys.stdout, sys.stderr
    )
    exit_code = 0

    def tell(event: Event) -> None:
        console(event)
        _count(metrics, event)
        if (
            isinstance(event, StartFailed)
            and event.permanent
            and settings.start == "now"
            and pool.starts == 1
        ):
            nonlocal exit_code
            exit_code = event.exit_code  # nobody has been served: say so where it was started
            stop()

    pool = open_pool(settings, environ, worker, metrics, Devices.of_machine(environ), tell)
    for state in WORKER_STATES[:4]:
        metrics.workers.labels(state).set_function(partial(_in_state, pool, state))
    admission = Admission(
        pool,
        limit=settings.queue_limit,
        queue_timeout_s=settings.queue_timeout_s,
        keep_alive_s=settings.keep_alive_s,
        check=partial(early.check, model=early.only_model(settings.model_id, environ)),
        tell=Tell(waiting=metrics.queue_depth.set, waited_s=metrics.held_s.observe),
    )
    operations = Operations(
        keys,
        metrics,
        health=lambda: {
            "status": "ok",
            **pool.health,
            "waiting": admission.waiting,
        },
        open_metrics=_is_loopback(settings.host),
    )
    gateway = Gateway([OpenAI({settings.endpoint_id: admission.call}), operations], keys, metrics)
    app = gateway.app(max_body_bytes=settings.max_body_bytes, cors_origins=settings.cors_origins)
    shutdown_s = math.ceil(settings.drain_timeout_s + 2 * KILL_GRACE_S)
    server = Server(config(app, shutdown_s=shutdown_s))

    def stop() -> None:
        server.should_exit = True
        pool.stop_taking()

    def interrupt() -> None:
        if server.should_exit:  # a second Ctrl-C
            pool.kill()
            os._exit(INTERRUPTED)
        stop()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_signal_handler(signal.SIGINT, interrupt)
    async with pool:
        if settings.start != "now":
            console.waits_for_request()
        await server.serve(sockets=[listener])
    console.close()
    return exit_code


def open_pool(
    settings: GatewaySettings,
    environ: Mapping[str, str],
    worker: Sequence[str],
    metrics: Metrics,
    devices: Devices,
    tell: Callable[[Event], None],
) -> WorkerPool:
    """The pool that `settings` name, whose workers are `worker`, a command."""

    def launcher(private: Path) -> Launcher:
        return WarmParent(worker, private / "parent.sock") if settings.warm_parent else Fresh(worker)

    keep = Keep(
        at_once=settings.start == "now",
        start_timeout_s=settings.start_timeout_s,
        drain_timeout_s=settings.drain_timeout_s,
        scaling=settings.scaling,
        devices=devices,
        tell=tell,
    )
    if settings.upstream == "local":
        return LocalPool(launcher, environ, keep)
    line = Line(
        metrics,
        limit=settings.queue_limit,
        queue_timeout_s=settings.queue_timeout_s,
        execution_timeout_s=settings.execution_timeout_s,
    )
    return RunpodPool(launcher, environ, ControlPlane(settings.endpoint_id, line, metrics), keep)


def _base_url(settings: GatewaySettings, listener: socket.socket) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 - shown, not bound
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}/v2/{settings.endpoint_id}/openai/v1"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_state(pool: WorkerPool, state: str) -> float:
    return sum(worker.state == state for worker in pool.workers)


def _count(metrics: Metrics, event: Event) -> None:
    if isinstance(event, Ready):
        metrics.worker_starts.labels("ready").inc()
        metrics.worker_cold_start_s.set(event.cold_start.get("total_s", event.took_s))
    elif isinstance(event, StartFailed):
        metrics.worker_starts.labels("failed").inc()


if __name__ == "__main__":
    sys.exit(main())
