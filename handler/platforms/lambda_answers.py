"""How the events of a Lambda function are answered: each as requests, whose replies become what it takes."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from handler import edge, sse
from handler.errors import BadEvent, BodyTooLarge, DeadlineExceeded, RequestError
from handler.messages import Call, Headers, Reply, Request, once, read
from handler.platforms import lambda_events as events
from handler.platforms import lambda_messages as messages
from handler.platforms.lambda_doors import LAMBDA_MAX_BYTES, Door, openai_path, prelude
from handler.platforms.lambda_events import Asked, Invoked, Messages
from handler.platforms.lambda_messages import S3Batch
from handler.platforms.lambda_replies import Replies
from handler.platforms.lambda_runtime import HTTP_INTEGRATION, Fault, Invocation, Runtime, Stream
from handler.platforms.message_work import MessageWork
from handler.platforms.secret_keys import SecretKeys
from handler.platforms.usage_table import UsageTable, metering

log = logging.getLogger(__name__)

LAST_WORD_S = 1.0
"""What is left of an invocation's time when it is ended, to say so in; of a short one a quarter."""
FLUSH_S = 2.0
"""How long an invocation waits for usage to be written, where nothing runs after its end."""


def ended_after_s(left_s: float) -> float:
    """When an invocation is ended whose time is over in `left_s`: what it then says has to arrive."""
    return left_s - min(LAST_WORD_S, left_s / 4)


@dataclass(frozen=True, slots=True)
class Rules:
    """What the settings say of how events are answered. Without `keys` everybody may ask."""

    keys: SecretKeys | None
    usage: UsageTable | None
    replies: Replies
    model_id: str
    endpoint_id: str | None
    cors_origins: Sequence[str]
    max_body_bytes: int
    streams: bool
    """Whether a front door that can stream does."""
    freezes: bool
    """Whether nothing runs between invocations."""
    most: int
    """How many messages are worked on at once."""


class Answers:
    """Answers invocations with `call`, on its event loop. `s3_batch` does what objects in S3 ask for."""

    def __init__(self, call: Call, rules: Rules, s3_batch: S3Batch | None, stopping: asyncio.Event) -> None:
        self._call = call
        self._rules = rules
        self._metered = metering(rules.usage, rules.model_id)
        self._messages = MessageWork(call, self._metered, rules.replies, s3_batch, rules.most, stopping)

    async def open(self) -> None:
        """Learn who may ask. Raises `BadSettings` and `UpstreamFailed`."""
        if self._rules.keys is not None:
            await self._rules.keys.open()

    async def close(self, within_s: float) -> None:
        """Write down what was used."""
        if self._rules.usage is not None:
            await self._rules.usage.flush(within_s)

    async def answer(self, runtime: Runtime, invocation: Invocation) -> None:
        """Answer one invocation, whatever happens. Raises `RuntimeApiFailed` if Lambda does not hear it."""
        left_s = max(0.0, invocation.deadline_s - time.time())
        deadline_s = asyncio.get_running_loop().time() + ended_after_s(left_s)
        try:
            event = events.parse(invocation.event)
            match event:
                case Asked(request, door) if door.can_stream and self._rules.streams:
                    await self._stream(runtime, invocation, self._fronted(deadline_s), request)
                case Asked(request, door):
                    answer = await _collected(self._fronted(deadline_s), request, door)
                    await self._settle()
                    await runtime.respond(invocation, answer)
                case Invoked(request):
                    await self._invoked(runtime, invocation, request, deadline_s)
                case Messages():
                    await self._work_off(runtime, invocation, event, deadline_s)
        except BadEvent as error:
            log.warning("an event is not known", extra={"reason": error.message})
            await runtime.fail(invocation, Fault("Worker.BadEvent", error.message))
        except RequestError as error:
            await runtime.fail(invocation, _fault(error))

    # --- requests through an HTTP front door ---------------------------------------------------

    def _fronted(self, deadline_s: float) -> Call:
        """The engine behind key, path and limits; its answers but streams are whole, or errors."""
        call = _whole(within(self._call, deadline_s))

        @asynccontextmanager
        async def guarded(request: Request) -> AsyncIterator[Reply]:
            keys = self._rules.keys
            name = "anybody" if keys is None else (await keys.check(request)).name
            path = openai_path(request, self._rules.endpoint_id)
            if len(request.body) > self._rules.max_body_bytes:
                raise BodyTooLarge(self._rules.max_body_bytes)
            async with self._metered(call, name)(replace(request, path=path)) as reply:
                yield reply

        return edge.front(guarded, cors_origins=self._rules.cors_origins)

    async def _stream(self, runtime: Runtime, invocation: Invocation, call: Call, request: Request) -> None:
        whole = b""
        async with runtime.stream(invocation) as out:
            try:
                async with call(request) as reply:
                    head = prelude(reply.status, reply.headers)
                    if reply.streams:
                        await _pass_on(reply, out, HTTP_INTEGRATION, head)
                    else:
                        whole = head + await read(reply)
            except RequestError as error:
                if not out.begun:
                    raise
                await out.send(error.frame())  # its stream has ended in order: nobody need cut the connection
            await self._settle()
            if whole:
                await out.begin(HTTP_INTEGRATION, whole)

    # --- requests of who may invoke the function -----------------------------------------------

    async def _invoked(
        self, runtime: Runtime, invocation: Invocation, request: Request, deadline_s: float
    ) -> None:
        call = self._metered(_whole(within(self._call, deadline_s)), "aws:invoke")
        status, body = 200, b""
        async with runtime.stream(invocation) as out:
            try:
                async with call(request) as reply:
                    if reply.streams:
                        content_type = reply.header("content-type") or ""
                        if broken := await _pass_on(reply, out, content_type):
                            out.fail(broken)
                    else:
                        status, body = reply.status, await read(reply)
            except RequestError as error:
                if out.begun:
                    await out.send(error.frame())
                    out.fail(_fault(error))
                else:
                    status, body = error.status, json.dumps(error.body()).encode()
            await self._settle()
            if out.begun:
                return
        if status >= 400:
            told = {**json.loads(body)["error"], "status": status}
            body = json.dumps({"error": told}).encode()
            if status >= 500:  # another is an answer: to try again would help nobody
                await runtime.fail(invocation, _fault_of(told))
                return
        if len(body) > LAMBDA_MAX_BYTES:
            raise _too_large(len(body), "Lambda", LAMBDA_MAX_BYTES)
        await runtime.respond(invocation, body)

    # --- messages ------------------------------------------------------------------------------

    async def _work_off(
        self, runtime: Runtime, invocation: Invocation, event: Messages, deadline_s: float
    ) -> None:
        work = partial(self._messages.work, event.source, deadline_s)
        failed = await messages.work_off(event.records, work, most=self._rules.most, deadline_s=deadline_s)
        await self._settle()
        if event.partial:
            told = {"batchItemFailures": [{"itemIdentifier": message_id} for message_id in failed]}
            await runtime.respond(invocation, json.dumps(told).encode())
        elif failed:
            why = f"{len(failed)} of {len(event.records)} messages failed; the log says why."
            await runtime.fail(invocation, Fault("Worker.MessageFailed", why))
        else:
            await runtime.respond(invocation, b"{}")

    async def _settle(self) -> None:
        """What has to be done before an invocation ends, and nothing runs until the next."""
        if self._rules.freezes and self._rules.usage is not None:
            await self._rules.usage.flush(FLUSH_S)


def within(call: Call, deadline_s: float) -> Call:
    """`call`, ended with `DeadlineExceeded` at `deadline_s` of the loop's clock, also in mid-stream."""

    @asynccontextmanager
    async def limited(request: Request) -> AsyncIterator[Reply]:
        limit = asyncio.timeout_at(deadline_s)
        try:
            async with limit, call(request) as reply:
                yield reply
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceeded(
                "The time of this invocation is over before its answer was complete."
            ) from None

    return limited


def _whole(call: Call) -> Call:
    """`call`, whose answers are whole before anything is said of them, streams aside."""

    @asynccontextmanager
    async def whole(request: Request) -> AsyncIterator[Reply]:
        async with call(request) as reply:
            if reply.streams:
                yield reply
            else:
                yield replace(reply, frames=once(await read(reply)))

    return whole


async def _pass_on(reply: Reply, out: Stream, content_type: str, head: bytes = b"") -> Fault | None:
    """Send a stream on as it is made. Returns the error in its last frame, if that is one."""
    broken = None
    await out.begin(content_type, head)
    async for chunk in reply.frames:
        if sse.ERROR_FRAME in chunk:
            broken = _fault_of(sse.data(sse.split(chunk)[-1])["error"])
        await out.send(chunk)
    return broken


async def _collected(call: Call, request: Request, door: Door) -> bytes:
    """The answer to `request` as one object, for a door that takes no stream."""
    parts: list[bytes] = []
    status, headers = 200, Headers()
    try:
        async with call(request) as reply:
            status, headers = reply.status, reply.headers
            async for chunk in reply.frames:
                parts.append(chunk)  # noqa: PERF401 - what has come by the time of an error is answered
    except RequestError as error:
        parts.append(error.frame())  # of a stream: anything else is whole, or an error by itself
    raw = json.dumps(door.render(status, headers, b"".join(parts))).encode()
    if len(raw) <= door.max_bytes:
        return raw
    too_large = _too_large(len(raw), f"the {door.name}", door.max_bytes)
    kept = tuple(pair for pair in headers if not pair[0].startswith("content-"))
    head = (*kept, ("content-type", "application/json"))
    return json.dumps(door.render(too_large.status, head, json.dumps(too_large.body()).encode())).encode()


def _too_large(size_bytes: int, taker: str, limit_bytes: int) -> RequestError:
    why = f"The answer takes {size_bytes} bytes, and {taker} does not take more than {limit_bytes}."
    return RequestError(why, code="answer_too_large")


def _fault(error: RequestError) -> Fault:
    return _fault_of({**error.body()["error"], "status": error.status})


def _fault_of(error: dict[str, Any]) -> Fault:
    """OpenAI's error object as Lambda has an error."""
    return Fault(f"Worker.{error['code']}", error["message"], {"error": error})
