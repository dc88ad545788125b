"""One request as a job: what a worker posts of its answer, and the answer made of it."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Mapping
from hashlib import blake2b
from typing import Any
from uuid import uuid4

from handler import jobs, sse
from handler.errors import RequestError, UpstreamFailed
from handler.messages import Reply, Visit, read

HIGH_WATER_BYTES = 256 * 1024
"""The worker's post is answered late once this much is unread: a slow client slows its own job only."""


class Job:
    """One attempt to have one request answered: it is handed to one worker at most.

    Who is asked again is asked with another job, so that its id tells attempts apart. The worker's
    side `put`s outputs and says `finish` or `report_failure`; `fail` ends it from here. The
    client's side reads `reply`, which iterates over the outputs.
    """

    def __init__(self, job_input: Mapping[str, Any], *, streamed: bool, visit: Visit | None = None) -> None:
        self.id = str(uuid4())
        self.input = job_input
        self.streamed = streamed
        self.visit = visit or Visit()
        self.worker_id: str | None = None
        self.since_s = 0.0
        """When it was lined up, and once a worker has it, when that took it."""
        self.timer: asyncio.TimerHandle | None = None
        self.begun = False
        """Whether an output has come."""
        self.complete = False
        """Whether the outputs that have come are the whole answer, as far as they say."""
        self._outputs: deque[tuple[Any, int]] = deque()
        self._unread_bytes = 0
        self._count = 0
        self._digest = blake2b(digest_size=16)
        self._ended = False
        self._left = False
        self._failure: RequestError | None = None
        self._reported: object = None
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def put(self, output: Any, size_bytes: int) -> None:
        """Add an output that the worker has posted while it works."""
        self._count += 1
        _add(self._digest, output)
        self._append(output, size_bytes)

    async def room(self) -> None:
        """Return once the client has read enough for more to come."""
        await self._room.wait()

    def finish(self, outputs: list[Any]) -> None:
        """The job is done, and `outputs` are all of it, those included that came by themselves.

        Some of them may have been lost on their way. Those at the end are appended; one in the
        middle can't be mended any more. None at all: the worker keeps no aggregate.
        """
        if outputs or not self._count:
            known = blake2b(digest_size=16)
            for output in outputs[: self._count]:
                _add(known, output)
            if known.digest() != self._digest.digest():
                self.fail(UpstreamFailed("A part of the answer was lost on its way."))
                return
            for output in outputs[self._count :]:
                self._append(output, 0)
        self.end()

    def report_failure(self, reason: object) -> None:
        """The worker says that the job FAILED."""
        if not self._ended:
            self._reported = reason
        self.end()

    def fail(self, failure: RequestError) -> None:
        """The job ends here, with `failure` after what has come."""
        if not self._ended:
            self._failure = failure
        self.end()

    def end(self) -> None:
        """Nothing more comes, and nobody waits."""
        self._ended = True
        self._room.set()
        self._news.set()
        if self.timer is not None:
            self.timer.cancel()

    def release(self) -> None:
        """The client reads no more: what else comes is thrown away."""
        self._left = True
        self._outputs.clear()
        self._room.set()

    def _append(self, output: Any, size_bytes: int) -> None:
        if self._left:
            return
        self.begun = True
        self.complete = not self.streamed or not isinstance(output, str) or output.endswith(sse.DONE.decode())
        self._outputs.append((output, size_bytes))
        self._unread_bytes += size_bytes
        if self._unread_bytes > HIGH_WATER_BYTES:
            self._room.clear()
        self._news.set()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        """The next output. Raises the `RequestError` that ended the job in place of the rest."""
        while not self._outputs:
            if self._failure is not None:
                raise self._failure
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        output, size_bytes = self._outputs.popleft()
        self._unread_bytes -= size_bytes
        if self._unread_bytes <= HIGH_WATER_BYTES:
            self._room.set()
        return output

    async def reply(self) -> Reply:
        """The answer, which the first output decides. Raises what there is in its place."""
        async for output in self:
            if (whole := _load(output, streamed=self.streamed)) is None:
                return Reply(200, sse.HEADERS, self._frames(output))
            self.complete = True
            return whole
        if self._reported is not None:
            return jobs.load_failure(self._reported)
        raise UpstreamFailed("The job ended without an answer.")

    async def _frames(self, output: Any) -> AsyncIterator[bytes]:
        """The stream that begins with `output`. Its end waits until the job is done, and nothing lost."""
        told, held = False, b""
        async for following in _after(output, self):
            begin, (chunk, held) = held, _chunk(following)
            chunk = begin + chunk
            if chunk:
                told = sse.ERROR_FRAME in chunk
                yield chunk
        if self._reported is None or (held and jobs.TOO_LARGE in str(self._reported)):
            if held:
                yield held
        elif not told:
            yield b"data: " + await read(jobs.load_failure(self._reported)) + b"\n\n"


async def _after(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for output in rest:
        yield output


def _load(output: Any, *, streamed: bool) -> Reply | None:
    try:
        return jobs.load(output, streamed=streamed)
    except (TypeError, ValueError) as error:  # such as a status that is no number
        raise UpstreamFailed("The worker's answer could not be read.") from error


def _chunk(output: Any) -> tuple[bytes, bytes]:
    """The frames of `output`, and of those the last if it ends the stream."""
    frames = output.encode(errors="backslashreplace") if isinstance(output, str) else sse.event(output)
    if frames.endswith(sse.DONE):
        return frames.removesuffix(sse.DONE), sse.DONE
    return frames, b""


def _add(digest: blake2b, output: Any) -> None:
    text = output if isinstance(output, str) else json.dumps(output)
    raw = text.encode(errors="backslashreplace")
    digest.update(b"%d:" % len(raw) + raw)
