"""The fake pools: their places are given and taken by the test, and what they answer is scripted."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Self

from gateway.scaling import Scaling
from gateway.upstreams import WorkerLost, WorkerView
from handler.asgi import call_app
from handler.errors import NotAdmitted
from handler.messages import Call, Reply, Request, Visit
from tests.scripted_app import ScriptedApp

COLD_START_S = 4.25


class ScriptedPool:
    """Workers that have `capacity` places and answer with `app`; they come and go when the test says so.

    The next requests lose their workers after so many seconds as `losing` has; `left` places are there then.
    """

    def __init__(self, app: ScriptedApp, *, places: int = 0, retry_after_s: float = 7) -> None:
        self._call = call_app(app)
        self._heard: Callable[[], None] = lambda: None
        self._in_flight = 0
        self.capacity = places
        self.refusal: NotAdmitted | None = None
        self.retry_after_s = retry_after_s
        self.cold_start_s = COLD_START_S
        self.workers: Sequence[WorkerView] = ()
        self.wanted: list[tuple[int, float]] = []
        """All that `want` was told, in order."""
        self.losing: deque[float] = deque()
        self.left = 0
        self.lost = asyncio.Event()
        self.visits: list[Visit] = []
        """Those of all requests that were asked."""

    @property
    def free(self) -> int:
        """As `Pool` says."""
        return max(0, self.capacity - self._in_flight)

    def want(self, waiting: int, oldest_wait_s: float) -> None:
        """As `Pool` says."""
        self.wanted.append((waiting, oldest_wait_s))

    def listen(self, heard: Callable[[], None]) -> None:
        """As `Pool` says."""
        self._heard = heard

    def give(self, places: int) -> None:
        """So many places are there now."""
        self.capacity = places
        self._heard()

    def refuse(self, refusal: NotAdmitted) -> None:
        """No worker can come."""
        self.refusal = refusal
        self._heard()

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """As `Pool` says."""
        self.visits.append(request.visit)
        if self.losing:
            self.capacity = self.left
            self.lost.set()
            raise WorkerLost("The worker went away.", worked_s=self.losing.popleft())
        self._in_flight += 1
        try:
            async with self._call(request) as reply:
                yield reply
        finally:
            self._in_flight -= 1
            self._heard()


class OwnedPool(ScriptedPool):
    """A `ScriptedPool` that is asked from being entered to being left. `life` is what has happened to it."""

    def __init__(self, app: ScriptedApp, *, places: int = 0, scaling: Scaling = Scaling()) -> None:  # noqa: B008 - frozen
        super().__init__(app, places=places)
        self.scaling = scaling
        self.life: list[str] = []
        self._show("ready" if places else "starting")

    def _show(self, state: str) -> None:
        reason = "it was told to end" if state == "ended" else None
        self.workers = [
            WorkerView("worker-1", state, None, 1, (), 0.0, None, 0, self.capacity, None, reason=reason)
        ]

    async def __aenter__(self) -> Self:
        self.life.append("entered")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.life.append("left")
        self.capacity = 0
        self._show("ended")

    def stop_taking(self) -> None:
        """Refuse whoever comes."""
        self.life.append("stopped")
        self.refuse(NotAdmitted("The gateway is stopping.", retry_after_s=1))

    def kill(self) -> None:
        """End."""
        self.life.append("killed")

    def rescale(self, scaling: Scaling) -> None:
        """Remember it."""
        self.scaling = scaling

    @property
    def askable(self) -> Mapping[str, Call]:
        """One, while it has places."""
        return {"worker-1": self.call} if self.capacity else {}

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """As `Pool` says."""
        assert self.life[:1] == ["entered"], "asked before its start"
        assert "left" not in self.life, "asked after its end"
        async with super().call(request) as reply:
            yield reply
