"""One endpoint in service: the line in front of its workers, how it changes and how it ends meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, Self

from gateway.counted import Counted
from gateway.endpoints.admission import Admission
from gateway.endpoints.endpoint import Endpoint
from gateway.endpoints.file import Described
from gateway.settings import GatewaySettings
from gateway.upstreams import Pool, WorkerView
from gateway.upstreams.successive import FINISH_S, OwnPool, Successive
from handler import early
from handler.messages import Call, Request

WORKERS_ARE_MADE_OF = (
    *("upstream", "upstream_url", "upstream_key", "upstream_slots", "upstream_metrics"),
    *("warm_parent", "start_timeout_s", "execution_timeout_s"),
)
"""Settings of the gateway that its workers are started with, beside their environment."""
OTHERS_HOLD = ("queue_limit", "queue_timeout_s")
"""Further settings of pools that queue requests themselves, which are all but that of `local`."""


class Means(Protocol):
    """What endpoints are made with: `gateway.endpoints.site.Site`."""

    def pool(self, described: Described) -> OwnPool:
        """Workers, of whom none is started yet."""
        ...

    def line(self, described: Described, pool: Pool) -> Admission:
        """The queue in front of `pool`."""
        ...

    def adjust(self, line: Admission, described: Described) -> None:
        """Have `line` keep to the bounds that are described."""

    def guard(self, settings: GatewaySettings, ask: Call) -> Call:
        """The call that clients have: the limits of their keys and metering around `ask`."""
        ...


class Served:
    """An endpoint from its opening to its end. `endpoint` is what others see of it, and changes with it."""

    def __init__(self, described: Described, means: Means, *, finish_s: float = FINISH_S) -> None:
        self._means = means
        self._finish_s = finish_s
        self._described = described
        self._stopping = asyncio.Event()
        self._pool = Successive(means.pool(described), finish_s=finish_s)
        self._line = means.line(described, self._pool)
        self._asked = Counted(self._line.call)
        self.endpoint = self._seen()

    def _seen(self) -> Endpoint:
        settings = self._described.settings
        ask = self._asked.call
        return Endpoint(settings, ask, self._means.guard(settings, ask), self, refusals(self._described))

    async def open(self) -> Self:
        """Have workers, as many as its settings say."""
        await self._pool.__aenter__()
        return self

    async def change(self, described: Described) -> None:
        """Serve as `described`. Workers are replaced only if it would make them different.

        Those who wait keep their places; a request that a worker has is finished by that worker.
        """
        if _made_of(self._described) != _made_of(described):
            await self._pool.follow(self._means.pool(described))
        else:
            self._pool.rescale(described.settings.scaling)
        self._means.adjust(self._line, described)
        self._described = described
        self.endpoint = self._seen()

    async def retire(self) -> None:
        """Nobody comes any more: answer those who are there, who wait too, then end."""
        await self._asked.empty(unless=self._stopping, timeout_s=self._finish_s)
        await self.close()

    def stop_taking(self) -> None:
        """Turn away whoever waits or comes, and have the workers drain."""
        self._stopping.set()
        self._pool.stop_taking()

    async def close(self) -> None:
        """Let what runs finish within the drain deadline, and leave no process."""
        await self._pool.__aexit__(None, None, None)

    def kill(self) -> None:
        """End everything now."""
        self._pool.kill()

    @property
    def capacity(self) -> int:
        """How many requests the workers work on at once, in all; 0 while none is ready."""
        return self._pool.capacity

    @property
    def askable(self) -> Mapping[str, Call]:
        """The ready workers that can be asked for more than what clients want, by id."""
        return self._pool.askable

    @property
    def views(self) -> Sequence[WorkerView]:
        """The workers, those of older descriptions last."""
        return self._pool.workers

    @property
    def load(self) -> Mapping[str, int]:
        """Of requests, how many are `waiting` and `in_flight`, and the `capacity`."""
        waiting = self._line.waiting
        return {"waiting": waiting, "in_flight": self._asked.number - waiting, "capacity": self.capacity}

    def status(self) -> Mapping[str, Any]:
        """The fields of `/admin/status` that are about workers and those who wait for them."""
        settings = self._described.settings
        refusal = self._pool.refusal
        return {
            "min_workers": settings.min_workers,
            "max_workers": settings.max_workers,
            "idle_timeout_s": settings.idle_timeout_s,
            **self.load,
            "error": refusal.message if refusal else None,
            "workers": [view.json() for view in self.views],
        }


def refusals(described: Described) -> Callable[[Request], None]:
    """Raises what a worker is sure to answer a request with."""
    settings = described.settings
    others = settings.upstream == "http"  # who runs the server knows what it serves
    model = None if others else early.only_model(settings.model_id, described.environ)
    return partial(early.check, model=model)


def _made_of(described: Described) -> object:
    settings = described.settings
    names = (*WORKERS_ARE_MADE_OF, *(OTHERS_HOLD if settings.upstream != "local" else ()))
    return described.environ, [getattr(settings, name) for name in names]
