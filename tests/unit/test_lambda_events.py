"""Events of a Lambda function as AWS's tool writes them (`tests/events`): what they are and hold."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
from pathlib import Path
from typing import Any

import pytest

from handler.errors import BadEvent, FirstTokenError, NoSuchEndpoint, NoSuchRoute
from handler.messages import Headers, Request
from handler.platforms import lambda_doors as doors
from handler.platforms.lambda_events import Asked, Event, Invoked, Messages, parse
from handler.platforms.lambda_messages import Continued, Created, Job, Record, tasks, work_off

EVENTS = {
    path.stem: json.loads(path.read_text()) for path in (Path(__file__).parents[1] / "events").glob("*.json")
}
BODY = b'{"model":"tinychat","messages":[{"role":"user","content":"Hi"}]}'
CHAT = "/v1/chat/completions"


def event(name: str, **change: Any) -> dict[str, Any]:
    """The event called `name`, with `change`."""
    return {**copy.deepcopy(EVENTS[name]), **change}


def parsed(value: Any) -> Event:
    """What `value` is taken for."""
    return parse(json.dumps(value).encode())


def asked(value: Any) -> Asked:
    """The same, if it came through a front door."""
    found = parsed(value)
    assert isinstance(found, Asked)
    return found


def held(value: Any) -> list[Any]:
    """What the messages of an event hold."""
    found = parsed(value)
    assert isinstance(found, Messages)
    return [task for record in found.records for task in tasks(record)]


def message(body: Any) -> dict[str, Any]:
    """An event of a queue with one message."""
    found = event("sqs")
    found["Records"][0]["body"] = body if isinstance(body, str) else json.dumps(body)
    return found


# --- front doors --------------------------------------------------------------------------------


def test_a_rest_api() -> None:
    """Headers come as lists, the stage is no part of the path, the body is decoded."""
    found = asked(event("rest-api"))
    assert found.door is doors.REST_API
    request = found.request
    assert (request.method, request.path, request.query, request.body) == (
        "POST",
        f"/abc123/openai{CHAT}",
        "foo=bar",
        BODY,
    )
    assert request.header("user-agent") == "Custom User Agent String"
    assert doors.openai_path(request, None) == CHAT


def test_an_http_api_and_a_function_url() -> None:
    """One format; the host tells which it is, and a stage that is part of the path is taken away."""
    given = event("http-api")
    found = asked(given)
    assert found.door is doors.HTTP_API
    assert found.request == Request(
        "POST",
        f"/v2/abc123/openai{CHAT}",
        (("header1", "value1"), ("header2", "value1,value2"), ("cookie", "cookie1"), ("cookie", "cookie2")),
        BODY,
        "parameter1=value1&parameter1=value2&parameter2=value",
    )
    given["requestContext"] |= {"domainName": "abc.lambda-url.eu-central-1.on.aws", "stage": "v2"}
    found = asked(given)
    assert found.door is doors.FUNCTION_URL
    assert found.request.path == f"/abc123/openai{CHAT}"


def test_a_load_balancer() -> None:
    """With single headers, and with lists where its target group is set so."""
    given = event("load-balancer")
    found = asked(given)
    assert found.door is doors.ALB
    assert (found.request.path, found.request.query, found.request.body) == (CHAT, "query=1234ABCD", BODY)
    assert found.request.header("accept-encoding") == "gzip"
    del given["headers"], given["queryStringParameters"]
    given |= {
        "multiValueHeaders": {"x-a": ["1", "2"]},
        "multiValueQueryStringParameters": {"a": ["1", "2"]},
        "body": "",
        "isBase64Encoded": False,
    }
    found = asked(given)
    assert found.door is doors.ALB_LISTS
    assert found.request == Request("POST", CHAT, (("x-a", "1"), ("x-a", "2")), b"", "a=1&a=2")


def test_a_path_is_decoded() -> None:
    """As a server does it."""
    for given in (
        event("rest-api", path="/v1/models/org%2Fname"),
        event("http-api", rawPath="/v1/models/org%2Fname"),
    ):
        assert asked(given).request.path == "/v1/models/org/name"


@pytest.mark.parametrize(
    ("path", "endpoint_id", "expected"),
    [
        (CHAT, None, CHAT),
        (CHAT, "abc123", CHAT),
        (f"/v2/abc123/openai{CHAT}", None, CHAT),
        (f"/v2/abc123/openai{CHAT}", "abc123", CHAT),
        (f"/abc123/openai{CHAT}", "abc123", CHAT),
        (f"/llm/abc123/openai{CHAT}", "abc123", CHAT),
        ("/v2/abc123/openai/v1/../metrics", None, "/v1/../metrics"),  # which is no route
        (f"/v2/other/openai{CHAT}", "abc123", NoSuchEndpoint),
        (f"/v2/ABC123/openai{CHAT}", "abc123", NoSuchEndpoint),
        (f"/a/v2/abc123/openai{CHAT}", "abc123", NoSuchRoute),
        (f"/openai{CHAT}", None, NoSuchRoute),
        (f"//openai{CHAT}", None, NoSuchRoute),
        ("/v2/abc123/v1/models", None, NoSuchRoute),
        ("/v2/abc123/openai/v1", None, NoSuchRoute),
        ("/v2/abc123/openai/v10/models", None, NoSuchRoute),
        ("/metrics", None, NoSuchRoute),
        ("/v1", None, NoSuchRoute),
        ("", None, NoSuchRoute),
    ],
)
def test_the_openai_part_of_a_path(path: str, endpoint_id: str | None, expected: Any) -> None:
    """Under whatever stage, and with the endpoint's id if there is one."""
    request = Request("POST", path)
    if isinstance(expected, str):
        assert doors.openai_path(request, endpoint_id) == expected
    else:
        with pytest.raises(expected):
            doors.openai_path(request, endpoint_id)


HEADERS: Headers = (
    ("content-type", "application/json"),
    ("content-length", "2"),
    ("vary", "origin"),
    ("vary", "accept"),
    ("set-cookie", "a=1; Path=/"),
    ("set-cookie", "b=2"),
)


def test_how_a_streamed_answer_begins() -> None:
    """Status and headers as JSON, eight zero bytes; its length is not known."""
    raw = doors.prelude(200, HEADERS)
    assert raw.endswith(b"\0" * 8)
    assert raw.count(b"\0") == 8
    assert json.loads(raw[:-8]) == {
        "statusCode": 200,
        "headers": {"content-type": "application/json", "vary": "origin, accept"},
        "cookies": ["a=1; Path=/", "b=2"],
    }


def test_whole_answers_as_each_door_takes_them() -> None:
    """What is no text is encoded."""
    text = {"body": "{}", "isBase64Encoded": False}
    single = {"content-type": "application/json", "vary": "origin, accept"}
    lists = {
        "content-type": ["application/json"],
        "vary": ["origin", "accept"],
        "set-cookie": ["a=1; Path=/", "b=2"],
    }
    for door in (doors.FUNCTION_URL, doors.HTTP_API):
        assert door.render(200, HEADERS, b"{}") == {
            "statusCode": 200,
            "headers": single,
            "cookies": ["a=1; Path=/", "b=2"],
            **text,
        }
    assert doors.REST_API.render(404, HEADERS, b"{}") == {
        "statusCode": 404,
        "multiValueHeaders": lists,
        **text,
    }
    assert doors.ALB.render(503, HEADERS, b"{}") == {
        "statusCode": 503,
        "statusDescription": "503 Service Unavailable",
        "headers": {**single, "set-cookie": "b=2"},
        **text,
    }
    assert doors.ALB_LISTS.render(200, HEADERS, b"\xff") == {
        "statusCode": 200,
        "statusDescription": "200 OK",
        "multiValueHeaders": lists,
        "body": base64.b64encode(b"\xff").decode(),
        "isBase64Encoded": True,
    }


# --- messages -----------------------------------------------------------------------------------


def test_a_request_in_a_message() -> None:
    """Where its answer goes is a field of it, or an attribute, which wins."""
    job = {"openai_route": CHAT, "openai_input": {"messages": []}, "reply_to": "s3://a/b", "custom_id": "c-1"}
    request = Request("POST", CHAT, (("content-type", "application/json"),), b'{"messages":[]}')
    assert held(message(job)) == [Job(request, "s3://a/b", "c-1")]
    assert held(message({"messages": [], "reply_to": "s3://a/b"})) == [Job(request, "s3://a/b", None)]
    given = message(job)
    given["Records"][0]["messageAttributes"] = {"reply_to": {"stringValue": "s3://c/d", "dataType": "String"}}
    assert held(given) == [Job(request, "s3://c/d", "c-1")]
    found = parsed(given)
    assert isinstance(found, Messages)
    assert (found.source, found.partial, found.records[0].group) == ("sqs", True, None)


def test_a_message_of_a_fifo_queue_has_its_group() -> None:
    """One of another queue has not, though it may bear one: it is for fairness there."""
    given = message("{}")
    given["Records"][0]["attributes"]["MessageGroupId"] = "g"
    for arn, group in (("queue", None), ("queue.fifo", "g")):
        given["Records"][0]["eventSourceARN"] = f"arn:aws:sqs:eu-central-1:1:{arn}"
        found = parsed(given)
        assert isinstance(found, Messages)
        assert found.records[0].group == group


def test_a_topic() -> None:
    """Its messages hold what those of a queue do."""
    given = event("sns")
    given["Records"][0]["Sns"] |= {
        "Message": json.dumps({"messages": [], "reply_to": "s3://a/b"}),
        "SigningCertUrl": "https://sns.us-east-1.amazonaws.com/a.pem",
        "UnsubscribeUrl": "https://sns.us-east-1.amazonaws.com/?Action=Unsubscribe",
    }
    (job,) = held(given)
    assert (job.request.path, job.reply_to) == (CHAT, "s3://a/b")


def test_a_new_object() -> None:
    """From S3 itself, in a message, and in a message of a topic in a message; its name is unquoted."""
    created = Created("batches", "in/a b+c.jsonl", "0123456789abcdef0123456789abcdef")
    notice = event("s3-put")
    topic = {"Type": "Notification", "TopicArn": "arn:aws:sns:x", "Message": json.dumps(notice)}
    for given in (notice, message(notice), message(topic)):
        assert held(given) == [created]
    notice["Records"][0]["s3"]["object"]["versionId"] = "v2"
    assert held(notice) == [Created("batches", "in/a b+c.jsonl", "v2")]


def test_what_there_is_nothing_to_do_for() -> None:
    """S3's test when notifications are switched on, and a schedule that keeps a worker warm."""
    for given in ({"Service": "Amazon S3", "Event": "s3:TestEvent"}, event("schedule")):
        assert held(given) == held(message(given)) == []


def test_a_schedule_may_hold_a_request() -> None:
    """In `detail`, as a message does."""
    (job,) = held(event("schedule", detail={"prompt": "Hi", "reply_to": "s3://a/b"}))
    assert (job.request.path, job.reply_to) == ("/v1/completions", "s3://a/b")


def test_a_batch_that_goes_on() -> None:
    """In its own words, in a message or by itself."""
    given = {"type": "batch.continue", "bucket": "b"}
    assert held(given) == held(message(given)) == [Continued(given)]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("Hello from SQS!", "A message holds JSON"),
        ("[]", "A message holds a JSON object"),
        ({"hello": 1}, "The keys of this one: 'hello'"),
        (EVENTS["s3-delete"], "Of S3 only new objects are work here, and this is 'ObjectRemoved:Delete'"),
        ({"Records": [{"eventSource": "aws:s3"}]}, "A notification of S3 lacks 'eventName'"),
        ({"Records": [5]}, "A notification of S3 lacks"),
        (
            {**EVENTS["schedule"], "source": "aws.s3", "detail-type": "Object Created"},
            "An event of S3 lacks 'object'",
        ),
        (
            {**EVENTS["schedule"], "source": "aws.s3", "detail-type": "Object Deleted"},
            "Of S3 only new objects are work here, and this is 'Object Deleted'",
        ),
    ],
)
def test_a_message_that_is_not_known(body: Any, why: str) -> None:
    """Says what is wrong with it; the other messages are not concerned."""
    with pytest.raises(BadEvent) as refused:
        held(message(body))
    assert why in refused.value.message


async def done(records: list[Record], failing: str, *, most: int = 8) -> tuple[list[str], list[str]]:
    """What was begun, and what has failed; those whose id is in `failing` do."""
    begun: list[str] = []

    async def work(record: Record) -> None:
        begun.append(record.id)
        await asyncio.sleep(0)
        if record.id in failing.split():
            raise FirstTokenError("so")
        if record.id == "bug":
            raise ZeroDivisionError

    deadline_s = asyncio.get_running_loop().time() + 10
    return begun, await work_off(records, work, most=most, deadline_s=deadline_s)


async def test_one_message_fails_by_itself() -> None:
    """Whatever it fails with."""
    records = [Record(name, None) for name in ("a", "b", "bug", "c")]
    assert await done(records, "b") == (["a", "b", "bug", "c"], ["b", "bug"])


async def test_in_a_group_nothing_follows_a_failure() -> None:
    """What comes after it fails without being tried, so that the order is kept; other groups go on."""
    records = [
        Record("a1", None, "a"),
        Record("b1", None, "b"),
        Record("a2", None, "a"),
        Record("b2", None, "b"),
    ]
    assert await done(records, "a1") == (["a1", "b1", "b2"], ["a1", "a2"])


async def test_messages_wait_for_each_other() -> None:
    """At most so many are worked on."""
    running = most = 0

    async def work(_: Record) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    deadline_s = asyncio.get_running_loop().time() + 10
    assert await work_off([Record(str(n), None) for n in range(9)], work, most=3, deadline_s=deadline_s) == []
    assert most == 3


async def test_what_is_not_done_in_time_has_failed() -> None:
    """It is cancelled, and what is done is done."""
    left: list[str] = []

    async def work(record: Record) -> None:
        if record.id == "slow":
            try:
                await asyncio.Event().wait()
            finally:
                left.append(record.id)

    now_s = asyncio.get_running_loop().time()
    records = [Record("fast", None), Record("slow", None)]
    assert await work_off(records, work, most=8, deadline_s=now_s) == ["slow"]
    assert left == ["slow"]


# --- the others ---------------------------------------------------------------------------------


def test_a_direct_invoke() -> None:
    """With a body of OpenAI's, or a job as RunPod has it."""
    request = Request("POST", CHAT, (("content-type", "application/json"),), b'{"messages":[]}')
    job = {"openai_route": CHAT, "openai_input": {"messages": []}}
    shapes: list[Any] = [{"messages": []}, job, {"input": job}, {"id": "1", "input": {"messages": []}}]
    assert [parsed(shape) for shape in shapes] == [Invoked(request)] * 4


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([], "An event is a JSON object, of a function URL"),
        ({}, "The keys of this one: none."),
        ({"input": {"x": 1}}, "The keys of this one: 'input'."),
        (EVENTS["cloudwatch-logs"], "The keys of this one: 'awslogs'."),
        ({"openai_route": 5}, '"openai_route" of a job\'s input is a string'),
        (
            {"httpMethod": "POST", "requestContext": {}},
            "looks like one of APIGatewayProxyEventModel and is none",
        ),
        (
            {"Records": [{"eventSource": "aws:sqs"}]},
            "looks like one of SqsModel and is none: Records.0.messageId",
        ),
    ],
)
def test_an_event_that_is_not_known(given: Any, why: str) -> None:
    """Says what is known, or what is missing; nothing of the event's content is repeated."""
    with pytest.raises(BadEvent) as refused:
        parsed(given)
    assert why in refused.value.message


def test_an_event_that_is_no_json() -> None:
    """However deep."""
    for raw in (b"", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(BadEvent, match="An event is a JSON object"):
            parse(raw)
