"""The fake of a pool that starts and ends its own workers, without processes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Self

from gateway.scaling import Scaling
from gateway.upstreams import WorkerView
from handler.errors import NotAdmitted
from handler.messages import Call, Reply, Request
from tests.pools import ScriptedPool
from tests.scripted_app import ScriptedApp


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
