"""The gateway's queue before an endpoint's workers: a request waits until one of them has a place for it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from gateway.endpoints.turns import Turn, Turns
from gateway.upstreams import Pool, WorkerLost
from handler.admission import with_cold_start
from handler.errors import DeadlineExceeded, NotAdmitted, RequestError, retry_after
from handler.messages import Reply, Request
from handler.waiting import WAITING_MAX_BYTES, kept_alive

TRIES = 5
"""How many workers are asked for one request. That one goes away as it is asked is nobody's fault, and the
next takes over; five in a row are more than chance."""

FULL_S = 1.0
"""For so long after somebody was refused for a full queue, it counts as one that has waited for ever:
a bounded queue keeps every wait in it short, however many are turned away."""

SERVED_GUESS_S = 5.0
"""How long a request takes, before any has been seen."""
SERVED_WEIGHT = 0.1
"""What the newest counts in the mean of how long they take: the last twenty or so make it."""

Outcome = Literal["at_once", "waited", "full", "refused", "late", "left"]
"""What came of a request here: it had a place at once, or its turn after a while; it was refused because too
many wait or no worker can start; its turn did not come in time, or its client left. Each has one."""


@dataclass(eq=False, slots=True, kw_only=True)
class _Waiter(Turn):
    come: asyncio.Future[RequestError | None]
    """Done when its turn has come, or with what it is refused with."""
    began_s: float
    cold: bool
    """No worker was ready."""
    again: bool
    """It has lost a worker."""
    has_place: bool = False
    """Its turn has come, and it has not asked yet."""
    over: bool = False


class Admission:
    """Lets a request through to `pool` at once if there is a place and nobody waits for it.

    The others wait for a fair turn (`gateway.endpoints.turns`): at most `limit` of `limit_bytes`, as many
    again in the background, each until its deadline, `queue_timeout_s` after its arrival
    (`Visit.deadline_s`). A stream that waits gets comments (`handler.waiting.kept_alive`). `check` sees each
    that would have to wait, and raises what the worker is sure to answer it with. A request whose worker went
    away before it answered goes first to the next one. Who waited for a start hears in `x-cold-start` how
    many seconds that took. `tell` hears what came of each request, and for how many seconds it waited.

    Raises `NotAdmitted` and `DeadlineExceeded`, both with `Retry-After`.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        limit: int,
        queue_timeout_s: float,
        keep_alive_s: float,
        limit_bytes: float = WAITING_MAX_BYTES,
        check: Callable[[Request], None] = lambda _: None,
        tell: Callable[[Outcome, float], None] = lambda _, __: None,
    ) -> None:
        self._pool = pool
        self._turns: Turns[_Waiter] = Turns(limit=limit, limit_bytes=limit_bytes)
        self._queue_timeout_s = queue_timeout_s
        self._keep_alive_s = keep_alive_s
        self._check = check
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._promised = 0
        """How many of the free places are those of requests whose turn has come, and who have yet to ask."""
        self._served_s = SERVED_GUESS_S
        self._full_at_s = -math.inf
        pool.listen(self._heard)

    def adjust(
        self,
        *,
        limit: int,
        queue_timeout_s: float,
        keep_alive_s: float,
        check: Callable[[Request], None],
    ) -> None:
        """Keep to these from now on. Who waits already is not turned away for it."""
        self._turns.rebound(limit)
        self._queue_timeout_s = queue_timeout_s
        self._keep_alive_s = keep_alive_s
        self._check = check

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._turns)

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """Answer `request` (a `handler.messages.Call`)."""
        tries = 0
        if self._has_place(request):
            self._tell("at_once", 0.0)
            request.visit.taken()
            began_s, answered = self._loop.time(), False
            try:
                async with self._ask(request) as reply:
                    answered = True
                    yield reply
            except WorkerLost as lost:
                if answered:
                    raise
                tries = 1
                request = _again(request, lost, tries)
            else:
                return
            finally:
                if answered:
                    self._measure(request, began_s)
        waiter = self._line_up(request, again=tries > 0)
        try:
            held = kept_alive(partial(self._held, waiter=waiter, tries=tries), self._keep_alive_s)
            async with held(request) as reply:
                yield reply
        finally:
            self._leave(waiter, "left")

    @asynccontextmanager
    async def _held(self, request: Request, waiter: _Waiter, tries: int) -> AsyncIterator[Reply]:
        """Answer `request` once the turn of `waiter` has come, and of others if workers go away."""
        cold = False
        async with AsyncExitStack() as stack:
            while True:
                cold = cold or waiter.cold
                await self._turn(waiter, request)
                request = replace(request, visit=replace(request.visit, admitted=True))
                request.visit.taken()
                began_s = self._loop.time()
                try:
                    reply = await stack.enter_async_context(self._ask(request))
                    break
                except WorkerLost as lost:
                    tries += 1
                    request = _again(request, lost, tries)
                waiter = self._line_up(request, again=True)
            stack.callback(self._measure, request, began_s)
            yield with_cold_start(reply, self._pool.cold_start_s) if cold else reply

    def _ask(self, request: Request) -> AbstractAsyncContextManager[Reply]:
        trace = request.visit.trace
        return (trace.attempted(self._pool.call) if trace else self._pool.call)(request)

    def _has_place(self, request: Request) -> bool:
        if request.method != "POST":  # it only asks, and needs no place
            return self._pool.capacity > 0
        return not self._turns and self._pool.free > self._promised

    def _line_up(self, request: Request, *, again: bool) -> _Waiter:
        """Let `request` wait. Raises what it is refused with at once."""
        visit = request.visit
        waiter = _Waiter(
            key=visit.caller,
            size_bytes=len(request.body),
            background=visit.background,
            arrived_s=visit.arrived_s,
            come=self._loop.create_future(),
            began_s=self._loop.time(),
            cold=not self._pool.capacity,
            again=again,
        )
        if again:
            self._turns.put_back(waiter)
        else:
            self._check(request)
            for loser in self._turns.add(waiter):
                self._full_at_s = self._loop.time()
                self._refuse(loser, self._full(), "full")
        self._settle()
        if waiter.over and (refusal := waiter.come.result()):
            raise refusal
        return waiter

    async def _turn(self, waiter: _Waiter, request: Request) -> None:
        """Return once the turn of `waiter` has come. Its place is kept until the next suspension."""
        try:
            async with asyncio.timeout_at(request.visit.deadline_s(self._queue_timeout_s)):
                refusal = await waiter.come
        except TimeoutError:
            self._leave(waiter, "late")
            wait_s = self._queue_timeout_s if request.visit.wait_s is None else request.visit.wait_s
            missed = "The request's turn did not come" if self._pool.capacity else "No worker was ready"
            raise DeadlineExceeded(
                f"{missed} within {wait_s:g} s.",
                headers=retry_after(self._retry_after_s()),
            ) from None
        except asyncio.CancelledError:
            self._leave(waiter, "left")
            raise
        finally:
            if trace := request.visit.trace:
                trace.waited(waiter.began_s)
        if refusal is not None:
            raise refusal
        waiter.has_place = False
        self._promised -= 1
        self._end(waiter, "waited")

    def _heard(self) -> None:
        if self._turns:
            self._settle()

    def _settle(self) -> None:
        """Give turns while there are places, refuse all if no worker can come, and say how many wait then."""
        if refusal := self._pool.refusal:
            for waiter in list(self._turns):
                self._turns.remove(waiter)
                self._refuse(waiter, refusal, "refused")
        while self._pool.free > self._promised and (next_one := self._turns.take()):
            if not next_one.come.done():  # else it is leaving, and says so itself
                next_one.has_place = True
                self._promised += 1
                next_one.come.set_result(None)
        oldest = next(iter(self._turns), None)
        now_s = self._loop.time()
        waited_s = math.inf if now_s < self._full_at_s + FULL_S else now_s - oldest.began_s if oldest else 0.0
        self._pool.want(len(self._turns), waited_s)

    def _refuse(self, waiter: _Waiter, refusal: RequestError, outcome: Outcome) -> None:
        if not waiter.come.done():
            waiter.come.set_result(refusal)
            self._end(waiter, outcome)

    def _leave(self, waiter: _Waiter, outcome: Outcome) -> None:
        """`waiter` asks nobody: its place is free, wherever it was."""
        if waiter.over:
            return
        if waiter in self._turns:
            self._turns.remove(waiter)
        if waiter.has_place:
            self._promised -= 1
        self._end(waiter, outcome)
        self._settle()

    def _end(self, waiter: _Waiter, outcome: Outcome) -> None:
        waiter.over = True
        if not waiter.again:
            self._tell(outcome, self._loop.time() - waiter.began_s)

    def _full(self) -> NotAdmitted:
        return NotAdmitted(f"{len(self._turns)} requests already wait.", retry_after_s=self._retry_after_s())

    def _retry_after_s(self) -> float:
        """When whoever waits now will have had a turn: who comes then has lost nothing."""
        if not self._pool.capacity:
            return self._pool.retry_after_s
        return len(self._turns) * self._served_s / self._pool.capacity

    def _measure(self, request: Request, began_s: float) -> None:
        if request.method == "POST":
            self._served_s += SERVED_WEIGHT * (self._loop.time() - began_s - self._served_s)


def _again(request: Request, lost: WorkerLost, tries: int) -> Request:
    """`request` for another worker. Raises `lost` when that is enough.

    One worker that dies with a request is bad luck. Of two it is rather the request that they died of, and a
    third one would cost everybody else a start.
    """
    visit = request.visit
    if tries == TRIES or (lost.worked_s and visit.worked_s):
        raise lost
    visit = replace(visit, admitted=True, worked_s=visit.worked_s + lost.worked_s)
    return replace(request, visit=visit)
