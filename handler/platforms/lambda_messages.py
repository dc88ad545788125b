"""Events of a Lambda function for which nobody waits: messages of SQS and SNS, events of S3 and EventBridge.

A message holds work, in one of these shapes:

    {"openai_route": "/v1/chat/completions", "openai_input": {...}, "reply_to": "..."}     one request
    {"messages": [...], "reply_to": "..."}, or another of the shapes of `handler.jobs`       the same
    {"Records": [{"eventSource": "aws:s3", ...}]}, or EventBridge's event of the same        a new object
    {"type": "batch.continue", ...}                        a batch that goes on, in its own words

and may be wrapped by SNS. `reply_to` says where the answer goes (see `handler.platforms.lambda_replies`); as
an attribute of a message of SQS it wins over the field.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_plus

from aws_lambda_powertools.utilities.data_classes import S3Event
from aws_lambda_powertools.utilities.parser import models

from handler import jobs
from handler.errors import BadEvent, FirstTokenError
from handler.messages import Call, Request

log = logging.getLogger(__name__)

CONTINUE = "batch.continue"
SHAPES = (
    '{"openai_route": "/v1/chat/completions", "openai_input": {...}, "reply_to": "..."}, an OpenAI body with '
    '"reply_to", a notification of S3 or EventBridge that an object was created, '
    f'{{"type": "{CONTINUE}", ...}}'
)


@dataclass(frozen=True, slots=True)
class Job:
    """One OpenAI request, and where its answer goes. `custom_id` comes back with it."""

    request: Request
    reply_to: str | None
    custom_id: str | None = None


@dataclass(frozen=True, slots=True)
class Created:
    """A new object in S3. `version` is its version where the bucket keeps them, else its ETag."""

    bucket: str
    key: str
    version: str


@dataclass(frozen=True, slots=True)
class Continued:
    """A batch that goes on; `message` is what its last shift has written for this one."""

    message: Mapping[str, Any]


Task = Job | Created | Continued


@dataclass(frozen=True, slots=True)
class Shift:
    """What work on a batch may use: whom to ask, for how many requests at a time, and until when.

    It has to be done, or handed on, by `deadline_s` of the loop's clock, where it is cancelled; soon after
    `stopping` is set, the worker ends.
    """

    call: Call
    most: int
    deadline_s: float
    stopping: asyncio.Event


S3Batch = Callable[[Created | Continued, Shift], Awaitable[None]]
"""Does what a new object asks for, on the engine's loop; returns when the message may be forgotten.

Raises `FirstTokenError` where it has to come again.
"""


@dataclass(frozen=True, slots=True)
class Record:
    """One message. Within its `group` messages are done in order; None is a group of its own."""

    id: str
    content: Any = field(repr=False)
    group: str | None = None
    reply_to: str | None = None


def parse_sqs(event: Mapping[str, Any]) -> list[Record]:
    """The messages of a queue."""
    records = models.SqsModel.model_validate(event).Records
    return [
        Record(
            record.messageId,
            record.body,
            record.attributes.MessageGroupId if record.eventSourceARN.endswith(".fifo") else None,
            attribute.stringValue if (attribute := record.messageAttributes.get("reply_to")) else None,
        )
        for record in records
    ]


def parse_sns(event: Mapping[str, Any]) -> list[Record]:
    """The messages of a topic that invokes the function itself."""
    records = models.SnsModel.model_validate(event).Records
    return [Record(record.Sns.MessageId, record.Sns.Message) for record in records]


def tasks(record: Record) -> list[Task]:
    """The work that `record` holds; none where there is nothing to do. Raises `BadEvent`."""
    return _tasks(record.content, record.reply_to)


def _tasks(content: Any, reply_to: str | None = None) -> list[Task]:
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError):
            raise BadEvent(f"A message holds JSON: {SHAPES}.") from None
    if not isinstance(content, dict):
        raise BadEvent(f"A message holds a JSON object: {SHAPES}.")
    if content.get("Type") == "Notification" and "TopicArn" in content:
        return _tasks(content.get("Message"), reply_to)
    if content.get("Event") == "s3:TestEvent":  # S3 sends one when notifications are switched on
        return []
    if isinstance(content.get("Records"), list):
        return [_created(record) for record in S3Event(content).records]
    if "detail-type" in content:
        return from_eventbridge(content)
    if content.get("type") == CONTINUE:
        return [Continued(content)]
    request = jobs.parse(
        {name: value for name, value in content.items() if name not in {"reply_to", "custom_id"}}
    )
    return [Job(request, reply_to or _word(content.get("reply_to")), _word(content.get("custom_id")))]


def _word(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _created(record: Any) -> Created:
    try:
        name, found = record.event_name, record.s3.get_object
        if record.event_source != "aws:s3" or not name.startswith("ObjectCreated:"):
            raise BadEvent(f"Of S3 only new objects are work here, and this is {name!r}.")
        key = unquote_plus(found["key"])  # S3 writes it as in a query
        return Created(record.s3.bucket.name, key, found.version_id or found.etag)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadEvent(f"A notification of S3 lacks {error}.") from error


def from_eventbridge(event: Mapping[str, Any]) -> list[Task]:
    """The work that an event of EventBridge holds: a new object, or the request in its `detail`.

    A schedule's event is nothing to do: it keeps a worker warm.
    """
    # By hand: the model of EventBridge's events refuses what AWS's own tool writes.
    kind = event["detail-type"]
    detail: Any = event.get("detail")
    if event.get("source") == "aws.s3":
        if kind != "Object Created":
            raise BadEvent(f"Of S3 only new objects are work here, and this is {kind!r}.")
        try:
            found = detail["object"]
            version = found.get("version-id") or found.get("etag") or ""
            return [Created(detail["bucket"]["name"], found["key"], version)]  # the key is not quoted here
        except (KeyError, TypeError, AttributeError) as error:
            raise BadEvent(f"An event of S3 lacks {error}.") from error
    if kind == "Scheduled Event" and not detail:
        return []
    return _tasks(detail)


async def work_off(
    records: Sequence[Record],
    work: Callable[[Record], Awaitable[None]],
    *,
    most: int,
    deadline_s: float,
) -> list[str]:
    """Do `work` for each of `records`, at most `most` at a time; returns the ids of those that failed.

    In a group a message waits for those before it, and fails with them. What is not done by `deadline_s`,
    of the loop's clock, is cancelled and has failed. The log says why each did.
    """
    slots = asyncio.Semaphore(most)
    done: set[str] = set()

    async def in_order(group: Iterable[Record]) -> None:
        for record in group:
            async with slots:
                try:
                    await work(record)
                except FirstTokenError as error:
                    log.warning("a message failed", extra={"message_id": record.id, "reason": str(error)})
                    return
                except Exception:  # the boundary of a message: it comes again, and others go on
                    log.exception("a message failed", extra={"message_id": record.id})
                    return
                done.add(record.id)

    running = [asyncio.create_task(in_order(group)) for group in _groups(records)]
    try:
        async with asyncio.timeout_at(deadline_s):
            await asyncio.gather(*running)
    except TimeoutError:
        log.warning("messages were not done in time", extra={"left": len(records) - len(done)})
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return [record.id for record in records if record.id not in done]


def _groups(records: Iterable[Record]) -> list[list[Record]]:
    ordered: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        key = ("message", record.id) if record.group is None else ("group", record.group)
        ordered.setdefault(key, []).append(record)
    return list(ordered.values())
