"""A Lambda function with the services around it: real boto3, and moto's server in AWS's place."""

from __future__ import annotations

import asyncio
import json
import uuid
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import pytest

from handler.errors import BadSettings, NoResources, UpstreamFailed
from handler.platforms import secret_keys
from tests.contract import recorded
from tests.integration.test_lambda_platform import ASK, CHAT, DIRECT, sqs, whole
from tests.lambda_function import function
from tests.object_store import ObjectStore
from tests.scripted_app import Fail, Script, ScriptedApp
from tests.servers import MODEL


@pytest.fixture
def aws(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """AWS, as boto3 finds it by the environment."""
    for name, value in object_store.environ.items():
        monkeypatch.setenv(name, value)
    return object_store


def name() -> str:
    """A name that no other test has."""
    return f"test-{uuid.uuid4()}"


def keys(**names: str) -> str:
    """The text of a secret with a key for each name."""
    entries = [{"name": name, "sha256": sha256(key.encode()).hexdigest()} for name, key in names.items()]
    return json.dumps({"keys": entries})


def make_table(aws: ObjectStore) -> str:
    """A table for usage."""
    table = name()
    aws.client("dynamodb").create_table(
        TableName=table,
        KeySchema=[{"AttributeName": "pk", "KeyType": "HASH"}, {"AttributeName": "sk", "KeyType": "RANGE"}],
        AttributeDefinitions=[{"AttributeName": n, "AttributeType": "S"} for n in ("pk", "sk")],
        BillingMode="PAY_PER_REQUEST",
    )
    return table


def used(aws: ObjectStore, table: str) -> dict[str, tuple[int, int, int]]:
    """What the table says of each key: prompt and completion tokens, requests."""
    return {
        item["pk"]["S"]: (
            int(item["prompt_tokens"]["N"]),
            int(item["completion_tokens"]["N"]),
            int(item["requests"]["N"]),
        )
        for item in aws.client("dynamodb").scan(TableName=table)["Items"]
    }


# --- keys ---------------------------------------------------------------------------------------


async def test_keys_of_a_secret_change_without_a_restart(
    aws: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that was added opens at once, one that was taken away no longer does."""
    monkeypatch.setattr(secret_keys, "UNKNOWN_S", 0.0)
    manager = aws.client("secretsmanager")
    arn = manager.create_secret(Name=name(), SecretString=keys(app="ft-old"))["ARN"]
    app = ScriptedApp({CHAT: recorded.chat()}, repeat=True)
    environ = {"API_KEYS_SECRET": arn, "API_KEY": ""}
    async with function(app, environ) as on:
        for key, rotates, status in (
            ("ft-old", False, 200),
            ("ft-new", False, 401),
            ("ft-new", True, 200),
            ("ft-old", False, 401),
        ):
            if rotates:
                manager.put_secret_value(SecretId=arn, SecretString=keys(app="ft-new"))
            async with on.server(key=key).http() as http:
                assert (await http.post("chat/completions", json=ASK)).status_code == status, key


async def test_a_secret_that_is_not_there_keeps_the_worker_from_starting(aws: ObjectStore) -> None:
    """It would let nobody in; what AWS says is told."""
    with pytest.raises(NoResources, match=r"API_KEYS_SECRET can't be read: .*ResourceNotFoundException"):
        async with function(ScriptedApp({}), {"API_KEYS_SECRET": name(), "API_KEY": ""}):
            pass


async def test_a_secret_that_holds_no_keys_keeps_the_worker_from_starting(aws: ObjectStore) -> None:
    """And it is not shown."""
    secret = name()
    aws.client("secretsmanager").create_secret(Name=secret, SecretString="ft-plain")
    with pytest.raises(BadSettings, match="the secret of API_KEYS_SECRET is no JSON object") as refused:
        async with function(ScriptedApp({}), {"API_KEYS_SECRET": secret, "API_KEY": ""}):
            pass
    assert "ft-plain" not in str(refused.value)


# --- usage --------------------------------------------------------------------------------------


async def test_what_each_key_uses_is_added_up(aws: ObjectStore) -> None:
    """Whole answers and streams, which do not show it; a direct invoke has a name of its own."""
    table, secret = make_table(aws), name()
    aws.client("secretsmanager").create_secret(Name=secret, SecretString=keys(a="ft-a", b="ft-b"))
    app = ScriptedApp({CHAT: [recorded.chat(), *[recorded.CHAT_STREAM_WITH_USAGE] * 2, recorded.chat()]})
    environ = {"API_KEYS_SECRET": secret, "API_KEY": "", "USAGE_TABLE": table}
    async with function(app, environ) as on:
        async with on.server(key="ft-a").client() as client:
            await client.chat.completions.create(**ASK)
        async with on.server(key="ft-b").client() as client:
            for _ in range(2):
                chunks = [chunk async for chunk in await client.chat.completions.create(**ASK, stream=True)]
                assert [chunk.usage for chunk in chunks] == [None] * (1 + len(recorded.WORDS))
        await whole(on, DIRECT)
        on.worker.stop()
        await on.serving
    app.finish()
    assert used(aws, table) == {
        "usage#a": (24, 6, 1),
        "usage#b": (48, 12, 2),
        "usage#aws:invoke": (24, 6, 1),
    }
    (item,) = aws.client("dynamodb").query(
        TableName=table,
        KeyConditionExpression="pk = :pk AND begins_with(sk, :day)",
        ExpressionAttributeValues={
            ":pk": {"S": "usage#a"},
            ":day": {"S": datetime.now(UTC).date().isoformat()[:8]},
        },
    )["Items"]
    assert (item["key"]["S"], item["model"]["S"], item["sk"]["S"]) == (
        "a",
        MODEL,
        f"{item['day']['S']}#{MODEL}",
    )


async def test_usage_is_written_before_an_environment_that_freezes_has_answered(aws: ObjectStore) -> None:
    """On anything but Managed Instances nothing runs between invocations."""
    table = make_table(aws)
    app = ScriptedApp({CHAT: recorded.chat()}, repeat=True)
    environ = {"AWS_LAMBDA_MAX_CONCURRENCY": "", "USAGE_TABLE": table}
    async with function(app, environ, at_once=1) as on:
        for requests in (1, 2):
            await whole(on, DIRECT)
            assert used(aws, table)["usage#aws:invoke"] == (24 * requests, 6 * requests, requests)


async def test_usage_that_can_not_be_written_is_written_later(
    aws: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are answered meanwhile, and everything counts once, by DynamoDB's word on tokens.

    moto does not know them: what it has seen is kept from it.
    """
    from handler.platforms import usage_table  # noqa: PLC0415 - it is changed here

    monkeypatch.setattr(usage_table, "RETRY_S", 0.01)
    failures = 2
    seen: set[str] = set()
    real = usage_table.UsageTable._put

    def put(self: Any, items: Any, token: str) -> None:
        nonlocal failures
        if token not in seen:
            real(self, items, token)
        seen.add(token)
        if failures:  # it was written, and the answer was lost
            failures -= 1
            raise UpstreamFailed("no answer")

    monkeypatch.setattr(usage_table.UsageTable, "_put", put)
    table = make_table(aws)
    app = ScriptedApp({CHAT: recorded.chat()}, repeat=True)
    async with function(app, {"USAGE_TABLE": table}) as on:
        for _ in range(3):
            await whole(on, DIRECT)
        on.worker.stop()
        await on.serving
    assert failures == 0
    assert used(aws, table) == {"usage#aws:invoke": (72, 18, 3)}


# --- answers to messages ------------------------------------------------------------------------


async def test_the_answer_to_a_message_goes_where_it_may(aws: ObjectStore) -> None:
    """To a queue or to an object that REPLY_TO allows: a line as in OpenAI's batches."""
    bucket = name()
    aws.client("s3").create_bucket(Bucket=bucket)
    queue = aws.client("sqs").create_queue(QueueName=name())["QueueUrl"]
    app = ScriptedApp({CHAT: [recorded.chat(), recorded.chat(), recorded.NO_MODEL]})
    environ = {"REPLY_TO": f"{queue},s3://{bucket}/answers"}
    async with function(app, environ, at_once=1) as on:
        told = await whole(
            on,
            sqs(
                {**DIRECT, "reply_to": f"s3://{bucket}/answers/1.json", "custom_id": "mine"},
                {**DIRECT, "reply_to": f"s3://{bucket}/answers/"},
                {**DIRECT, "reply_to": queue},
                {**DIRECT, "reply_to": f"s3://{bucket}/answers-of-others/1.json"},
                {**DIRECT, "reply_to": queue + "2"},
            ),
        )
    app.finish()
    assert told == {"batchItemFailures": [{"itemIdentifier": "m3"}, {"itemIdentifier": "m4"}]}
    listed = aws.client("s3").list_objects_v2(Bucket=bucket)["Contents"]
    assert [found["Key"] for found in listed] == ["answers/1.json", "answers/m1.json"]
    line = json.loads(aws.client("s3").get_object(Bucket=bucket, Key="answers/1.json")["Body"].read())
    assert (line["id"], line["custom_id"], line["error"]) == ("m0", "mine", None)
    assert (line["response"]["status_code"], line["response"]["request_id"]) == (200, "m0")
    assert line["response"]["body"]["object"] == "chat.completion"
    (message,) = aws.client("sqs").receive_message(QueueUrl=queue)["Messages"]
    line = json.loads(message["Body"])
    assert (line["id"], line["response"]["status_code"]) == ("m2", 404)
    assert line["response"]["body"]["error"]["code"] == "model_not_found"


async def test_a_message_that_the_worker_could_not_answer_comes_again(aws: ObjectStore) -> None:
    """A fault of its own is answered, one of the worker is not. A stream is a fault of its own."""
    bucket = name()
    aws.client("s3").create_bucket(Bucket=bucket)
    app = ScriptedApp({CHAT: Script((Fail(),))})
    streamed = {**DIRECT, "openai_input": {**ASK, "stream": True}, "reply_to": f"s3://{bucket}/2.json"}
    async with function(app, {"REPLY_TO": f"s3://{bucket}"}) as on:
        told = await whole(on, sqs({**DIRECT, "reply_to": f"s3://{bucket}/1.json"}, streamed))
    app.finish()
    assert told == {"batchItemFailures": [{"itemIdentifier": "m0"}]}
    (found,) = aws.client("s3").list_objects_v2(Bucket=bucket)["Contents"]
    line = json.loads(aws.client("s3").get_object(Bucket=bucket, Key=found["Key"])["Body"].read())
    assert (found["Key"], line["response"]["status_code"]) == ("2.json", 400)
    assert line["response"]["body"]["error"]["param"] == "stream"


async def test_an_answer_to_a_fifo_queue_is_sent_once(aws: ObjectStore) -> None:
    """Whose message comes twice; the queue drops the second."""
    fifo = {"FifoQueue": "true"}
    queue = aws.client("sqs").create_queue(QueueName=name() + ".fifo", Attributes=fifo)["QueueUrl"]
    app = ScriptedApp({CHAT: recorded.chat()}, repeat=True)
    event = sqs({**DIRECT, "reply_to": queue}, fifo=True, groups="a")
    async with function(app, {"REPLY_TO": queue}) as on:
        for _ in range(2):
            assert await whole(on, event) == {"batchItemFailures": []}
    received = aws.client("sqs").receive_message(
        QueueUrl=queue, MaxNumberOfMessages=10, AttributeNames=["MessageGroupId"]
    )["Messages"]
    assert [message["Attributes"]["MessageGroupId"] for message in received] == ["a"]


async def test_an_answer_that_a_queue_would_not_take_is_an_error(
    aws: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says how large it is; the message is not done again for it."""
    from handler.platforms import lambda_replies  # noqa: PLC0415 - it is changed here

    monkeypatch.setattr(lambda_replies, "SQS_MAX_BYTES", 300)
    queue = aws.client("sqs").create_queue(QueueName=name())["QueueUrl"]
    async with function(ScriptedApp({CHAT: recorded.chat()}), {"REPLY_TO": queue}) as on:
        assert await whole(on, sqs({**DIRECT, "reply_to": queue})) == {"batchItemFailures": []}
    (message,) = aws.client("sqs").receive_message(QueueUrl=queue)["Messages"]
    line = json.loads(message["Body"])
    assert (line["response"], line["error"]["code"]) == (None, "answer_too_large")


async def test_a_place_that_is_not_there_has_the_message_come_again(aws: ObjectStore) -> None:
    """Nothing is forgotten before its answer is written."""
    app = ScriptedApp({CHAT: recorded.chat()})
    async with function(app, {"REPLY_TO": "s3://no-such-bucket-here"}) as on:
        event = sqs({**DIRECT, "reply_to": "s3://no-such-bucket-here/a"})
        assert await whole(on, event) == {"batchItemFailures": [{"itemIdentifier": "m0"}]}
        await asyncio.sleep(0)
