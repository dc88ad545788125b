"""Where requests wait while the model loads: a small server in a thread, on a loop of its own.

It has the port from the first moment. Once the engine is there, its loop serves the same port and
new connections go there; who has come in here is answered from here, through `handler.bridge`, and
sent away with `connection: close`. A port for the probes alone stays here to the end.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import uvicorn
import uvloop
from prometheus_client import REGISTRY

from handler import early, edge, traces
from handler.admission import Admission
from handler.errors import NotAdmitted
from handler.listener import close_copies
from handler.messages import PATIENCE_S, Call, Reply, Request
from handler.platforms import door
from handler.server import Server, config, end
from handler.settings import Settings
from handler.waiting import WAITING_MAX, WAITING_MAX_BYTES, Room

COLD_START_GUESS_S = 30.0
"""What is told in `Retry-After`: nobody knows how long this start will take."""

FLUSH_S = 0.02
"""For what was said last to be on its way: it is written once the loop has nothing else to do."""


class Lobby:
    """Answers on `listener` until `admit`, and the probes on `health` until `close`.

    `open` starts its thread, in which it lives; the other methods are for other threads.
    """

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        health: socket.socket | None = None,
        *,
        held_max: int = WAITING_MAX,
        held_max_bytes: int = WAITING_MAX_BYTES,
        held_s: float = PATIENCE_S,
    ) -> None:
        self._model = _only_model(settings)
        self._served: door.State = lambda: "ready"
        self._coming = _Coming()
        self._admission = Admission(
            self._coming,
            room=Room(limit=held_max, limit_bytes=held_max_bytes),
            queue_timeout_s=held_s,
            keep_alive_s=settings.keep_alive_s,
            check=self._check,
        )
        self._listening = threading.Event()
        # A descriptor of its own: the engine's server goes on with the other one.
        self._sockets = [listener.dup()]
        self._traces = traces.here(settings)
        app = door.application(
            self._admission.call, settings, self._state, REGISTRY, _last, followed=self._traces
        )
        self._door = _Door(config(app), self._listening.set)
        self._servers: list[Server] = [self._door]
        if health is not None:
            self._sockets.append(health)
            asked = door.probes(self._state, max_body_bytes=settings.max_body_bytes)
            self._servers.append(Server(config(asked)))
        self._inherited = [listener, *self._sockets]
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="lobby", daemon=True)

    def open(self) -> None:
        """Begin to listen."""
        ports = {held.getsockname()[1] for held in self._inherited}
        # An engine core that is forked while the model loads must keep neither port nor connection.
        os.register_at_fork(after_in_child=lambda: close_copies(self._inherited, ports))
        self._thread.start()

    def admit(self, call: Call, cold_start: Mapping[str, Any], *, state: door.State) -> None:
        """The engine is there: answer who waits with `call`, and let nobody else in.

        `call` answers on the lobby's loop (see `handler.bridge`). `cold_start` is its report
        (`Phases.report`), `state` that of what it serves.
        """
        self._served = state
        if self._traces is not None:
            self._do(partial(self._traces.started, cold_start))
        self._do(partial(self._coming.arrive, call, cold_start["total_s"] or 0.0))
        self._do(self._door.shut)

    def refuse(self, error: Callable[[], NotAdmitted]) -> None:
        """No engine will come: answer who waits or comes with `error`."""
        self._do(partial(self._coming.fail, error))

    def emptied(self, within_s: float) -> None:
        """Return once nobody waits for an answer any more, or after `within_s`."""
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._empty(), self._loop).result(within_s)

    def close(self, within_s: float) -> None:
        """End every server; what is not answered `within_s` is cut off."""
        self._do(partial(self._end, within_s))
        self._thread.join()

    @property
    def waiting(self) -> int:
        """How many requests wait for the engine."""
        return self._admission.waiting

    @property
    def listens(self) -> bool:
        """Whether it has begun to, and goes on."""
        return self._listening.is_set() and self._thread.is_alive()

    def _do(self, what: Callable[[], None]) -> None:
        self._listening.wait()
        with suppress(RuntimeError):  # it has ended: nobody was left in it
            self._loop.call_soon_threadsafe(what)

    # --- from here on: on the lobby's loop ----------------------------------------------------

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        finally:
            self._listening.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await asyncio.gather(
            *(server.serve(sockets=[own]) for server, own in zip(self._servers, self._sockets, strict=True))
        )

    async def _empty(self) -> None:
        if answers := set(self._door.server_state.tasks):
            await asyncio.wait(answers)
        await asyncio.sleep(FLUSH_S)

    def _end(self, within_s: float) -> None:
        for server in self._servers:
            end(server, within_s)

    def _state(self) -> str:
        if self._coming.failure is not None:
            return "failed"
        if not self._coming.ready:
            return "starting"
        return self._served()

    def _check(self, request: Request) -> None:
        edge.allowed(request.method, request.path)
        if self._coming.failure is None:  # else the settings may not be those that were meant
            early.check(request, model=self._model)


class _Coming:
    """The engine that is to come; an `Upstream` of `handler.admission`, on the lobby's loop."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._call: Call | None = None
        self._news = asyncio.Event()
        self.failure: Callable[[], NotAdmitted] | None = None
        self.cold_start_s = COLD_START_GUESS_S

    @property
    def ready(self) -> bool:
        """Whether it is there."""
        return self._call is not None

    @property
    def retry_after_s(self) -> float:
        """About how long until it is."""
        return self._began_s + self.cold_start_s - time.monotonic()

    async def wait_ready(self) -> None:
        """As `Upstream` says."""
        while not self.ready:
            if self.failure is not None:
                raise self.failure()
            await self._news.wait()

    def call(self, request: Request) -> AbstractAsyncContextManager[Reply]:
        """As `Upstream` says."""
        assert self._call is not None, "nothing is asked before it is ready"
        return self._call(request)

    def arrive(self, call: Call, cold_start_s: float) -> None:
        """It is there, and answers with `call`."""
        self._call, self.cold_start_s = call, cold_start_s
        self._news.set()

    def fail(self, error: Callable[[], NotAdmitted]) -> None:
        """It will never be there."""
        self.failure = error
        self._news.set()


class _Door(Server):
    """A server that can let nobody else in, and ends once all who had come in are answered."""

    def __init__(self, config: uvicorn.Config, began: Callable[[], None]) -> None:
        super().__init__(config)
        self._began = began
        self._shut = False
        self._empty = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, and say so."""
        await super().startup(sockets)
        self._began()

    def shut(self) -> None:
        """Accept no more. Whoever has connected may still ask."""
        for server in self.servers:
            server.close()
        self._shut = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to end. A connection is counted a turn of the loop after it was accepted: look twice."""
        empty = self._shut and not self.server_state.connections
        over, self._empty = empty and self._empty, empty
        return await super().on_tick(counter) or over


def _only_model(settings: Settings) -> str | None:
    named = {
        "VLLM_EXTRA_ARGS": settings.vllm_extra_args or "",
        "VLLM_CONFIG_FILE": settings.vllm_config_file or "",
    }
    return early.only_model(settings.model_id, {**settings.rest, **named})


def _last(call: Call) -> Call:
    """`call`, each of whose answers is the last one on its connection."""

    @asynccontextmanager
    async def parting(request: Request) -> AsyncIterator[Reply]:
        async with call(request) as reply:
            yield replace(reply, headers=(*reply.headers, ("connection", "close")))

    return parting
