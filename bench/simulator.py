"""One endpoint on a virtual clock: the gateway's own queue and scaling policy over workers that are a model.

The queue is `gateway.endpoints.turns.Turns`, a policy what `gateway.scaling.Scaler` is. A worker is a few
numbers (`Replica`). Nothing is random here: a trace and a policy always give the same.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.policies import Policy
from bench.traces import Arrival
from gateway.endpoints.admission import FULL_S
from gateway.endpoints.turns import Turn, Turns
from gateway.scaling import Seen


@dataclass(frozen=True, slots=True)
class Replica:
    """What is assumed of a worker.

    It works on `slots` requests at once. Prompts are read one after the other, `prefill_per_s` tokens a
    second. An answer's next token takes `token_s`, and `token_more_s` more for each answer that is made
    beside it. Reading prompts does not hold up tokens.
    """

    cold_start_s: float = 60.0
    slots: int = 16
    prefill_per_s: float = 8000.0
    token_s: float = 0.02
    token_more_s: float = 0.0005

    def per_s(self, answers: int) -> float:
        """Tokens a second of each of so many answers."""
        return 1 / (self.token_s + self.token_more_s * (answers - 1))

    def busy_s(self, arrival: Arrival) -> float:
        """How long a request has a slot of a full replica."""
        return arrival.prompt_tokens / self.prefill_per_s + arrival.output_tokens / self.per_s(self.slots)


@dataclass(frozen=True, slots=True)
class Door:
    """What the gateway does with who has to wait: settings of its own."""

    queue_limit: int = 256
    queue_timeout_s: float = 300.0


@dataclass(slots=True)
class Outcome:
    """What came of a trace. Waits are until a worker has the request, `ttft_s` until its first token."""

    requests: int = 0
    refused: int = 0
    late: int = 0
    waits_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    worker_s: float = 0.0
    """Of all workers, from the beginning of their starts to their ends."""
    cold_starts: int = 0
    most_workers: int = 0
    length_s: float = 0.0
    left: int = 0
    """Requests that nothing came of: never any."""


@dataclass(eq=False, slots=True)
class _Waiting(Turn):
    arrival: Arrival = field(default_factory=lambda: Arrival(0, 0, 0))


@dataclass(eq=False, slots=True)
class _Worker:
    began_s: float
    ready_s: float = math.inf
    held: int = 0
    reading_until_s: float = 0.0
    """When the prompts that it has are read."""
    leaving: bool = False
    answers: list[tuple[float, int]] = field(default_factory=list)
    """How much `made` will be when each answer is whole."""
    made: float = 0.0
    """Tokens that an answer would have which was there from the beginning."""
    at_s: float = 0.0
    turn: int = 0
    """Which of its next ends is the right one."""


class Simulation:
    """Runs `trace` through one gateway with workers as `policy` wants them.

    There are at most `most`, those included that are leaving and finish what they have.
    """

    def __init__(
        self,
        trace: Sequence[Arrival],
        policy: Policy,
        replica: Replica,
        *,
        most: int,
        door: Door | None = None,
    ) -> None:
        self._trace = trace
        self._policy = policy
        self._replica = replica
        self._most = most
        self._door = door or Door()
        self._turns: Turns[_Waiting] = Turns(limit=self._door.queue_limit)
        self._deadlines: deque[_Waiting] = deque()
        self._workers: list[_Worker] = []
        self._starting = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._now_s = 0.0
        self._look_s = math.inf
        self._timer = 0
        self._inside = 0
        self._full_at_s = -math.inf
        self.outcome = Outcome(requests=len(trace))

    def run(self) -> Outcome:
        """What came of it."""
        out = self.outcome
        self._look()
        coming = iter(self._trace)
        following = next(coming, None)
        while following is not None or self._inside:
            if following is not None and (not self._events or following.at_s <= self._events[0][0]):
                self._now_s = following.at_s
                self._arrive(following)
                following = next(coming, None)
            else:
                self._now_s, _, happens = heapq.heappop(self._events)
                happens()
            out.length_s = self._now_s
        for worker in self._workers:
            out.worker_s += self._now_s - worker.began_s
        out.left = self._inside
        return out

    def _at(self, at_s: float, happens: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (at_s, self._number, happens))

    # --- requests -----------------------------------------------------------------------------

    def _arrive(self, arrival: Arrival) -> None:
        worker = self._free() if not self._turns else None
        self._inside += 1
        if worker is not None:
            self._give(worker, arrival)
        else:
            turn = _Waiting(key=arrival.key, arrived_s=self._now_s, arrival=arrival)
            losers = self._turns.add(turn)
            if losers:
                self._full_at_s = self._now_s
            self.outcome.refused += len(losers)
            self._inside -= len(losers)
            if turn in self._turns:
                self._deadlines.append(turn)
                self._at(self._now_s + self._door.queue_timeout_s, self._expire)
        self._look()

    def _expire(self) -> None:
        before = len(self._turns)
        while self._deadlines and self._deadlines[0].arrived_s + self._door.queue_timeout_s <= self._now_s:
            turn = self._deadlines.popleft()
            if turn in self._turns:
                self._turns.remove(turn)
                self.outcome.late += 1
                self._inside -= 1
        if len(self._turns) < before:
            self._look()

    def _free(self) -> _Worker | None:
        """The ready worker that has least, if it has room."""
        slots = self._replica.slots
        found = None
        for worker in self._workers:
            takes = worker.ready_s <= self._now_s and not worker.leaving and worker.held < slots
            if takes and (found is None or worker.held < found.held):
                found = worker
        return found

    def _give(self, worker: _Worker, arrival: Arrival) -> None:
        replica = self._replica
        began_s = max(self._now_s, worker.reading_until_s)
        read_s = worker.reading_until_s = began_s + arrival.prompt_tokens / replica.prefill_per_s
        worker.held += 1
        self.outcome.waits_s.append(self._now_s - arrival.at_s)
        self.outcome.ttft_s.append(read_s - arrival.at_s)
        if read_s > self._now_s:
            self._at(read_s, lambda: self._answer(worker, arrival))
        else:
            self._answer(worker, arrival)

    def _answer(self, worker: _Worker, arrival: Arrival) -> None:
        """The prompt is read: tokens are made."""
        self._advance(worker)
        self._number += 1
        heapq.heappush(worker.answers, (worker.made + arrival.output_tokens, self._number))
        self._schedule(worker)

    def _advance(self, worker: _Worker) -> None:
        if worker.answers:
            worker.made += (self._now_s - worker.at_s) * self._replica.per_s(len(worker.answers))
        worker.at_s = self._now_s

    def _schedule(self, worker: _Worker) -> None:
        worker.turn += 1
        if worker.answers:
            turn, left = worker.turn, worker.answers[0][0] - worker.made
            in_s = max(0.0, left) / self._replica.per_s(len(worker.answers))
            self._at(self._now_s + in_s, lambda: self._end(worker, turn))

    def _end(self, worker: _Worker, turn: int) -> None:
        """The next answer of `worker` is whole."""
        if turn != worker.turn:
            return  # another one came meanwhile, and all became slower
        self._advance(worker)
        heapq.heappop(worker.answers)
        worker.held -= 1
        self._inside -= 1
        self._schedule(worker)
        if worker.leaving and not worker.held:
            self._gone(worker)
        self._take()
        self._look()

    def _take(self) -> None:
        while self._turns and (worker := self._free()) is not None:
            turn = self._turns.take()
            assert turn is not None
            self._give(worker, turn.arrival)

    # --- workers ------------------------------------------------------------------------------

    def _look(self) -> None:
        """Have as many workers as the policy wants."""
        decision = self._policy.decide(self._now_s, self._seen())
        staying = [worker for worker in self._workers if not worker.leaving]
        wanted = min(decision.workers, self._most)
        for _ in range(min(wanted - len(staying), self._most - len(self._workers))):
            self._start()
        if wanted < len(staying):
            ready = [worker for worker in staying if worker.ready_s <= self._now_s]
            for worker in sorted(ready, key=lambda one: one.held)[: len(staying) - wanted]:
                worker.leaving = True
                if not worker.held:
                    self._gone(worker)
        self._timer += 1
        if decision.again_in_s is not None:
            timer = self._timer
            self._at(self._now_s + decision.again_in_s, lambda: self._again(timer))

    def _again(self, timer: int) -> None:
        if timer == self._timer:
            self._look()

    def _seen(self) -> Seen:
        staying = [worker for worker in self._workers if not worker.leaving]
        ready = [worker for worker in staying if worker.ready_s <= self._now_s]
        oldest = next(iter(self._turns), None)
        waited_s = self._now_s - oldest.arrived_s if oldest else 0.0
        if self._now_s < self._full_at_s + FULL_S:  # as the gateway tells it
            waited_s = math.inf
        return Seen(
            waiting=len(self._turns),
            oldest_wait_s=waited_s,
            in_flight=sum(worker.held for worker in staying),
            ready=len(ready),
            starting=len(staying) - len(ready),
            capacity=len(ready) * self._replica.slots,
            slots=self._replica.slots,
            cold_start_s=self._replica.cold_start_s,
            newest_s=self._now_s - max((worker.ready_s for worker in ready), default=-math.inf),
        )

    def _start(self) -> None:
        worker = _Worker(self._now_s, self._now_s + self._replica.cold_start_s)
        self._workers.append(worker)
        self.outcome.cold_starts += 1
        self.outcome.most_workers = max(self.outcome.most_workers, len(self._workers))
        self._at(worker.ready_s, self._ready)

    def _ready(self) -> None:
        self._take()
        self._look()

    def _gone(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self.outcome.worker_s += self._now_s - worker.began_s
