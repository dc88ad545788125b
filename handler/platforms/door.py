"""What every server of a worker is made of: who gets in, and what the probes say."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from handler import asgi, edge, metrics
from handler.auth import Keyring
from handler.errors import NoSuchRoute, json_reply
from handler.messages import Call, Reply, Request, once
from handler.settings import Settings

if TYPE_CHECKING:
    from handler.otel import Traces

PROBES = ("/health", "/ready", "/ping")
"""Answered without a key; they say nothing but yes or no."""

LINGER_S = 0.5
"""What connections get after the drain's deadline: to be sent their last frame, or to be cut off."""

State = Callable[[], str]
"""`starting`, `ready`, `draining`, `dead` or `failed`."""

Front = Callable[[Call], Call]


def application(
    call: Call,
    settings: Settings,
    state: State,
    registry: CollectorRegistry | None,
    front: Front = lambda call: call,
    followed: Traces | None = None,
) -> asgi.App:
    """`call` behind the key, with the probes and `/metrics`; `front` is outermost on every answer.

    Without a `registry` there is no `/metrics`. Requests of OpenAI routes are `followed`.
    """
    guarded = settings.auth and settings.api_key and not settings.uds  # a unix socket has an owner
    keys = Keyring.of(settings.api_key) if guarded and settings.api_key else None

    def check(request: Request) -> None:
        if keys is not None and request.path not in PROBES:
            keys.check(request)

    @asynccontextmanager
    async def answered(request: Request) -> AsyncIterator[Reply]:
        if _is_probe(request):
            yield _probed(request, state())
        elif registry is not None and request.method == "GET" and request.path == "/metrics":
            yield metrics.exposition(registry)
        else:
            async with call(request) as reply:
                yield reply

    def fronted(inner: Call) -> Call:
        outer = front(edge.front(inner, cors_origins=settings.cors_origins))
        return followed.follow(outer, _route) if followed else outer

    return asgi.serve(answered, max_body_bytes=settings.max_body_bytes, check=check, front=fronted)


def probes(state: State, *, max_body_bytes: int) -> asgi.App:
    """Nothing but the probes."""

    def check(request: Request) -> None:
        if not _is_probe(request):
            raise NoSuchRoute(request.method, request.path)

    @asynccontextmanager
    async def answered(request: Request) -> AsyncIterator[Reply]:
        yield _probed(request, state())

    return asgi.serve(answered, max_body_bytes=max_body_bytes, check=check, front=edge.front)


def _route(request: Request) -> tuple[str, str] | None:
    pattern = edge.pattern(request.path)
    return None if pattern is None else (pattern, "")


def _is_probe(request: Request) -> bool:
    return request.method in {"GET", "HEAD"} and request.path in PROBES


def _probed(request: Request, state: str) -> Reply:
    if state == "starting" and request.path == "/ping":
        return Reply(204, (), once(b""))  # so RunPod's load balancer tells a start from a fault
    return json_reply(200 if state == "ready" else 503, {"status": state})
