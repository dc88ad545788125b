"""The worker's ASGI application as a Ray Serve deployment: one engine per replica, 0..N of them.

Ray places, starts, watches and stops the replicas; this file says what one is made of and what Ray is told.
It is the only one that imports ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import uuid4

import ray
from prometheus_client import CollectorRegistry
from ray import serve
from ray.serve.metrics import Gauge

from handler import asgi, edge, metrics, slots
from handler.bridge import across
from handler.engine import Engine
from handler.errors import EngineFailed, UsageError
from handler.flags import named
from handler.messages import Call, Reply, Request, without
from handler.platforms import door
from handler.platforms.ray_settings import RaySettings
from handler.seam import make_parser
from handler.settings import TABLE
from handler.start import begin, open_log, read_settings

log = logging.getLogger(__name__)

NAME = "firsttoken"
"""What the application is called in Ray's status."""
IDLE_S = 75
_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_NODES_OWN = {"PORT", "PORT_HEALTH", "UDS", "PLATFORM", "LIFELINE_FD", "NOTIFY_SOCKET"}
"""What a node is told by whoever runs it, and a replica has none of."""
METRICS_S = 5.0
"""How often Ray is told the worker's metrics; it forgets a gauge that it has not heard of for 20 s."""
EVERYWHERE = {"HOST": "0.0.0.0"}  # noqa: S104 - Ray's proxy binds it, or does not
"""What a replica takes for where it is asked, if nobody says it: then it wants an API_KEY, or AUTH=off."""
_SECRET = {name for row in TABLE if row.secret for name in row.names}


class Replica:
    """One worker: an engine, and vLLM's application behind our edge.

    `given` are its settings; what it lacks the node's environment has, secrets above all. A HOST beyond
    loopback without an API_KEY is refused here too: whoever deploys may have one that the node has not.
    """

    async def __init__(  # type: ignore[misc] # Ray awaits it
        self, given: Mapping[str, str]
    ) -> None:
        os.environ.update({**EVERYWHERE, **given})
        phases = begin(os.environ)
        settings = await asyncio.to_thread(read_settings, os.environ)
        open_log(settings)
        engine = await asyncio.to_thread(
            partial(Engine.start, settings, phases, os.environ, metrics_to_ray=True)
        )
        await asyncio.to_thread(engine.wait_open)
        await asyncio.to_thread(engine.save)
        log.info("cold start", extra={"total_s": phases.total_s})
        self._settings = settings
        self._engine = engine
        own = CollectorRegistry()
        metrics.register(phases, running=engine.running, in_flight=engine.running, registry=own)
        self._telling = asyncio.create_task(_tell(own))

    def __serve_build_asgi_app__(self) -> asgi.App:
        """What Ray asks, in the replica.

        There is no `/metrics`: through Ray's proxy each scrape would have another replica's.
        """
        engine, settings = self._engine, self._settings
        call = slots.limit(engine.call, settings.max_concurrency or engine.capacity())
        call = edge.openai(call, engine_is_dead=lambda: engine.is_dead)
        return door.application(
            across(call, engine.loop), settings, self._state, registry=None, front=_without_request_id
        )

    def capacity(self) -> int:
        """How many requests the engine can hold, which is known once there is one."""
        return self._engine.capacity()

    def check_health(self) -> None:
        """Asked by Ray, which replaces a replica that raises."""
        if self._engine.is_dead:
            raise EngineFailed("the engine died")

    def __del__(self) -> None:
        """Asked by Ray once nothing runs any more."""
        with suppress(AttributeError):  # it never started
            self._telling.cancel()
            self._engine.close()

    def _state(self) -> str:
        return "dead" if self._engine.is_dead else "ready"


async def _tell(registry: CollectorRegistry) -> None:
    """Tell Ray again and again what `registry` has, all of it gauges; Ray adds which replica's they are."""
    gauges: dict[str, Gauge] = {}
    while True:
        for family in registry.collect():
            for sample in family.samples:
                if sample.name not in gauges:
                    gauges[sample.name] = Gauge(sample.name, family.documentation, tuple(sample.labels))
                gauges[sample.name].set(sample.value, tags=sample.labels)
        await asyncio.sleep(METRICS_S)


def _without_request_id(call: Call) -> Call:
    """`call`, whose answers leave it to Ray's proxy to name the request: it would stand there twice."""

    @asynccontextmanager
    async def named_once(request: Request) -> AsyncIterator[Reply]:
        async with call(request) as reply:
            yield replace(reply, headers=without(reply.headers, ["x-request-id"]))

    return named_once


def app(given: Mapping[str, Any]) -> Any:
    """The application for `serve deploy`, of the settings that stand as `args` in its file.

    Raises `BadSettings` for what is wrong with those of the deployment; the replicas read their own.
    """
    environ = {name: str(value) for name, value in given.items()}
    return _application(RaySettings.from_environ(environ, gpus=_has_gpus()), environ)


def _application(settings: RaySettings, given: Mapping[str, str], version: str | None = None) -> Any:
    """The deployment. Of a `version` that runs bounds alone are changed; None: replicas are started anew."""
    deployment = serve.deployment(serve.ingress()(Replica)).options(name="worker", **settings.deployment())
    if version is not None:  # Ray makes one up each time, and has no other way to keep one
        deployment = deployment.options(version=version, _internal=True)
    return deployment.bind(given)


Say = Callable[[str], None]
"""Is told a line for the person who asked."""


def up(environ: Mapping[str, str], say: Say) -> None:
    """Deploy workers as `environ` says, to the cluster at RAY_ADDRESS or to one of their own.

    To a cluster: returns once they are deployed; what is secret is not sent, its nodes have to have it. One
    of their own ends with SIGTERM or SIGINT. Raises `StartError`.
    """
    worker = read_settings(dict(environ))
    RaySettings.from_environ(environ, gpus=False)  # faults are told before a cluster is made
    own = not environ.get("RAY_ADDRESS")
    version = uuid4().hex
    stop = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS) if own else set()
    with _cluster(environ, own=own):
        settings = RaySettings.from_environ(environ, gpus=_has_gpus())
        given = {name: environ[name] for name in _sent(environ)} | {"HOST": settings.host}
        serve.start(
            proxy_location="EveryNode",
            http_options={"host": settings.host, "port": settings.port, "keep_alive_timeout_s": IDLE_S},
        )
        try:
            handle = serve.run(_application(settings, given, version), name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise EngineFailed(_reason() or str(error)) from None
        if settings.max_concurrency is None and settings.first_replicas:
            settings = replace(settings, slots=handle.capacity.remote().result())
            serve.run(_application(settings, given, version), name=NAME, route_prefix="/")
        say(f"ready  http://{settings.host}:{settings.port}/v1  model {worker.model_id}")
        if own:
            signal.sigwait(_SIGNALS)
            signal.pthread_sigmask(signal.SIG_SETMASK, stop)
            serve.shutdown()


def status(environ: Mapping[str, str], say: Say) -> None:
    """Say what is deployed, how many replicas are in which state, and where each node has their metrics.

    Raises `StartError`.
    """
    with _cluster(environ, own=False):
        found = serve.status().applications.get(NAME)
        if found is None:
            raise UsageError(f"there is no application {NAME} on this cluster")
        say(f"{NAME}: {found.status.value.lower()}  {_one_line(found.message)}".rstrip())
        for name, deployment in found.deployments.items():
            states = [f"{number} {state.lower()}" for state, number in deployment.replica_states.items()]
            say(f"  {name}: {deployment.status.value.lower()}, {', '.join(states) or 'no replica'}")
        for node in ray.nodes():
            if node["Alive"] and node["MetricsExportPort"] > 0:
                say(f"  metrics: http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")


def down(environ: Mapping[str, str], say: Say) -> None:
    """Let what runs finish within DRAIN_TIMEOUT_S, and end the workers. Raises `StartError`."""
    with _cluster(environ, own=False):
        serve.delete(NAME)
        say(f"{NAME}: deleted")


@contextmanager
def _cluster(environ: Mapping[str, str], *, own: bool) -> Iterator[None]:
    """Be connected to the cluster at RAY_ADDRESS (or this machine's), or to one that ends with the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told
    try:
        if own:
            ray.init("local", include_dashboard=False, namespace="serve")  # else one that is there is joined
        else:
            ray.init(address=environ.get("RAY_ADDRESS", "auto"), namespace="serve", log_to_driver=False)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"Ray can't be reached: {_one_line(str(error))}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _sent(environ: Mapping[str, str]) -> set[str]:
    """The names in `environ` that a replica is told: our settings and vLLM's flags, no secret."""
    ours = {name for row in TABLE for name in row.names} & environ.keys()
    return (ours | named(make_parser(), environ)) - _SECRET - _NODES_OWN


def _reason() -> str:
    """Why the application does not run, in one line."""
    found = serve.status().applications.get(NAME)
    if found is None:
        return ""
    said = [found.message, *(deployment.message for deployment in found.deployments.values())]
    text = max(said, key=len)
    # Ray has the whole traceback of the replica's start; its last line says what it was.
    return _one_line(text.strip().splitlines()[-1]) if text.strip() else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _has_gpus() -> bool:
    return bool(ray.is_initialized() and ray.cluster_resources().get("GPU"))
