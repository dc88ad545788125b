"""A load generator that costs little: raw HTTP/1.1 over keep-alive connections.

It runs as a process of its own (`python -m bench.load`), so that what it costs is in no
server's interpreter. A job comes as one JSON object on stdin; `begin` is printed once the
warm-up is over, then the `Outcome` as one line of JSON. Each stream asks its next request
as soon as its last is answered.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import cast

import httptools
import uvloop

TIMEOUT_S = 600.0

_CONTENT = re.compile(rb'"content":"[^"]')
_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')


class BadAnswer(Exception):
    """A server answered with an error, or not with what was asked for."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to send where: `warm_up` first and unmeasured, then `bodies`, by `streams` connections.

    They go to the unix socket `uds` if there is one, else to `host` and `port`.
    """

    host: str
    port: int
    path: str
    key: str
    streams: int
    warm_up: Sequence[str]
    bodies: Sequence[str]
    uds: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer: seconds to its first text and to its end, and its tokens as `usage` counts them."""

    first_s: float
    total_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one window measured; `cpu_s` is what the load generator itself took."""

    wall_s: float
    cpu_s: float
    samples: Sequence[Sample]

    @property
    def tokens_per_s(self) -> float:
        """All streams together."""
        return sum(sample.tokens for sample in self.samples) / self.wall_s


def run(job: Job, at_begin: Callable[[], None]) -> Outcome:
    """Run `job` in a process of its own; `at_begin` is called once it is warm.

    Raises `BadAnswer` with what the server said.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "bench.load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin, "piped"
        assert process.stdout, "piped"
        process.stdin.write(json.dumps(asdict(job)))
        process.stdin.close()
        line = process.stdout.readline()
        if line == "begin\n":
            at_begin()
            line = process.stdout.readline()
        answer = json.loads(line or '{"error": "the load generator died"}')
    if "error" in answer:
        raise BadAnswer(answer["error"])
    return Outcome(answer["wall_s"], answer["cpu_s"], [Sample(*sample) for sample in answer["samples"]])


class Stream(asyncio.Protocol):
    """One connection, which asks one request after another."""

    def __init__(self, head: bytes) -> None:
        self._head = head
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._begun_s = 0.0
        self.first_s: float | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(self, take: Callable[[], bytes | None], samples: list[Sample]) -> None:
        """Ask whatever `take` gives until that is None; `ended` is done then."""
        self._take = take
        self._samples = samples
        self._ask()

    def close(self) -> None:
        """End the connection."""
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def _ask(self) -> None:
        body = self._take()
        if body is None:
            if not self.ended.done():
                self.ended.set_result(None)
            return
        self._parts = []
        self.first_s = None
        self._begun_s = time.perf_counter()
        self._transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (self._head, len(body), body))

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self._parser.feed_data(data)

    def on_body(self, part: bytes) -> None:
        """Called by the parser."""
        self._parts.append(part)
        # Joined, because a frame may be cut anywhere; it is a frame or two until text comes.
        if self.first_s is None and _CONTENT.search(b"".join(self._parts)):
            self.first_s = time.perf_counter() - self._begun_s

    def on_message_complete(self) -> None:
        """Called by the parser."""
        total_s = time.perf_counter() - self._begun_s
        body = b"".join(self._parts)
        status = self._parser.get_status_code()
        tokens = _TOKENS.findall(body)
        if status != 200 or self.first_s is None or not tokens:
            self._fail(f"{status}: {body[-500:].decode(errors='replace')}")
            return
        self._samples.append(Sample(self.first_s, total_s, int(tokens[-1])))
        self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        """Called by asyncio."""
        self._fail(f"the connection was closed: {error}")

    def _fail(self, why: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(BadAnswer(why))


async def drive(job: Job, at_begin: Callable[[], None]) -> Outcome:
    """Run `job` on this loop. Raises `BadAnswer`."""
    async with _connected(job) as streams:
        await _ask_all(streams, job.warm_up)
    # New connections: vLLM's server closes one that idled for five seconds.
    async with _connected(job) as streams:
        at_begin()
        begun_s, cpu_s = time.perf_counter(), time.process_time()
        samples = await _ask_all(streams, job.bodies)
        return Outcome(time.perf_counter() - begun_s, time.process_time() - cpu_s, samples)


@asynccontextmanager
async def _connected(job: Job) -> AsyncIterator[Sequence[Stream]]:
    head = (
        f"POST {job.path} HTTP/1.1\r\nhost: {job.host}:{job.port}\r\nauthorization: Bearer {job.key}\r\n"
        "content-type: application/json\r\naccept: text/event-stream\r\n"
    ).encode()
    streams: list[Stream] = []
    loop = asyncio.get_running_loop()
    try:
        for _ in range(job.streams):
            if job.uds is None:
                _, stream = await loop.create_connection(lambda: Stream(head), job.host, job.port)
            else:
                _, stream = await loop.create_unix_connection(lambda: Stream(head), job.uds)
            streams.append(stream)
        yield streams
    finally:
        for stream in streams:
            stream.close()


async def _ask_all(streams: Sequence[Stream], bodies: Sequence[str]) -> Sequence[Sample]:
    todo = deque(body.encode() for body in bodies)
    samples: list[Sample] = []
    for stream in streams:
        stream.begin(lambda: todo.popleft() if todo else None, samples)
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.gather(*(stream.ended for stream in streams))
    return samples


def main() -> int:
    """Run the job on stdin."""
    gc.disable()  # a collection in here would look like a slow token
    job = Job(**json.load(sys.stdin))
    try:
        outcome = uvloop.run(drive(job, lambda: print("begin", flush=True)))
    except (BadAnswer, OSError, TimeoutError) as error:
        print(json.dumps({"error": str(error) or type(error).__name__}))
        return 1
    samples = [(sample.first_s, sample.total_s, sample.tokens) for sample in outcome.samples]
    print(json.dumps({"wall_s": outcome.wall_s, "cpu_s": outcome.cpu_s, "samples": samples}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
