"""uvicorn, as both listeners of the gateway run it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from handler.asgi import App


class Server(uvicorn.Server):
    """uvicorn, with its signals left to others: its own handlers would end the process by the signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def config(app: App, *, keep_alive_s: int, shutdown_s: int) -> uvicorn.Config:
    """How `app` is served: idle connections are kept for `keep_alive_s`, busy ones end in `shutdown_s`."""
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=shutdown_s,
    )
