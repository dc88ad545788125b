"""What a message asks for, done: one request whose answer is sent away, or work on a batch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass

from handler.body import asks_for_stream
from handler.errors import BadEvent, BadRequest, RequestError, UpstreamFailed
from handler.messages import Call, read
from handler.platforms import lambda_messages as messages
from handler.platforms.lambda_messages import Continued, Created, Job, Record, S3Batch, Shift
from handler.platforms.lambda_replies import Replies, answered


@dataclass(frozen=True, slots=True)
class MessageWork:
    """Does what messages ask for with `call`, on its event loop, a batch with `most` requests at a time.

    `metered(call, key)` is `call`, of which is written down what `key` uses.
    """

    call: Call
    metered: Callable[[Call, str], Call]
    replies: Replies
    s3_batch: S3Batch | None
    most: int
    stopping: asyncio.Event

    async def work(self, source: str, deadline_s: float, record: Record) -> None:
        """Do all that `record` asks for. Raises `FirstTokenError` to get it again."""
        call = self.metered(self.call, f"aws:{source}")
        for task in messages.tasks(record):
            match task:
                case Job():
                    await self._job(call, record, task)
                case Created() | Continued():
                    if self.s3_batch is None:
                        raise BadEvent("This worker runs no batches: BATCH_INPUT is not set.")
                    await self.s3_batch(task, Shift(call, self.most, deadline_s, self.stopping))

    async def _job(self, call: Call, record: Record, job: Job) -> None:
        """Run one request, and send its answer away."""
        place = self.replies.check(job.reply_to)
        try:
            if asks_for_stream(job.request):
                raise BadRequest('A message is answered whole: leave "stream" out.', param="stream")
            async with call(job.request) as reply:
                status, body = reply.status, await read(reply)
        except RequestError as error:
            status, body = error.status, json.dumps(error.body()).encode()
        if status >= 500 or status == 429:
            raise UpstreamFailed(f"it was answered with {status}: {body[:300].decode(errors='replace')}")
        line = answered(record.id, job.custom_id, status, record.id, body)
        await self.replies.put(place, record.id, record.group, line)
