"""`handler.platforms.aws_lambda`: a strict Runtime API on loopback, front doors, a scripted engine."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest

from handler import sse
from handler.errors import ModelNotFound, NoResources
from handler.platforms.aws_lambda import AwsLambda
from handler.platforms.lambda_answers import ended_after_s
from handler.platforms.lambda_doors import ALB_MAX_BYTES, LAMBDA_MAX_BYTES
from handler.platforms.lambda_messages import Created, Shift
from handler.settings import Settings
from handler.supervision import Notifier
from tests.contract import recorded
from tests.lambda_doors import DOORS, ENDPOINT_ID
from tests.lambda_function import Function, function
from tests.lambda_runtime import BrokenStream, RuntimeApi
from tests.scripted_app import EVENT_STREAM, Fail, Pause, Say, Script, ScriptedApp, answer, stream
from tests.servers import KEY, MODEL, ROOT

CHAT = "POST /v1/chat/completions"
ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
DIRECT = {"openai_route": "/v1/chat/completions", "openai_input": ASK}
MODES = {"rest-buffered": {"LAMBDA_RESPONSE_MODE": "buffered"}}
"""How a function has to be set up for a door that could stream and does not."""
STREAM = {**DIRECT, "openai_input": {**ASK, "stream": True}}


def sqs(*bodies: Any, fifo: bool = False, groups: str = "") -> dict[str, Any]:
    """An event of a queue, whose messages are called m0, m1, ..."""
    attributes = {
        "ApproximateReceiveCount": "1",
        "SentTimestamp": "1545082649183",
        "SenderId": "AIDAIENQZJOLO23YVJ4VO",
        "ApproximateFirstReceiveTimestamp": "1545082649185",
    }
    return {
        "Records": [
            {
                "messageId": f"m{number}",
                "receiptHandle": "handle",
                "body": body if isinstance(body, str) else json.dumps(body),
                "attributes": {**attributes, **({"MessageGroupId": groups[number]} if fifo else {})},
                "messageAttributes": {},
                "md5OfBody": "e4e68fb7bd0e697a0ae8f1bb342846b3",
                "eventSource": "aws:sqs",
                "eventSourceARN": "arn:aws:sqs:eu-central-1:123456789012:queue" + (".fifo" if fifo else ""),
                "awsRegion": "eu-central-1",
            }
            for number, body in enumerate(bodies)
        ]
    }


async def whole(on: Function, event: Any) -> Any:
    """What the function answers to `event`, whole."""
    return await (await on.api.invoke(event)).whole()


# --- front doors --------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
async def test_every_front_door_gets_what_it_takes(door: str) -> None:
    """A whole answer, a stream and an error, with their statuses and headers."""
    app = ScriptedApp({CHAT: [recorded.chat(), recorded.CHAT_STREAM, recorded.NO_MODEL]})
    async with function(app, MODES.get(door)) as on, on.server(door).client() as client:
        whole = await client.chat.completions.with_raw_response.create(**ASK)
        assert whole.status_code == 200
        assert whole.headers["content-type"] == "application/json"
        assert whole.headers["x-request-id"].startswith("req_")
        assert whole.parse().choices[0].message.content == "".join(recorded.WORDS)
        chunks = [chunk async for chunk in await client.chat.completions.create(**ASK, stream=True)]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "".join(recorded.WORDS)
        async with on.server(door).http() as http:
            refused = await http.post("chat/completions", json=ASK, headers={"x-request-id": "mine"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (404, "mine")
    assert refused.json()["error"]["code"] == "model_not_found"
    app.finish()
    first = app.seen[0]
    assert json.loads(first.body) == ASK
    assert first.header("authorization") is None
    assert {call.query for call in app.seen} == {""}


@pytest.mark.parametrize("door", DOORS)
async def test_no_door_opens_without_a_key(door: str) -> None:
    """A wrong key and none at all are 401 in OpenAI's shape, and the engine hears of neither."""
    app = ScriptedApp({})
    async with function(app, MODES.get(door)) as on, on.server(door).http() as http:
        for headers in ({"authorization": "Bearer wrong"}, {"authorization": ""}):
            refused = await http.post("chat/completions", json=ASK, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    app.finish()


async def test_eight_streams_at_once_arrive_as_they_are_made() -> None:
    """Every client has its first chunk before any second one is made."""
    script = stream(recorded.ROLE, Pause("rest"), *recorded.DELTAS, recorded.LAST)
    app = ScriptedApp({CHAT: script}, repeat=True)
    async with function(app) as on, on.server().client() as client:
        streams = await asyncio.gather(
            *(client.chat.completions.create(**ASK, stream=True) for _ in range(8))
        )
        firsts = await asyncio.gather(*(anext(aiter(one)) for one in streams))
        assert [chunk.choices[0].delta.role for chunk in firsts] == ["assistant"] * 8
        assert on.api.polling == 0
        app.gate("rest").opened.set()
        for one in streams:
            said = "".join([chunk.choices[0].delta.content or "" async for chunk in one])
            assert said == "".join(recorded.WORDS)
        await on.api.polled(8)


async def test_an_endpoint_has_one_id_where_it_is_set() -> None:
    """Another is a 404 in OpenAI's shape, and so is what leads out of the prefix."""
    app = ScriptedApp({"GET /v1/models": recorded.models()})
    async with function(app, {"ENDPOINT_ID": ENDPOINT_ID}) as on, on.server("url").http() as http:
        assert (await http.get("models")).status_code == 200
        for path, code in {
            "/v2/other/openai/v1/models": "endpoint_not_found",
            f"/v2/{ENDPOINT_ID}/openai/v1/../metrics": "unknown_url",
            f"/v2/{ENDPOINT_ID}/openai/v1/..%2f..%2fmetrics": "unknown_url",
            f"/v2/{ENDPOINT_ID}/v1/models": "unknown_url",
            "/metrics": "unknown_url",
            "/": "unknown_url",
        }.items():
            refused = await http.get(http.base_url.copy_with(raw_path=path.encode()))
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, code), path
    app.finish()


async def test_a_page_may_call_if_it_is_allowed_to() -> None:
    """The preflight is answered without a key, which a browser does not send with it."""
    environ = {"CORS_ORIGINS": "https://app.example"}
    async with function(ScriptedApp({}), environ) as on, on.server().http() as http:
        headers = {"origin": "https://app.example", "access-control-request-method": "POST"}
        preflight = await http.options("chat/completions", headers={**headers, "authorization": ""})
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"


@pytest.mark.parametrize("door", ["rest", "http"])
async def test_an_answer_that_breaks_off_is_an_error(door: str) -> None:
    """A function sends it whole or not at all, so that there is still a status to say it with."""
    app = ScriptedApp({CHAT: Script((Say('{"id": "chatcmpl-1", '), Fail()))})
    async with function(app) as on, on.server(door).http() as http:
        broken = await http.post("chat/completions", json=ASK)
    assert (broken.status_code, broken.json()["error"]["code"]) == (500, "internal_error")
    assert broken.headers["x-request-id"]


async def test_an_answer_that_the_door_would_not_take_is_an_error() -> None:
    """A load balancer takes a megabyte: more would be its own error page."""
    app = ScriptedApp({CHAT: answer({"text": "x" * ALB_MAX_BYTES})})
    async with function(app) as on, on.server("alb").http() as http:
        refused = await http.post("chat/completions", json=ASK)
    assert (refused.status_code, refused.json()["error"]["code"]) == (500, "answer_too_large")
    assert refused.headers["x-request-id"]


async def test_a_body_that_is_too_large_is_refused() -> None:
    """By `MAX_BODY_BYTES`."""
    async with function(ScriptedApp({}), {"MAX_BODY_BYTES": "1KiB"}) as on, on.server().http() as http:
        refused = await http.post("chat/completions", json={**ASK, "user": "x" * 1024})
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")


async def test_a_stream_that_the_door_collects_ends_with_its_error() -> None:
    """What was said by then is kept: the status was 200."""
    app = ScriptedApp({CHAT: Script((Say(f"data: {recorded.ROLE}\n\n"), Fail()), 200, EVENT_STREAM)})
    async with function(app) as on, on.server("http").http() as http:
        reply = await http.post("chat/completions", json={**ASK, "stream": True})
    first, last = sse.split(reply.content)
    assert (reply.status_code, sse.data(first)["object"]) == (200, "chat.completion.chunk")
    assert sse.data(last)["error"]["code"] == "internal_error"


# --- time, leaving, ending ----------------------------------------------------------------------


STALL_S = 30.0
"""For how long a busy machine may keep the last word back that `ended_after_s` leaves time for."""


@pytest.mark.parametrize(("left_s", "after_s"), [(900.0, 899.0), (4.0, 3.0), (2.0, 1.5), (0.0, 0.0)])
def test_an_invocation_is_ended_while_lambda_still_listens(left_s: float, after_s: float) -> None:
    """A second before, or a quarter of what there is."""
    assert ended_after_s(left_s) == after_s


async def test_a_stream_ends_with_an_error_before_its_invocation_does() -> None:
    """One frame, no `[DONE]`; the engine stops."""
    app = ScriptedApp({CHAT: stream(recorded.ROLE, Pause("never"), recorded.LAST)})
    async with function(app, timeout_s=4.0, patience_s=STALL_S) as on, on.server().http() as http:
        reply = await http.post("chat/completions", json={**ASK, "stream": True})
        await app.seen[0].over.wait()
    first, last = sse.split(reply.content)
    assert sse.data(first)["object"] == "chat.completion.chunk"
    assert sse.data(last)["error"]["code"] == "deadline_exceeded"
    assert app.seen[0].ended == "disconnected"


@pytest.mark.parametrize("door", ["rest", "http"])
async def test_an_answer_that_has_not_begun_in_time_is_a_504(door: str) -> None:
    """In OpenAI's shape; the engine stops."""
    app = ScriptedApp({CHAT: Script((Pause("never"),))})
    async with function(app, timeout_s=4.0, patience_s=STALL_S) as on, on.server(door).http() as http:
        reply = await http.post("chat/completions", json=ASK)
        await app.seen[0].over.wait()
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert reply.headers["x-request-id"]
    assert app.seen[0].ended == "disconnected"


async def test_an_answer_that_nobody_reads_any_more_stops_the_engine() -> None:
    """Lambda closes the connection on which it comes; the next invocation is answered as ever."""
    app = ScriptedApp({CHAT: [stream(recorded.ROLE, Pause("never")), recorded.chat()]})
    async with function(app, cuts=True) as on, on.server().client() as client:
        streamed = await client.chat.completions.create(**ASK, stream=True)
        await anext(aiter(streamed))
        await streamed.close()
        await app.seen[0].over.wait()
        assert app.seen[0].ended == "disconnected"
        await on.api.polled(8)
        assert (await client.chat.completions.create(**ASK)).choices


async def test_a_client_that_leaves_is_not_told_by_lambda() -> None:
    """The answer goes on to its end: this is why `max_tokens` and the function's timeout matter."""
    app = ScriptedApp({CHAT: stream(recorded.ROLE, Pause("rest"), recorded.LAST)})
    async with function(app) as on, on.server().client() as client:
        streamed = await client.chat.completions.create(**ASK, stream=True)
        await anext(aiter(streamed))
        await streamed.close()
        app.gate("rest").opened.set()
        await app.seen[0].over.wait()
        assert app.seen[0].ended == "finished"


async def test_the_stop_lets_answers_end_and_takes_what_was_asked_for() -> None:
    """No invocation is asked for any more; one that an outstanding request brings is answered."""
    app = ScriptedApp({CHAT: [stream(recorded.ROLE, Pause("rest"), recorded.LAST), recorded.chat()]})
    async with function(app, {"DRAIN_TIMEOUT_S": "10"}, at_once=2) as on:
        streamed = await on.api.invoke(STREAM)
        await app.gate("rest").reached.wait()
        on.worker.stop()
        assert (await whole(on, DIRECT))["object"] == "chat.completion"
        app.gate("rest").opened.set()
        assert (await streamed.stream()).endswith(sse.DONE)
        await asyncio.wait({on.serving})
        assert on.api.polling == 0
    app.finish()


async def test_what_is_not_done_by_the_drains_deadline_is_told_so() -> None:
    """With an error frame, or a status where nothing was said."""
    app = ScriptedApp({CHAT: [stream(recorded.ROLE, Pause("a")), Script((Pause("b"),))]})
    async with function(app, {"DRAIN_TIMEOUT_S": "0"}) as on, on.server().http() as http:
        asking = []
        for streams, gate in ((True, "a"), (False, "b")):
            ask = http.post("chat/completions", json={**ASK, "stream": streams})
            asking.append(asyncio.create_task(ask))
            await app.gate(gate).reached.wait()
        on.worker.stop()
        streamed, plain = await asyncio.gather(*asking)
    assert sse.data(sse.split(streamed.content)[-1])["error"]["code"] == "worker_stopping"
    assert (plain.status_code, plain.json()["error"]["code"]) == (503, "worker_stopping")
    assert plain.headers["retry-after"] == "1"


async def test_a_worker_ends_when_there_is_no_runtime_api_any_more() -> None:
    """It asks again a few times before."""
    settings = Settings.from_environ({"PLATFORM": "aws_lambda", "API_KEY": KEY})
    api = RuntimeApi(2)
    async with function(ScriptedApp({})) as other:
        async with api.open():
            worker = AwsLambda(settings, api.environ(), None).worker(other.engine)  # type: ignore[arg-type] # a fake
            serving = asyncio.create_task(worker.serve(Notifier(None)))
            await api.polled(2)
        with pytest.raises(NoResources, match="asked 5 times"):
            await serving


# --- who invokes the function -------------------------------------------------------------------


async def test_a_direct_invoke_is_answered_with_the_object() -> None:
    """In every shape that a job has; no key is asked for: IAM was."""
    app = ScriptedApp({CHAT: recorded.chat()}, repeat=True)
    async with function(app) as on:
        for event in (DIRECT, {"input": DIRECT}, ASK, {"route": "/v1/chat/completions", "body": ASK}):
            assert (await whole(on, event))["object"] == "chat.completion"


async def test_a_direct_invoke_is_streamed_if_it_asks_for_a_stream() -> None:
    """As server-sent events, without status and headers before them."""
    app = ScriptedApp({CHAT: recorded.CHAT_STREAM})
    async with function(app) as on:
        invocation = await on.api.invoke(STREAM)
        frames = sse.split(await invocation.stream())
    assert frames[-1] == sse.DONE
    assert sse.data(frames[0])["object"] == "chat.completion.chunk"


async def test_an_answer_that_lambda_would_not_take_fails_the_invocation() -> None:
    """It takes 6 MB; nothing would come of more."""
    app = ScriptedApp({CHAT: answer({"text": "x" * LAMBDA_MAX_BYTES})})
    async with function(app) as on:
        told = await (await on.api.invoke(DIRECT)).error()
    assert (told["errorType"], told["error"]["status"]) == ("Worker.answer_too_large", 500)


async def test_the_fault_of_a_direct_invoke_is_its_answer() -> None:
    """OpenAI's object and its status: to try again would help nobody. Streamed or not."""
    app = ScriptedApp({CHAT: recorded.NO_MODEL}, repeat=True)
    async with function(app) as on:
        for event in (DIRECT, STREAM):
            told = (await whole(on, event))["error"]
            assert (told["code"], told["status"]) == ("model_not_found", 404)


async def test_the_workers_fault_fails_the_invocation() -> None:
    """So that whoever invokes it without waiting gets it tried again."""
    app = ScriptedApp({CHAT: Script((Fail(),))})
    async with function(app) as on:
        told = await (await on.api.invoke(DIRECT)).error()
    assert (told["errorType"], told["error"]["status"]) == ("Worker.internal_error", 500)
    assert told["errorMessage"] == "The engine failed while it answered this request."


async def test_a_stream_that_breaks_says_so_in_its_trailers() -> None:
    """After the frames that were made, the last of them the error."""
    app = ScriptedApp({CHAT: Script((Say(f"data: {recorded.ROLE}\n\n"), Fail()), 200, EVENT_STREAM)})
    async with function(app) as on:
        invocation = await on.api.invoke(STREAM)
        chunks: list[bytes] = []
        with pytest.raises(BrokenStream) as broken:
            await invocation.stream(chunks)
    assert sse.data(chunks[-1])["error"]["code"] == "internal_error"
    assert broken.value.told is not None
    assert broken.value.told["errorType"] == "Worker.internal_error"


@pytest.mark.parametrize(
    "event",
    [{"hello": "world"}, [], b"no JSON", {"httpMethod": "POST", "requestContext": {}}, {"input": {"x": 1}}],
    ids=["other", "list", "bytes", "half", "job"],
)
async def test_an_unknown_event_fails_and_is_told_what_is_known(event: Any) -> None:
    """Or what of a known one is wrong with it."""
    async with function(ScriptedApp({})) as on:
        told = await (await on.api.invoke(event)).error()
    assert told["errorType"] == "Worker.BadEvent"
    assert "REST API" in told["errorMessage"] or "APIGatewayProxyEventModel" in told["errorMessage"]


async def test_the_end_of_a_streamed_answer_is_nothing_to_do() -> None:
    """What an API that streams is said to send after one."""
    async with function(ScriptedApp({})) as on:
        assert await whole(on, {"invokeCompletionStatus": "Success", "requestId": "1"}) == {}


# --- messages -----------------------------------------------------------------------------------


async def test_messages_that_failed_are_named_and_no_others() -> None:
    """One that is nothing to do, one without a place for its answer, one that holds nothing known."""
    test_event = {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "batches"}
    async with function(ScriptedApp({})) as on:
        told = await whole(on, sqs(test_event, DIRECT, {"hello": 1}, "no JSON"))
    assert told == {"batchItemFailures": [{"itemIdentifier": f"m{number}"} for number in (1, 2, 3)]}


async def test_in_a_group_of_a_fifo_queue_what_follows_a_failure_fails() -> None:
    """Other groups go on."""
    nothing = {"Event": "s3:TestEvent"}
    async with function(ScriptedApp({})) as on:
        told = await whole(on, sqs(nothing, "bad", nothing, nothing, fifo=True, groups="abab"))
    assert told == {"batchItemFailures": [{"itemIdentifier": "m1"}, {"itemIdentifier": "m3"}]}


async def test_objects_in_s3_are_handed_to_who_runs_batches() -> None:
    """With their names unquoted, from S3's own message, through SNS, or from EventBridge."""
    seen: list[Any] = []

    async def run(task: Any, shift: Shift) -> None:
        seen.append(task)
        assert not shift.stopping.is_set()
        assert 100 < shift.deadline_s - asyncio.get_running_loop().time() < 900

    record = {
        "eventSource": "aws:s3",
        "eventName": "ObjectCreated:Put",
        "s3": {"bucket": {"name": "batches"}, "object": {"key": "in/a+b%2Bc.jsonl", "eTag": "tag"}},
    }
    topic = {
        "Type": "Notification",
        "TopicArn": "arn:aws:sns:1",
        "Message": json.dumps({"Records": [record]}),
    }
    eventbridge = {
        "id": "1",
        "version": "0",
        "detail-type": "Object Created",
        "source": "aws.s3",
        "account": "1",
        "time": "2026-11-25T00:00:00Z",
        "region": "eu-central-1",
        "resources": [],
        "detail": {"bucket": {"name": "batches"}, "object": {"key": "in/a b+c.jsonl", "version-id": "v1"}},
    }
    async with function(ScriptedApp({}), s3_batch=run) as on:
        assert await whole(on, sqs({"Records": [record]}, topic, eventbridge)) == {"batchItemFailures": []}
        assert await whole(on, eventbridge) == {}
        assert await whole(on, {"Records": [record]}) == {}
    by_tag = Created("batches", "in/a b+c.jsonl", "tag")
    by_version = Created("batches", "in/a b+c.jsonl", "v1")
    assert seen == [by_tag, by_tag, by_version, by_version, by_tag]


async def test_an_event_without_partial_failures_fails_as_a_whole() -> None:
    """Lambda tries one of EventBridge again, and gives it to the function's dead-letter queue."""
    async with function(ScriptedApp({})) as on:
        told = await (await on.api.invoke({"Records": [{"eventSource": "aws:s3"}]})).error()
    assert told["errorType"] == "Worker.MessageFailed"


# --- the start ----------------------------------------------------------------------------------


async def test_why_a_worker_does_not_start_is_told_to_lambda() -> None:
    """At `/init/error`, with the kind of failure as its type."""
    api = RuntimeApi()
    async with api.open():
        settings = Settings.from_environ({"PLATFORM": "aws_lambda", "API_KEY": KEY})
        platform = AwsLambda(settings, api.environ(), None)
        await asyncio.to_thread(platform.refuse, ModelNotFound("there is no such folder"))
        await asyncio.to_thread(platform.refuse, None)
    assert api.init_errors == [
        {"errorMessage": "there is no such folder", "errorType": "Worker.ModelNotFound", "stackTrace": []}
    ]


async def test_nothing_of_awss_is_imported_before_the_engine_is_there() -> None:
    """It would take the time of the engine's own imports."""
    names = "boto3", "botocore", "aws_lambda_powertools", "pydantic"
    ours = "handler.platforms.aws_lambda, handler.platforms.sqs"
    program = f"import sys, {ours}; print(*{{*{names}}} & sys.modules.keys())"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert (await process.communicate())[0].decode().strip() == ""


async def test_a_worker_is_an_extension_so_that_it_gets_a_sigterm() -> None:
    """It wants to hear of nothing."""
    async with function(ScriptedApp({})) as on:
        assert on.api.extensions == ["firsttoken"]
        assert on.api.user_agents == {"firsttoken"}


@pytest.mark.parametrize(
    ("allowed", "wanted", "asked"), [("4", "", 4), ("4", "2", 2), ("2", "4", 2), ("", "3", 3), ("", "", 1)]
)
async def test_as_many_invocations_are_asked_for_as_there_may_be(
    allowed: str, wanted: str, asked: int
) -> None:
    """What Lambda says, or fewer; one where it says nothing."""
    environ = {"AWS_LAMBDA_MAX_CONCURRENCY": allowed, "MAX_CONCURRENCY": wanted}
    async with function(ScriptedApp({}), environ, at_once=asked) as on:
        await on.api.polled(asked)
        assert on.api.most_at_once == asked
