"""A pool without processes: the test says how many requests its workers take, and sees what is asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Self

from gateway.scaling import Scaling
from gateway.upstreams import WorkerView
from handler.errors import NotAdmitted
from handler.messages import Call, Reply, Request


class ScriptedPool:
    """Answers with `call`, up to `capacity` requests at once, from being entered to being left."""

    def __init__(self, call: Call, *, capacity: int = 1, scaling: Scaling = Scaling()) -> None:  # noqa: B008 - frozen
        self._call = call
        self._heard: list[Callable[[], None]] = []
        self.scaling = scaling
        self.capacity = capacity
        self.in_flight = 0
        self.waiting = 0
        self.life: list[str] = []
        """What has happened to it: `entered`, `stopped`, `left`, `killed`."""
        self.refusal: NotAdmitted | None = None
        self.retry_after_s = 1.0
        self.cold_start_s = 1.5

    async def __aenter__(self) -> Self:
        self.life.append("entered")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.life.append("left")
        self.capacity = 0

    def stop_taking(self) -> None:
        """Refuse whoever comes."""
        self.life.append("stopped")
        self.refusal = NotAdmitted("The gateway is stopping.", retry_after_s=1)
        self.hear()

    def kill(self) -> None:
        """End."""
        self.life.append("killed")

    def rescale(self, scaling: Scaling) -> None:
        """Remember it."""
        self.scaling = scaling

    @property
    def free(self) -> int:
        """How many more it takes."""
        return max(0, self.capacity - self.in_flight)

    def want(self, waiting: int, oldest_wait_s: float) -> None:
        """Remember how many wait."""
        self.waiting = waiting

    def listen(self, heard: Callable[[], None]) -> None:
        """Remember whom to tell."""
        self._heard.append(heard)

    def hear(self) -> None:
        """Tell that something has changed."""
        for heard in self._heard:
            heard()

    def grow(self, capacity: int) -> None:
        """Take as many at once from now on."""
        self.capacity = capacity
        self.hear()

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """Answer."""
        assert "entered" in self.life
        assert "left" not in self.life, "asked after its end"
        self.in_flight += 1
        try:
            async with self._call(request) as reply:
                yield reply
        finally:
            self.in_flight -= 1
            self.hear()

    @property
    def workers(self) -> Sequence[WorkerView]:
        """One, while it lives."""
        state = "ended" if "left" in self.life else "ready" if self.capacity else "starting"
        reason = "it was told to end" if state == "ended" else None
        return [
            WorkerView(
                "worker-1", state, None, 1, (), 0.0, None, self.in_flight, self.capacity, None, reason=reason
            )
        ]

    @property
    def askable(self) -> Mapping[str, Call]:
        """One, while it lives."""
        return {"worker-1": self._call} if self.capacity else {}
