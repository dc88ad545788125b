"""An OpenAI server that others run: Ray Serve, a Kubernetes service, a RunPod endpoint, `vllm serve`.

It has workers of its own, starts and stops them; to the gateway it is one that is there or is not. What
stands in front of those workers answers in its own way when it has lost one. An answer of the model's that
is an error is OpenAI's JSON; a 5xx that is not comes from what stands between, and nothing was answered.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from gateway.scaling import Scaling
from gateway.upstreams import WorkerLost, WorkerView, events
from gateway.upstreams.events import Ended, Event, KeyTaken, Progress, Ready, Starting
from gateway.upstreams.proxy import Proxy, Refused
from handler.drain import STOPPING
from handler.errors import (
    DeadlineExceeded,
    KeyRefused,
    NotAdmitted,
    RequestError,
    UpstreamFailed,
    retry_after,
)
from handler.messages import Call, Reply, Request, once, without
from handler.waiting import kept_alive

NAME = "upstream"
AWAITED = "waiting for the upstream"
TRIES = 3
"""How many workers of the upstream's may be lost with a request before anything of its answer was there."""
PROBE_MIN_S, PROBE_MAX_S = 0.5, 5.0
PROBE_TIMEOUT_S = 10.0
FULL_RETRY_AFTER_S = 5.0
"""When an upstream may have room again that does not say it."""
COLD_START_GUESS_S = 30.0
ERROR_MAX_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where it is and how it is asked: `url` ends with the path under which `/chat/completions` is."""

    url: str
    key: str | None = field(default=None, repr=False)
    slots: int = 1024
    """How many requests it is given at once; the others wait here, where turns are fair."""
    metrics: bool = False
    """Whether it is one process, whose `/metrics` says the same whenever it is asked."""


class HttpPool:
    """The server at `upstream.url` as the one worker of an endpoint (a `Pool`).

    A request that it can't take because it is not there waits until it is, within `queue_timeout_s` of its
    arrival. One whose worker it lost before the first byte is asked again, `TRIES` times in all. One that it
    refuses because of `upstream.key` is answered so at once, and so are all until it takes the key.
    """

    def __init__(
        self,
        upstream: Upstream,
        *,
        queue_timeout_s: float,
        keep_alive_s: float,
        tell: Callable[[Event], None] = lambda _: None,
    ) -> None:
        parts = urlsplit(upstream.url.rstrip("/"))
        self._upstream = upstream
        self._prefix = parts.path.removesuffix("/v1")
        self._queue_timeout_s = queue_timeout_s
        self._tell = tell
        headers = (("authorization", f"Bearer {upstream.key}"),) if upstream.key else ()
        self._proxy = Proxy(f"{parts.scheme}://{parts.netloc}", headers)
        self._listeners: list[Callable[[], None]] = []
        self._in_flight = 0
        self._idle_since_s = time.monotonic()
        self._up = asyncio.Event()
        self._stopping = False
        self._since_s = time.monotonic()
        self._started_at = time.time()
        self._cold_start_s = COLD_START_GUESS_S
        self._probing: asyncio.Task[None] | None = None
        self._awaited = AWAITED
        self._key_refused: KeyRefused | None = None
        self.starts = 0
        self.call: Call = kept_alive(self._tried, keep_alive_s)
        """Answers a request (a `handler.messages.Call`)."""

    async def __aenter__(self) -> Self:
        self._is_gone()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- as others see it ---------------------------------------------------------------------

    @property
    def free(self) -> int:
        """How many more requests it is given at once."""
        return max(0, self.capacity - self._in_flight)

    @property
    def capacity(self) -> int:
        """How many it is given at once, in all; 0 while it is not there."""
        return self._upstream.slots if self._up.is_set() and not self._stopping else 0

    @property
    def refusal(self) -> RequestError | None:
        """What whoever waits is refused with. Who runs the upstream may be starting it: nobody is told no."""
        return self._stop or self._key_refused

    @property
    def _stop(self) -> NotAdmitted | None:
        return NotAdmitted("The gateway is stopping.", retry_after_s=1) if self._stopping else None

    @property
    def retry_after_s(self) -> float:
        """What is left of an absence that lasts as long as the last one."""
        if self._up.is_set():
            return FULL_RETRY_AFTER_S
        return self._cold_start_s - (time.monotonic() - self._since_s)

    @property
    def cold_start_s(self) -> float:
        """How long it was away the last time; a guess while it never was."""
        return self._cold_start_s

    @property
    def workers(self) -> Sequence[WorkerView]:
        """The upstream, however many workers it has."""
        up, now_s = self._up.is_set(), time.monotonic()
        return [
            WorkerView(
                id=NAME,
                state="ready" if up else "starting",
                phase=None if up else self._awaited,
                pid=None,
                devices=(),
                started_at=self._started_at,
                ready_after_s=self._cold_start_s if up else None,
                in_flight=self._in_flight,
                slots=self.capacity,
                idle_s=now_s - self._idle_since_s if up and not self._in_flight else None,
            )
        ]

    @property
    def scaling(self) -> Scaling:
        """As one worker that others start and stop."""
        return Scaling()

    def rescale(self, scaling: Scaling) -> None:
        """How many workers it has is decided where it runs."""

    @property
    def askable(self) -> Mapping[str, Call]:
        """Itself, where it is one process; many behind one address are asked where they run."""
        return {NAME: self._at_its_path} if self._upstream.metrics and self.capacity else {}

    def want(self, waiting: int, oldest_wait_s: float) -> None:
        """How many workers it has is decided where it runs."""

    def listen(self, heard: Callable[[], None]) -> None:
        """Have `heard` called on the loop whenever `free` may have grown or `refusal` has changed."""
        self._listeners.append(heard)

    # --- how requests get there ---------------------------------------------------------------

    @asynccontextmanager
    async def _tried(self, request: Request) -> AsyncIterator[Reply]:
        self._in_flight += 1
        try:
            async with AsyncExitStack() as stack:
                yield await self._answer(request, stack)
        finally:
            self._in_flight -= 1
            self._idle_since_s = time.monotonic()
            self._heard()

    async def _answer(self, request: Request, stack: AsyncExitStack) -> Reply:
        tries = 0
        while True:
            await self._there(request)
            try:
                reply = await _answered(await stack.enter_async_context(self._at_its_path(request)))
            except BadKey as error:
                return self._refuses_key(error.status).reply()
            except Refused:
                self._is_gone()
            except WorkerLost:
                tries += 1
                if tries == TRIES:
                    raise
            else:
                if request.method == "POST":  # the list of models is open to everybody at some
                    self._takes_key(reply.status)
                return reply

    def _at_its_path(self, request: Request) -> AbstractAsyncContextManager[Reply]:
        return self._proxy.call(replace(request, path=self._prefix + request.path))

    async def _there(self, request: Request) -> None:
        """Return once it is there; raises `DeadlineExceeded` and, when the gateway stops, `NotAdmitted`."""
        try:
            async with asyncio.timeout_at(request.visit.deadline_s(self._queue_timeout_s)):
                await self._up.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                f"The upstream could not be reached within {self._queue_timeout_s:g} s.",
                headers=retry_after(self.retry_after_s),
            ) from None
        if stop := self._stop:
            raise stop

    def _refuses_key(self, status: int) -> KeyRefused:
        """What to say of it. Each request is asked all the same: the next may find that the key is good."""
        key = self._upstream.key
        said = KeyRefused(
            f"The upstream refuses the gateway's own key (status {status}); "
            f"who runs the gateway has to {'mend' if key else 'set'} UPSTREAM_KEY."
        )
        if self._key_refused is None:  # told once, not with each request
            without_key = "" if key else ", and no key is set"
            self._tell(events.KeyRefused(NAME, f"it answers with status {status}{without_key}"))
        self._key_refused = said
        self._heard()
        return said

    def _takes_key(self, status: int) -> None:
        if self._key_refused is not None and status < 500:
            self._key_refused = None
            self._tell(KeyTaken(NAME))

    # --- whether it is there ------------------------------------------------------------------

    def _is_gone(self) -> None:
        """It can't be reached, or was never asked: look until it can."""
        if self._stopping or (self._probing is not None and not self._probing.done()):
            return
        if self._up.is_set():
            self._tell(Ended(NAME, "it can't be reached", expected=False))
            self._up.clear()
        self._key_refused = None
        self._since_s, self._started_at = time.monotonic(), time.time()
        self._awaited = AWAITED
        self.starts += 1
        self._tell(Starting(NAME, self.starts))
        self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        wait_s = PROBE_MIN_S
        while (status := await self._answers()) is None:
            await asyncio.sleep(wait_s)
            wait_s = min(PROBE_MAX_S, 2 * wait_s)
        took_s = time.monotonic() - self._since_s
        if self.starts > 1 or took_s > PROBE_MIN_S:
            self._cold_start_s = took_s
        self._up.set()
        self._tell(Ready(NAME, took_s))
        if status in _KEY_REFUSED:
            self._refuses_key(status)
        self._heard()

    async def _answers(self) -> int | None:
        """Its status if it says anything at all: a model that loads is its own to wait for."""
        models = Request("GET", "/v1/models")
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S), self._at_its_path(models) as reply:
                if reply.status not in _NOT_THERE:
                    return reply.status
                self._missed(f"it answers with status {reply.status}")
        except TimeoutError:
            self._missed(f"no answer within {PROBE_TIMEOUT_S:g} s")
        except WorkerLost as error:
            self._missed(str(error.__cause__ or error))
        return None

    def _missed(self, why: str) -> None:
        awaited = f"{AWAITED}: {why}"
        if awaited != self._awaited:  # told once, not with each look
            self._awaited = awaited
            self._tell(Progress(NAME, awaited))

    def _heard(self) -> None:
        for heard in self._listeners:
            heard()

    # --- its end --------------------------------------------------------------------------------

    def stop_taking(self) -> None:
        """Turn away whoever waits or comes."""
        self._stopping = True
        self._up.set()
        self._heard()

    async def close(self) -> None:
        """Let what runs finish, as long as the caller waits for that."""
        self.stop_taking()
        if self._probing is not None:
            self._probing.cancel()
        await self._proxy.close()

    def kill(self) -> None:
        """There is no process to end."""


_NOT_THERE = frozenset({502, 503, 504})
_KEY_REFUSED = frozenset({401, 403})


class BadKey(Exception):
    """It refuses the key that it was asked with."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


async def _answered(reply: Reply) -> Reply:
    """`reply`, if it is the model's.

    Raises `NotAdmitted` for a bare 503, `WorkerLost` for another 5xx and for a worker of ours that drains,
    `BadKey` for a 401 and a bare 403. A 403 in OpenAI's shape may be about what was asked: moderation's is.
    """
    if reply.status < 500 and reply.status not in _KEY_REFUSED:
        return reply
    if reply.status == 401:
        raise BadKey(reply.status)
    body = await _start_of(reply)
    if error := _error(body):
        if error.get("code") == STOPPING:
            raise WorkerLost("The worker was stopping when it was asked.")
        headers = without(reply.headers, ["content-length", "transfer-encoding"])
        if reply.status == 503 and reply.header("retry-after") is None:
            headers = (*headers, *retry_after(FULL_RETRY_AFTER_S))
        return Reply(reply.status, (*headers, ("content-length", str(len(body)))), once(body))
    if reply.status == 403:
        raise BadKey(reply.status)
    if reply.status == 503:
        raise NotAdmitted("The upstream takes no more requests now.", retry_after_s=_seconds(reply))
    raise WorkerLost(f"The upstream answered with status {reply.status} and no error of OpenAI's.")


async def _start_of(reply: Reply) -> bytes:
    parts, size = [], 0
    with suppress(UpstreamFailed):
        async for chunk in reply.frames:
            parts.append(chunk)
            size += len(chunk)
            if size > ERROR_MAX_BYTES:
                break
    return b"".join(parts)


def _error(body: bytes) -> Mapping[str, Any] | None:
    """The error of an answer in OpenAI's shape."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    error = value.get("error") if isinstance(value, dict) else None
    return error if isinstance(error, dict) else None


def _seconds(reply: Reply) -> float:
    given = reply.header("retry-after") or ""
    return float(given) if given.isdecimal() and len(given) < 6 else FULL_RETRY_AFTER_S
