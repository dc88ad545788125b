"""One worker of a pool: its process, what it holds, and how that is shown."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gateway.upstreams import WorkerView
from gateway.upstreams.output import Output
from gateway.upstreams.process import WorkerProcess


class Worker:
    """The `number`th worker of its pool, from its start to its end, with the `devices` that it was lent.

    Files of its own are called `path` and a suffix; the file of its output is `{id}.log` in `logs`. Raises
    `OSError` if they can't be made.
    """

    def __init__(
        self,
        number: int,
        folder: Path,
        devices: tuple[str, ...],
        *,
        logs: Path,
        hidden: tuple[str, ...],
        progress: Callable[[Worker, str], None],
    ) -> None:
        self.number = number
        self.id = f"worker-{number}-{secrets.token_hex(4)}"
        self.path = folder / f"worker-{number}"
        self.devices = devices
        self.phase: str | None = None
        self.in_flight = 0
        self.answered = False
        """Whether it has answered anything."""
        self.retiring = False
        self.doubts = 0
        """How many requests have lost it and wait for the news that it has ended."""
        self.took_s: float | None = None
        """How long its start took; None until it is ready."""
        self.started_s = time.monotonic()
        self.opened_s = math.inf
        self.failed = False
        self.reason: str | None = None
        self._started_at = time.time()
        self._idle_since_s = 0.0
        output = Output(self.path.with_suffix(".out"), logs / f"{self.id}.log", hidden)
        try:
            self.process = WorkerProcess(self.path, output, lambda text: progress(self, text))
        except OSError:
            output.close()
            raise

    def open(self) -> None:
        """It is ready."""
        self.opened_s = self._idle_since_s = time.monotonic()
        self.took_s = self.opened_s - self.started_s
        self.phase = None

    @property
    def starting(self) -> bool:
        """Whether it may become ready."""
        return self.took_s is None and self.reason is None

    @property
    def takes(self) -> bool:
        """Whether it takes requests, as far as is known."""
        return self.serves and not self.retiring and not self.doubts

    @property
    def serves(self) -> bool:
        """Whether it is ready and has not been heard to end."""
        process = self.process
        return self.took_s is not None and not process.left.done() and not process.exited.done()

    @property
    def slots(self) -> int:
        """How many requests it works on at once; 0 until it is ready."""
        return self.process.slots

    @property
    def free(self) -> int:
        """How many more requests it takes at once."""
        return max(0, self.slots - self.in_flight) if self.takes else 0

    @property
    def cold_start(self) -> Mapping[str, Any]:
        """What it measured of its start; empty until it is ready."""
        return self.process.ready.result() if self.process.ready.done() else {}

    def begin(self) -> None:
        """It has one request more."""
        self.in_flight += 1

    def finish(self) -> None:
        """It has one request less."""
        self.in_flight -= 1
        if not self.in_flight:
            self._idle_since_s = time.monotonic()

    def end(self, reason: str) -> None:
        """It has ended."""
        self.failed = self.took_s is None
        self.reason = reason
        self.phase = None

    @property
    def state(self) -> str:
        """One of `gateway.upstreams.WORKER_STATES`."""
        if self.reason is not None:
            return "failed" if self.failed else "ended"
        if self.process.left.done():
            return "leaving"
        if self.took_s is None:
            return "starting"
        return "retiring" if self.retiring else "ready"

    @property
    def view(self) -> WorkerView:
        """A snapshot of it, for whoever shows workers."""
        idle = self.state == "ready" and not self.in_flight
        return WorkerView(
            id=self.id,
            state=self.state,
            phase=self.phase,
            pid=self.process.pid,
            devices=self.devices,
            started_at=self._started_at,
            ready_after_s=self.took_s,
            in_flight=self.in_flight if self.reason is None else 0,
            slots=self.slots,
            idle_s=time.monotonic() - self._idle_since_s if idle else None,
            cold_start=self.cold_start,
            reason=self.reason,
            log_tail=self.process.output.tail if self.reason is not None else (),
            log=self.process.output.kept,
        )
