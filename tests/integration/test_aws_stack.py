"""What template.yaml makes, and what the worker's role may do with it, on a server that checks policies."""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from handler.platforms import secret_keys
from tests.aws_stack import Aws, AwsStack, make
from tests.contract import recorded
from tests.integration.test_lambda_platform import ASK, CHAT
from tests.lambda_doors import ENDPOINT_ID
from tests.lambda_function import function
from tests.scripted_app import ScriptedApp

ROOT = Path(__file__).parents[2]
SERVICES = ("dynamodb", "s3", "secretsmanager", "sqs")
"""What the worker asks of AWS."""

IN, OUT = "in/a.jsonl", "out/a/batch.json"
KEY = {"pk": {"S": "batch#a"}, "sk": {"S": "1"}}


@pytest.fixture(scope="module")
def stack(guarded_aws: Aws) -> AwsStack:
    """With a model, an input and a result; for tests that leave them as they are."""
    stack = make(guarded_aws)
    s3 = stack.client("s3")
    s3.put_object(Bucket=stack.ids["ModelBucket"], Key="tiny/config.json", Body=b"{}")
    s3.put_object(Bucket=stack.ids["BatchBucket"], Key=OUT, Body=b"{}")
    s3.put_object(Bucket=stack.ids["BatchBucket"], Key=IN, Body=b"{}\n")
    return stack


# --- what the worker may do ---------------------------------------------------------------------


def update(table: str) -> dict[str, Any]:
    """What adds one to an item of `table`."""
    return {
        "TableName": table,
        "Key": KEY,
        "UpdateExpression": "ADD n :one",
        "ExpressionAttributeValues": {":one": {"N": "1"}},
    }


def received(stack: AwsStack) -> str:
    """The handle of a message that the worker was given."""
    queue = stack.ids["BatchQueue"]
    stack.client("sqs").send_message(QueueUrl=queue, MessageBody="{}")
    (message, *_) = stack.worker_client("sqs").receive_message(QueueUrl=queue)["Messages"]
    return str(message["ReceiptHandle"])


def upload(stack: AwsStack) -> None:
    """A long file in pieces, and another that is given up."""
    s3, at = stack.worker_client("s3"), {"Bucket": stack.ids["BatchBucket"], "Key": "out/a/output.jsonl"}
    begun = {"UploadId": s3.create_multipart_upload(**at)["UploadId"]}
    etag = s3.upload_part(**at, **begun, PartNumber=1, Body=b"{}\n")["ETag"]
    parts = {"Parts": [{"PartNumber": 1, "ETag": etag}]}
    s3.complete_multipart_upload(**at, **begun, MultipartUpload=parts, IfNoneMatch="*")
    s3.abort_multipart_upload(**at, UploadId=s3.create_multipart_upload(**at)["UploadId"])


UPLOADS = ("create_multipart_upload", "upload_part", "complete_multipart_upload", "abort_multipart_upload")

Work = Callable[[AwsStack], object]

ALLOWED: dict[str, list[Work]] = {
    "secretsmanager.get_secret_value": [
        lambda stack: stack.worker_client("secretsmanager").get_secret_value(
            SecretId=stack.environ["API_KEYS_SECRET"]
        )
    ],
    "dynamodb.update_item": [
        lambda stack: stack.worker_client("dynamodb").update_item(**update(stack.environ["BATCH_TABLE"]))
    ],
    "dynamodb.get_item": [
        lambda stack: stack.worker_client("dynamodb").get_item(
            TableName=stack.environ["BATCH_TABLE"], Key=KEY, ConsistentRead=True
        )
    ],
    "dynamodb.transact_write_items": [
        lambda stack: stack.worker_client("dynamodb").transact_write_items(
            TransactItems=[{"Update": update(stack.environ["USAGE_TABLE"])}]
        )
    ],
    "sqs.send_message": [
        lambda stack: stack.worker_client("sqs").send_message(
            QueueUrl=stack.environ["SQS_QUEUE_URL"], MessageBody="{}"
        )
    ],
    "sqs.receive_message": [received],
    "sqs.delete_message": [
        lambda stack: stack.worker_client("sqs").delete_message(
            QueueUrl=stack.ids["BatchQueue"], ReceiptHandle=received(stack)
        )
    ],
    "sqs.change_message_visibility": [
        lambda stack: stack.worker_client("sqs").change_message_visibility(
            QueueUrl=stack.ids["BatchQueue"], ReceiptHandle=received(stack), VisibilityTimeout=1
        )
    ],
    "sqs.get_queue_attributes": [
        lambda stack: stack.worker_client("sqs").get_queue_attributes(
            QueueUrl=stack.ids["BatchQueue"], AttributeNames=["All"]
        )
    ],
    "s3.list_objects_v2": [
        lambda stack: stack.worker_client("s3").list_objects_v2(
            Bucket=stack.ids["ModelBucket"], Prefix="tiny/", Delimiter="/"
        ),
        lambda stack: stack.worker_client("s3").list_objects_v2(
            Bucket=stack.ids["BatchBucket"], Prefix="out/a/parts/"
        ),
    ],
    "s3.get_object": [
        lambda stack: stack.worker_client("s3").get_object(
            Bucket=stack.ids["ModelBucket"], Key="tiny/config.json"
        ),
        lambda stack: stack.worker_client("s3").get_object(
            Bucket=stack.ids["BatchBucket"], Key=IN, VersionId=version(stack), Range="bytes=0-1"
        ),
        lambda stack: stack.worker_client("s3").get_object(Bucket=stack.ids["BatchBucket"], Key=OUT),
    ],
    "s3.head_object": [
        lambda stack: stack.worker_client("s3").head_object(Bucket=stack.ids["BatchBucket"], Key=IN),
        lambda stack: stack.worker_client("s3").head_object(Bucket=stack.ids["BatchBucket"], Key=OUT),
    ],
    "s3.put_object": [
        lambda stack: stack.worker_client("s3").put_object(
            Bucket=stack.ids["BatchBucket"], Key="out/a/parts/1/0.jsonl", Body=b"{}", IfNoneMatch="*"
        ),
        lambda stack: stack.worker_client("s3").put_object(
            Bucket=stack.ids["BatchBucket"], Key="replies/m1.json", Body=b"{}"
        ),
    ],
    **{f"s3.{operation}": [upload] for operation in UPLOADS},
}
"""Every operation that the worker's code asks for, as it does."""


def version(stack: AwsStack) -> str:
    """The version of the input."""
    found: str = stack.worker_client("s3").head_object(Bucket=stack.ids["BatchBucket"], Key=IN)["VersionId"]
    return found


def test_the_worker_may_do_what_its_code_does(stack: AwsStack) -> None:
    """With the role's own credentials."""
    for work in dict.fromkeys(work for works in ALLOWED.values() for work in works):
        work(stack)


def asked() -> Iterator[str]:
    """The operations of AWS's services that the worker's code names."""
    import boto3  # noqa: PLC0415 - most tests of a run need none

    known = {
        operation: f"{service}.{operation}"
        for service in SERVICES
        for operation in boto3.client(service, region_name="us-east-1").meta.method_to_api_mapping
    }
    for path in sorted((ROOT / "handler").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in known:
                yield known[node.value]
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("client"):
                yield from filter(None, [known.get(node.attr)])


def test_no_operation_of_the_code_is_missing_above() -> None:
    """Whoever adds one adds it there, and learns whether the role may do it."""
    found = set(asked())
    assert {"s3.list_objects_v2", "dynamodb.transact_write_items", "secretsmanager.get_secret_value"} <= found
    assert found - ALLOWED.keys() == set()


REFUSED: dict[str, Work] = {
    "change an input": lambda stack: stack.worker_client("s3").put_object(
        Bucket=stack.ids["BatchBucket"], Key=IN, Body=b""
    ),
    "delete a result": lambda stack: stack.worker_client("s3").delete_object(
        Bucket=stack.ids["BatchBucket"], Key=OUT
    ),
    "read replies": lambda stack: stack.worker_client("s3").get_object(
        Bucket=stack.ids["BatchBucket"], Key="replies/m1.json"
    ),
    "change a model": lambda stack: stack.worker_client("s3").put_object(
        Bucket=stack.ids["ModelBucket"], Key="tiny/config.json", Body=b""
    ),
    "list all buckets": lambda stack: stack.worker_client("s3").list_buckets(),
    "read of another bucket": lambda stack: stack.worker_client("s3").get_object(Bucket="others", Key="a"),
    "change a bucket": lambda stack: stack.worker_client("s3").put_bucket_versioning(
        Bucket=stack.ids["BatchBucket"], VersioningConfiguration={"Status": "Suspended"}
    ),
    "send to the dead letters": lambda stack: stack.worker_client("sqs").send_message(
        QueueUrl=stack.ids["BatchDlq"], MessageBody="{}"
    ),
    "empty the queue": lambda stack: stack.worker_client("sqs").purge_queue(QueueUrl=stack.ids["BatchQueue"]),
    "read all of the table": lambda stack: stack.worker_client("dynamodb").scan(
        TableName=stack.ids["StateTable"]
    ),
    "put an item": lambda stack: stack.worker_client("dynamodb").put_item(
        TableName=stack.ids["StateTable"], Item=KEY
    ),
    "put an item in a transaction": lambda stack: stack.worker_client("dynamodb").transact_write_items(
        TransactItems=[{"Put": {"TableName": stack.ids["StateTable"], "Item": KEY}}]
    ),
    "change another table": lambda stack: stack.worker_client("dynamodb").update_item(**update("others")),
    "change the keys": lambda stack: stack.worker_client("secretsmanager").put_secret_value(
        SecretId=stack.ids["ApiKeys"], SecretString="{}"
    ),
    "read another secret": lambda stack: stack.worker_client("secretsmanager").get_secret_value(
        SecretId=other_secret(stack)
    ),
    "see who is there": lambda stack: stack.worker_client("iam").list_users(),
}


def other_secret(stack: AwsStack) -> str:
    """The name of a secret that is not the stack's."""
    name = f"{stack.ids['StateTable']}-other"
    stack.client("secretsmanager").create_secret(Name=name, SecretString="{}")
    return name


@pytest.mark.parametrize("what", REFUSED)
def test_the_worker_may_do_nothing_else(stack: AwsStack, what: str) -> None:
    """What the policy does not allow is refused, as AWS refuses it."""
    from botocore.exceptions import ClientError  # noqa: PLC0415 - as above

    with pytest.raises(ClientError) as refused:
        REFUSED[what](stack)
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    assert "Denied" in str(refused.value) or "not authorized to perform" in str(refused.value)


# --- what is there ------------------------------------------------------------------------------


def messages(stack: AwsStack, queue: str = "BatchQueue") -> list[Any]:
    """What can be taken from a queue now, less S3's own test."""
    sqs, found, asked = stack.client("sqs"), list[Any](), {"QueueUrl": stack.ids[queue], "WaitTimeSeconds": 0}
    while got := sqs.receive_message(**asked, MaxNumberOfMessages=10).get("Messages"):
        found += got
    return [message for message in found if "s3:TestEvent" not in message["Body"]]


def test_only_what_is_put_in_brings_a_message(aws_stack: AwsStack) -> None:
    """What the worker writes, and a file of another kind, does not."""
    s3 = aws_stack.client("s3")
    for key in ("in/a+b.jsonl", "in/notes.txt", "out/a/output.jsonl", "replies/a.jsonl", "other.jsonl"):
        s3.upload_fileobj(io.BytesIO(b"{}\n"), aws_stack.ids["BatchBucket"], key)
    told = [record for body in messages(aws_stack) for record in json.loads(body["Body"])["Records"]]
    assert [(record["s3"]["bucket"]["name"], record["s3"]["object"]["key"]) for record in told] == [
        (aws_stack.ids["BatchBucket"], "in%2Fa%2Bb.jsonl")
    ]


def test_a_message_that_fails_five_times_is_kept_apart(aws_stack: AwsStack) -> None:
    """Where the alarm looks."""
    sqs, queue = aws_stack.client("sqs"), aws_stack.ids["BatchQueue"]
    sqs.send_message(QueueUrl=queue, MessageBody="bad")
    for _ in range(5):
        (message,) = messages(aws_stack)
        sqs.change_message_visibility(
            QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"], VisibilityTimeout=0
        )
    assert messages(aws_stack) == []
    assert [message["Body"] for message in messages(aws_stack, "BatchDlq")] == ["bad"]


def test_the_table_forgets_what_has_expired(aws_stack: AwsStack) -> None:
    """Leases say when."""
    told = aws_stack.client("dynamodb").describe_time_to_live(TableName=aws_stack.ids["StateTable"])
    assert told["TimeToLiveDescription"] == {"TimeToLiveStatus": "ENABLED", "AttributeName": "ttl"}


async def test_the_function_works_with_what_the_stack_gives_it(
    guarded_aws: Aws, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has a key at first; one that is put into the secret opens, and what it uses is in the table."""
    stack = make(guarded_aws, EndpointId=ENDPOINT_ID)
    for name, value in stack.environ.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(secret_keys, "UNKNOWN_S", 0.0)
    app = ScriptedApp({CHAT: recorded.chat()})
    async with function(app, {**stack.environ, "API_KEY": ""}) as on:
        async with on.server(key="ft-mine").http() as http:
            assert (await http.post("chat/completions", json=ASK)).status_code == 401
            entry = {"name": "mine", "sha256": sha256(b"ft-mine").hexdigest()}
            stack.client("secretsmanager").put_secret_value(
                SecretId=stack.ids["ApiKeys"], SecretString=json.dumps({"keys": [entry]})
            )
            assert (await http.post("chat/completions", json=ASK)).status_code == 200
        on.worker.stop()
        await on.serving
    app.finish()
    (item,) = stack.client("dynamodb").scan(TableName=stack.ids["StateTable"])["Items"]
    assert (item["pk"], item["completion_tokens"]) == ({"S": "usage#mine"}, {"N": "6"})
