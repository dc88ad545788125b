"""uvicorn, as every HTTP server of ours runs it: on the loop that runs, with its signals left to others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from handler.asgi import App

IDLE_S = 75
"""Longer than proxies keep an idle connection (60 s is usual), so that theirs ends first: no sporadic 502."""


class Server(uvicorn.Server):
    """uvicorn, without its own signal handlers, which would end the process by the signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def config(app: App, *, idle_s: int = IDLE_S, shutdown_s: int | None = None) -> uvicorn.Config:
    """How `app` is served.

    An idle connection is kept for `idle_s`; once the server ends, a busy one for `shutdown_s` (None: as
    long as it takes).
    """
    return uvicorn.Config(
        app,
        loop="none",
        http="httptools",
        ws="none",
        lifespan="off",
        proxy_headers=False,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=idle_s,
        timeout_graceful_shutdown=shutdown_s,
    )


def end(server: uvicorn.Server, within_s: float) -> None:
    """Have `server`, on whose loop this runs, end: what is not answered `within_s` is cut off."""
    server.config.timeout_graceful_shutdown = within_s  # type: ignore[assignment] # a float will do
    server.should_exit = True
