"""Where the answers to messages go: a queue of SQS or an object in S3, and only what `REPLY_TO` allows.

An answer is a line of OpenAI's batches:

    {"id": MESSAGE, "custom_id": ..., "error": null,
     "response": {"status_code": 200, "request_id": MESSAGE, "body": {...}}}

A message may come twice and is then answered twice: an object is written over, a FIFO queue drops the
second.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from handler.errors import BadRequest, Forbidden
from handler.platforms.aws_clients import Clients

SQS_MAX_BYTES = 1 << 20
"""What a message of SQS holds: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/quotas-messages.html."""


@dataclass(frozen=True, slots=True)
class Replies:
    """Sends answers to the places that begin with one of `allowed`: URLs of queues, `s3://bucket/prefix`."""

    allowed: Sequence[str]
    clients: Clients

    def check(self, reply_to: str | None) -> str:
        """`reply_to`, if an answer may go there. Raises `BadRequest` and `Forbidden`."""
        if reply_to is None:
            raise BadRequest('The message does not say where its answer goes: it has no "reply_to".')
        for place in self.allowed:
            folder = place.rstrip("/") + "/"
            if reply_to == place or (place.startswith("s3://") and reply_to.startswith(folder)):
                return reply_to
        raise Forbidden('No answer may go where the message\'s "reply_to" says: it is not in REPLY_TO.')

    async def put(self, reply_to: str, message_id: str, group: str | None, line: dict[str, Any]) -> None:
        """Send `line` to `reply_to`, which was checked. Raises `RequestError` if that can't be done now."""
        raw = _dump(line)
        if reply_to.startswith("s3://"):
            await asyncio.to_thread(self._put_object, reply_to, message_id, raw)
            return
        if len(raw) > SQS_MAX_BYTES:
            why = f"The answer takes {len(raw)} bytes, and a queue takes {SQS_MAX_BYTES}: let it go to S3."
            error = {"code": "answer_too_large", "message": why}
            raw = _dump({**line, "response": None, "error": error})
        await asyncio.to_thread(self._send, reply_to, message_id, group, raw)

    def _put_object(self, reply_to: str, message_id: str, raw: bytes) -> None:
        bucket, _, key = reply_to.removeprefix("s3://").partition("/")
        if not key or key.endswith("/"):
            key += f"{message_id}.json"
        self.clients.call(
            "s3", "put_object", Bucket=bucket, Key=key, Body=raw, ContentType="application/json"
        )

    def _send(self, queue_url: str, message_id: str, group: str | None, raw: bytes) -> None:
        fifo = {"MessageGroupId": group or message_id, "MessageDeduplicationId": message_id}
        self.clients.call(
            "sqs",
            "send_message",
            QueueUrl=queue_url,
            MessageBody=raw.decode(),
            **(fifo if queue_url.endswith(".fifo") else {}),
        )


def answered(
    message_id: str, custom_id: str | None, status: int, request_id: str | None, body: bytes
) -> dict[str, Any]:
    """The line for an answer with a status, whatever that is."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = body.decode(errors="replace")
    response = {"status_code": status, "request_id": request_id, "body": value}
    return {"id": message_id, "custom_id": custom_id, "response": response, "error": None}


def _dump(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode(errors="replace")
