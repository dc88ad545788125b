"""One attempt at a job: what it has said so far, and what came of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from gateway.jobs.document import Document, beside
from gateway.jobs.table import Ending, Job, State
from handler import edge, jobs
from handler.body import look
from handler.errors import BadEvent, DeadlineExceeded, NotAdmitted, RequestError, UpstreamFailed
from handler.messages import Call, Reply, Request, Visit, as_json
from handler.usage import Usage, metered

JOIN_MAX_CHARS = 64 * 1024
"""Frames that nobody has asked for by then are one output up to this length."""
TOLD_MAX_BYTES = 1_000_000
"""What RunPod gives at once of a stream; one output at least is given."""


class Outputs:
    """What an attempt has said, each output as JSON, and how many of them `/stream` has told."""

    def __init__(self) -> None:
        self._outputs: list[bytes] = []
        self._frames: list[str] = []
        self._frames_chars = 0
        self._news = asyncio.Event()
        self._over = False
        self.size_bytes = 0
        self.told = 0

    @property
    def begun(self) -> bool:
        """Whether there is any."""
        return bool(self._outputs or self._frames)

    def put(self, output: Any) -> None:
        """Add one. Text is frames of a stream, which are joined until somebody asks."""
        if isinstance(output, str):
            self._frames.append(output)
            self._frames_chars += len(output)
            self.size_bytes += len(output)
            if self._frames_chars > JOIN_MAX_CHARS:
                self._join()
        else:
            self._join()
            self._append(as_json(output))
        self._news.set()

    def take(self) -> list[bytes]:
        """Those that were not told yet, which are from now on."""
        self._join()
        taken = first(self._outputs[self.told :])
        self.told += len(taken)
        return taken

    async def news(self) -> None:
        """Return once there are more outputs than at the time of the call, or all is over."""
        if not self._over:
            self._news.clear()
        await self._news.wait()

    def over(self) -> None:
        """Say that there will be no more, and that the outcome is in the database."""
        self._over = True
        self._news.set()

    def whole(self) -> bytes:
        """All of them, as a JSON list."""
        self._join()
        return b"[" + b",".join(self._outputs) + b"]"

    def _join(self) -> None:
        if self._frames:
            text, self._frames, self._frames_chars = "".join(self._frames), [], 0
            self.size_bytes -= len(text)
            self._append(as_json(text))

    def _append(self, output: bytes) -> None:
        self._outputs.append(output)
        self.size_bytes += len(output)


def first(outputs: list[bytes]) -> list[bytes]:
    """As many of `outputs`, from the first on, as are told at once."""
    taken, size_bytes = 0, 0
    for output in outputs:
        size_bytes += len(output)
        if taken and size_bytes > TOLD_MAX_BYTES:
            break
        taken += 1
    return outputs[:taken]


@dataclass(frozen=True, slots=True)
class Refused:
    """No worker has worked on it, because of `error`; None if it was told to stop."""

    error: RequestError | None


@dataclass(frozen=True, slots=True)
class Lost:
    """Its worker went away before it said anything."""

    error: RequestError


Outcome = Ending | Refused | Lost


class Attempt:
    """Asks `ask` for what `job` wants, whose input is `body`.

    `began` is called once a worker has it, and from then on it has the job's `executionTimeout`.
    """

    def __init__(self, job: Job, body: bytes, ask: Call, began: Callable[[], None]) -> None:
        self.job = job
        self.outputs = Outputs()
        self.usage: Usage | None = None
        """What it has cost, once it is over and if it has cost something."""
        self.begun = False
        self.stopped = False
        self._body = body
        self._ask = metered(ask, self._tell_usage)
        self._began = began
        self._lost: Refused | Lost | None = None
        self._timer: asyncio.Timeout | None = None

    async def run(self) -> Outcome:
        """Ask, and collect what is said; until `stop` is called."""
        error: str | None = None
        try:
            async with asyncio.timeout(None) as timer:
                if self.stopped:
                    return Refused(None)
                self._timer = timer
                asked = await beside(len(self._body), self._asked)
                async with aclosing(jobs.outputs(self._call, self.job.id, asked)) as outputs:
                    async for output in outputs:
                        error = jobs.failure(output)
                        if error is None:
                            self.outputs.put(output)
                        if self.outputs.size_bytes > jobs.ANSWER_MAX_BYTES:
                            error = json.dumps(jobs.error_of(jobs.too_large(self.outputs.size_bytes)))
                            break
        except TimeoutError:
            if not timer.expired():
                raise
            return self._timed_out()
        finally:
            self._timer = None
        if self._lost is not None:
            return self._lost
        if error is not None:
            return Ending(State.FAILED, self.outputs.whole(), error)
        return Ending(State.COMPLETED, self.outputs.whole())

    def stop(self) -> None:
        """Leave the answer, whatever of it is there."""
        self.stopped = True
        if self._timer is not None and not self._timer.expired():
            self._timer.reschedule(0)

    def _asked(self) -> object:
        """The request that its input holds, or an input that holds none: what comes of it says why."""
        document = Document(self._body)
        try:
            return look(jobs.parse(document.value, document.dump))
        except BadEvent:
            return document.value

    def _timed_out(self) -> Outcome:
        if self.stopped:
            return Refused(None)
        limit_s = self.job.execution_timeout_s
        return Ending(State.TIMED_OUT, error=f"The job took longer than its executionTimeout, {limit_s:g} s.")

    @asynccontextmanager
    async def _call(self, request: Request) -> AsyncIterator[Reply]:
        edge.allowed(request.method, request.path)
        job = self.job
        visit = Visit(
            caller=job.key_id,
            background=job.background,
            wait_s=job.expires_at - time.time(),
            taken=self._begin,
        )
        request = replace(request, visit=visit)
        try:
            async with self._ask(request) as reply:
                self._begin()
                yield reply
        except UpstreamFailed as error:
            if not self.outputs.begun:
                self._lost = Lost(error)
            raise
        except (NotAdmitted, DeadlineExceeded) as error:
            if isinstance(error, NotAdmitted) or not self.begun:
                self._lost = Refused(error)
            raise

    def _begin(self) -> None:
        if self.begun:
            return
        self.begun = True
        if self._timer is not None and not self.stopped and not self._timer.expired():
            self._timer.reschedule(asyncio.get_running_loop().time() + self.job.execution_timeout_s)
        self._began()

    def _tell_usage(self, usage: Usage) -> None:
        if usage.whole or usage.completion_tokens:
            self.usage = usage
