"""What can stand behind the gateway: workers that answer, once they are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from handler.errors import RequestError, UpstreamFailed
from handler.messages import Reply, Request

__all__ = ["WORKER_STATES", "Pool", "WorkerLost", "WorkerView"]

WORKER_STATES = ("starting", "ready", "retiring", "leaving", "ended", "failed")
"""A worker's life. `retiring`: it is not needed and finishes what it holds; `leaving`: it was told to end, or
says that it does; `failed`: it has ended before it was ready."""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as others see it. Seconds; `started_at` is Unix time."""

    id: str
    state: str
    """One of `WORKER_STATES`."""
    phase: str | None
    """What a starting worker says that it does."""
    pid: int | None
    devices: tuple[str, ...]
    started_at: float
    ready_after_s: float | None
    in_flight: int
    slots: int
    """How many requests it works on at once; 0 until it is ready."""
    idle_s: float | None
    """How long a ready worker has held nothing; None while it does."""
    cold_start: Mapping[str, Any] = field(default_factory=dict)
    """What it measured of its start (`handler.phases.Phases.report`)."""
    reason: str | None = None
    """Why it has ended."""
    log_tail: tuple[str, ...] = ()
    """The last lines of its output, of one that has ended."""
    log: Path | None = None
    """The file of all its output; what is older than its bound is in `{log}.1`."""

    def json(self) -> dict[str, Any]:
        """As /admin/status shows it."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "log"}


class WorkerLost(UpstreamFailed):
    """The worker went away before it said anything: another may be asked the same.

    Raised while a call is entered and never from the frames of a reply. `worked_s` is how long it
    had the request; 0 if it never did.
    """

    def __init__(self, message: str, *, worked_s: float = 0.0) -> None:
        super().__init__(message)
        self.worked_s = worked_s


class Pool(Protocol):
    """The workers of one endpoint: none, one or several."""

    @property
    def free(self) -> int:
        """How many more requests the ready workers take at once."""
        ...

    @property
    def capacity(self) -> int:
        """How many requests the ready workers work on at once, in all; 0 while none is ready."""
        ...

    def want(self, waiting: int, oldest_wait_s: float) -> None:
        """`waiting` requests wait now, the oldest for so long; to be told again when that changes.

        What it means for the number of workers, `gateway.scaling` decides.
        """

    def listen(self, heard: Callable[[], None]) -> None:
        """Have `heard` called on the loop whenever `free` may have grown or `refusal` has changed."""

    @property
    def refusal(self) -> RequestError | None:
        """What whoever waits is refused with; None while a worker is there that answers, or may come."""
        ...

    @property
    def retry_after_s(self) -> float:
        """About how long until a request may be taken."""
        ...

    @property
    def cold_start_s(self) -> float:
        """How long the last start took, from process to first token; a guess while there was none."""
        ...

    def call(self, request: Request) -> AbstractAsyncContextManager[Reply]:
        """Ask the least loaded ready worker (a `handler.messages.Call`), also beyond what it has room for.

        Raises `WorkerLost` when nothing was answered and another try is in order.
        """
        ...

    @property
    def workers(self) -> Sequence[WorkerView]:
        """Those that live, in order of their starts, and after them the last few that have ended."""
        ...
