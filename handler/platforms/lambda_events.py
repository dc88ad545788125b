"""Which kind of event a Lambda function was invoked with.

The first thing that one kind alone has decides. Imports AWS's models: not before the engine is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from handler import jobs
from handler.errors import BadEvent
from handler.messages import Request
from handler.platforms import lambda_doors as doors
from handler.platforms import lambda_messages as messages
from handler.platforms.lambda_doors import Door
from handler.platforms.lambda_messages import Record

KNOWN = (
    "a function URL, an HTTP API (format 2.0), a REST API with a proxy integration, a load balancer, SQS, "
    f"SNS, S3, EventBridge, and a direct invoke with one of these: {jobs.SHAPES}"
)

_OF_A_JOB = frozenset({"openai_route", "openai_input", "route", "messages", "prompt"})


@dataclass(frozen=True, slots=True)
class Asked:
    """A request through an HTTP front door."""

    request: Request
    door: Door


@dataclass(frozen=True, slots=True)
class Invoked:
    """A request of somebody who may invoke the function."""

    request: Request


@dataclass(frozen=True, slots=True)
class Messages:
    """Work for which nobody waits. `partial` is whether those that failed can be named."""

    source: str
    records: list[Record]
    partial: bool = False


Event = Asked | Invoked | Messages


def parse(raw: bytes) -> Event:
    """The event in `raw`. Raises `BadEvent`, which lists what is known."""
    try:
        event = json.loads(raw)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise BadEvent(f"An event is a JSON object, of {KNOWN}.")
    try:
        return _messages(event) or _asked(event) or _invoked(event)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise BadEvent(
            f"The event looks like one of {error.title} and is none: {where}: {first['msg']}."
        ) from None


def _messages(event: Mapping[str, Any]) -> Messages | None:
    match event:
        case {"Records": [{"eventSource": "aws:sqs"}, *_]}:
            return Messages("sqs", messages.parse_sqs(event), partial=True)
        case {"Records": [{"EventSource": "aws:sns"}, *_]}:
            return Messages("sns", messages.parse_sns(event))
        case {"invokeCompletionStatus": str(), "requestId": str()}:
            # An API that streams is said to tell so that an answer has ended. AWS documents nothing of it;
            # the crate turul-mcp-aws-lambda has seen it.
            return Messages("completion", [])
        case {"Records": [{"eventSource": "aws:s3"}, *_]} | {"Event": "s3:TestEvent"}:
            source = "s3"
        case {"detail-type": str(), "source": str()}:
            source = "eventbridge"
        case {"type": messages.CONTINUE}:
            source = "invoke"
        case _:
            return None
    return Messages(source, [Record(str(event.get("id", source)), event)])


def _asked(event: Mapping[str, Any]) -> Asked | None:
    match event:
        case {"requestContext": {"elb": _}}:
            return Asked(*doors.parse_alb(event))
        case {"version": "2.0", "requestContext": {"http": _}}:
            return Asked(*doors.parse_v2(event))
        case {"httpMethod": str(), "requestContext": dict()}:
            return Asked(*doors.parse_v1(event))
    return None


def _invoked(event: Mapping[str, Any]) -> Invoked:
    given = event["input"] if isinstance(event.get("input"), dict) else event
    if given.keys() & _OF_A_JOB:
        return Invoked(jobs.parse(given))
    named = ", ".join(sorted(map(repr, event))) or "none"
    raise BadEvent(f"An event is of {KNOWN}. The keys of this one: {named}.")
