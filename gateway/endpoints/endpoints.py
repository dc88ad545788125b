"""All endpoints of a gateway, by id; they come, change and go while it runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from gateway.endpoints.endpoint import Endpoint
from gateway.endpoints.file import Described, Description
from gateway.endpoints.served import Served
from gateway.settings import GatewaySettings
from handler.errors import BadSettings, NotAdmitted

log = logging.getLogger("gateway")


@dataclass(frozen=True, slots=True)
class Changes:
    """What a reload has done, by id."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Endpoints(Mapping[str, Endpoint]):
    """The endpoints that take requests now, in the order in which they were described.

    Look an endpoint up anew for each request: after a reload another one may have its id. `serve` makes one
    of its description, `describe` says what there should be. Used as `async with`.
    """

    def __init__(
        self,
        described: Sequence[Described],
        serve: Callable[[Described], Served],
        describe: Callable[[], Description],
    ) -> None:
        self._serve = serve
        self._describe = describe
        self._described = {one.id: one for one in described}
        self._served: dict[str, Served] = {}
        self._last = {one.id: one.settings for one in described}
        self._leaving: dict[Served, asyncio.Task[None]] = {}
        self._listeners: list[Callable[[Changes], None]] = []
        self._reloading = asyncio.Lock()
        self._changing = asyncio.Lock()
        self._closing = False

    def __getitem__(self, endpoint_id: str) -> Endpoint:
        return self._served[endpoint_id].endpoint

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)

    def described(self, endpoint_id: str) -> GatewaySettings:
        """How the endpoint was described last, after it has gone too. Raises `KeyError`."""
        return self._last[endpoint_id]

    def listen(self, heard: Callable[[Changes], None]) -> None:
        """Have `heard` called, on the loop, after each reload."""
        self._listeners.append(heard)

    async def __aenter__(self) -> Self:
        try:
            for name, described in self._described.items():
                self._served[name] = await self._opened(described)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_taking()
        async with self._changing:
            self.stop_taking()  # what a reload has brought meanwhile
            await asyncio.gather(
                *(served.close() for served in self._served.values()), *self._leaving.values()
            )

    async def reload(self) -> Changes:
        """Have what is described now, and leave alone what is as it was.

        An endpoint that is not described any more answers whoever it has let in, those who wait too. Raises
        `BadSettings` when the description is at fault: then nothing has changed.
        """
        async with self._reloading:
            try:
                description = await asyncio.to_thread(self._describe)
            except BadSettings as error:
                log.error("endpoints were not reloaded", extra={"faults": error.faults})  # noqa: TRY400
                raise
            async with self._changing:
                if self._closing:
                    raise NotAdmitted("The gateway is stopping.", retry_after_s=1)
                changes = await self._follow(description)
        for note in changes.notes:
            log.warning(note)
        for heard in self._listeners:
            heard(changes)
        log.info(
            "endpoints reloaded",
            extra={"added": changes.added, "changed": changes.changed, "removed": changes.removed},
        )
        return changes

    async def _follow(self, description: Description) -> Changes:
        before, now = self._described, {one.id: one for one in description.endpoints}
        added = [name for name in now if name not in before]
        changed = [name for name in now if name in before and now[name] != before[name]]
        removed = [name for name in before if name not in now]
        for name in removed:  # first: others may want their devices
            del before[name]
            self._retire(self._served.pop(name))
        for name in added:
            self._served[name] = await self._opened(now[name])
            before[name] = now[name]
        for name in changed:
            await self._served[name].change(now[name])
            before[name] = now[name]
        self._served = {name: self._served[name] for name in now}
        self._last |= {name: described.settings for name, described in now.items()}
        return Changes(
            tuple(added),
            tuple(changed),
            tuple(removed),
            tuple(name for name in now if name not in {*added, *changed}),
            description.notes,
        )

    async def _opened(self, described: Described) -> Served:
        served = self._serve(described)
        try:
            return await served.open()
        except BaseException:
            await served.close()
            raise

    def _retire(self, served: Served) -> None:
        task = asyncio.create_task(served.retire())
        self._leaving[served] = task
        task.add_done_callback(lambda _: self._leaving.pop(served))

    def _all(self) -> list[Served]:
        return [*self._served.values(), *self._leaving]

    def stop_taking(self) -> None:
        """Turn away whoever waits or comes, and have all workers drain; no reload brings new ones."""
        self._closing = True
        for served in self._all():
            served.stop_taking()

    def kill(self) -> None:
        """End every worker now."""
        for served in self._all():
            served.kill()
