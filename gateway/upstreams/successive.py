"""A pool that gives way to the next one: new workers take the requests, old ones finish what they have."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

from gateway.counted import Counted
from gateway.scaling import Scaling
from gateway.upstreams import Pool, WorkerView
from handler.errors import RequestError
from handler.messages import Call, Reply, Request

FINISH_S = 600.0
"""What requests get to end whose workers are replaced. A client that does not read must not keep a GPU."""


class OwnPool(Pool, Protocol):
    """A pool whose workers start when it is entered and have ended when it is left."""

    async def __aenter__(self) -> Self:
        """Begin."""
        ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let what runs finish within the drain deadline, and leave no process."""

    @property
    def scaling(self) -> Scaling:
        """How many workers it may have."""
        ...

    def rescale(self, scaling: Scaling) -> None:
        """Have as many as that says from now on."""

    @property
    def askable(self) -> Mapping[str, Call]:
        """The ready workers that can be asked for more than what clients want, by id."""
        ...

    def stop_taking(self) -> None:
        """Turn away whoever comes, and have the workers drain."""

    def kill(self) -> None:
        """End everything now."""


class Successive:
    """A pool (`gateway.upstreams.Pool`) that others may follow, of which nobody who waits hears.

    What runs goes on in the old one, for `finish_s` at most. Who waits is served by the new one, and so is
    whoever was with an old worker that was lost before it answered. Used as `async with`.
    """

    def __init__(self, pool: OwnPool, *, finish_s: float = FINISH_S) -> None:
        self._finish_s = finish_s
        self._heard: Callable[[], None] = lambda: None
        self._wanted = (0, 0.0)
        self._old: dict[OwnPool, asyncio.Task[None]] = {}
        self._closing = asyncio.Event()
        self._set(pool)

    def _set(self, pool: OwnPool) -> None:
        self._pool = pool
        self._running = Counted(pool.call)
        pool.listen(lambda: self._hear(pool))

    def _hear(self, pool: OwnPool) -> None:
        if pool is self._pool:
            self._heard()

    async def __aenter__(self) -> Self:
        await self._pool.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_taking()
        await asyncio.gather(self._pool.__aexit__(kind, error, trace), *self._old.values())

    async def follow(self, pool: OwnPool) -> None:
        """From now on it is `pool` that is asked."""
        try:
            await pool.__aenter__()
        except BaseException:
            await pool.__aexit__(None, None, None)
            raise
        old, running = self._pool, self._running
        self._set(pool)
        pool.want(*self._wanted)
        old.want(0, 0.0)
        old.rescale(replace(old.scaling, min_workers=0, idle_timeout_s=0.0))  # who is idle goes at once
        self._old[old] = asyncio.create_task(self._finish(old, running))
        self._heard()

    async def _finish(self, old: OwnPool, running: Counted) -> None:
        await running.empty(unless=self._closing, timeout_s=self._finish_s)
        await old.__aexit__(None, None, None)
        del self._old[old]

    def rescale(self, scaling: Scaling) -> None:
        """Have as many workers as that says, without replacing any."""
        self._pool.rescale(scaling)

    def stop_taking(self) -> None:
        """Turn away whoever waits or comes, and have all workers drain."""
        self._closing.set()
        for pool in (self._pool, *self._old):
            pool.stop_taking()

    def kill(self) -> None:
        """End everything now."""
        for pool in (self._pool, *self._old):
            pool.kill()

    def want(self, waiting: int, oldest_wait_s: float) -> None:
        """Tell the newest how many wait."""
        self._wanted = (waiting, oldest_wait_s)
        self._pool.want(waiting, oldest_wait_s)

    def listen(self, heard: Callable[[], None]) -> None:
        """Have `heard` called when the newest may have room, or will not have any."""
        self._heard = heard

    def call(self, request: Request) -> AbstractAsyncContextManager[Reply]:
        """Ask the newest (a `handler.messages.Call`)."""
        return self._running.call(request)

    @property
    def free(self) -> int:
        """How many more requests the newest takes at once."""
        return self._pool.free

    @property
    def capacity(self) -> int:
        """How many requests the newest works on at once, in all."""
        return self._pool.capacity

    @property
    def refusal(self) -> RequestError | None:
        """What whoever waits is refused with; None while a worker is there that answers, or may come."""
        return self._pool.refusal

    @property
    def retry_after_s(self) -> float:
        """About how long until a request may be taken."""
        return self._pool.retry_after_s

    @property
    def cold_start_s(self) -> float:
        """How long the last start took."""
        return self._pool.cold_start_s

    @property
    def workers(self) -> Sequence[WorkerView]:
        """Those of the newest, then those of the old ones that live."""
        left = [view for old in self._old for view in old.workers if view.reason is None]
        return [*self._pool.workers, *left]

    @property
    def askable(self) -> Mapping[str, Call]:
        """Those of all that are ready."""
        return {name: call for pool in (self._pool, *self._old) for name, call in pool.askable.items()}
