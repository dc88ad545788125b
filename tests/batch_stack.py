"""What batches need around a worker: bucket, queue and table in moto's server; lines, and their results."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import openai.types

from handler.batch_window import Pace
from handler.engine import Engine
from handler.platforms.batch_shift import Times
from handler.platforms.s3_batch import S3Batches
from handler.platforms.sqs import Consumer, Sqs
from handler.platforms.sqs_queue import Times as QueueTimes
from handler.settings import Settings
from handler.supervision import Notifier
from tests.aws_stack import AwsStack
from tests.object_store import ObjectStore
from tests.scripted_app import ScriptedApp, echo
from tests.scripted_server import ScriptedEngine
from tests.servers import MODEL
from tests.until import until

URL = "/v1/chat/completions"
CHAT = f"POST {URL}"
OVER = {"completed", "failed", "expired", "cancelled"}

QUICK = Times(lease_s=6.0, handover_s=1.0, save_s=0.0, pause_s=0.01)
SMALL_PARTS = partial(Pace, part_lines=50)
QUICK_QUEUE = QueueTimes(wait_s=1, hidden_s=6, again_s=0, shift_s=60.0)
"""What a worker holds is another's only after seconds: a machine may stall for some."""


@dataclass(frozen=True, slots=True)
class Resources:
    """The names of what a stack has, and where."""

    store: ObjectStore | AwsStack
    bucket: str
    queue_url: str
    dead_url: str
    table: str
    input_prefix: str = "in/"
    output_prefix: str = "out/"

    @property
    def environ(self) -> dict[str, str]:
        """The settings that name them."""
        return {
            "SQS_QUEUE_URL": self.queue_url,
            "BATCH_INPUT": f"s3://{self.bucket}/{self.input_prefix}",
            "BATCH_OUTPUT": f"s3://{self.bucket}/{self.output_prefix}",
            "BATCH_TABLE": self.table,
        }

    @property
    def s3(self) -> Any:
        """A client of the bucket."""
        return self.store.client("s3")

    @property
    def sqs(self) -> Any:
        """A client of the queues."""
        return self.store.client("sqs")

    # --- a batch -------------------------------------------------------------------------------

    def key(self, batch: str) -> str:
        """Where the file of `batch` is put."""
        return f"{self.input_prefix}{batch}.jsonl"

    def put(self, batch: str, lines: Iterable[bytes], **options: Any) -> str:
        """Put a file; its event is in the queue at once. Returns its version, or its ETag."""
        body = b"".join(lines)
        said = self.s3.put_object(Bucket=self.bucket, Key=self.key(batch), Body=body, **options)
        return str(said.get("VersionId", said["ETag"].strip('"')))

    def send(self, message: Mapping[str, Any]) -> None:
        """Put a message into the queue."""
        self.sqs.send_message(QueueUrl=self.queue_url, MessageBody=json.dumps(message))

    def created(self, batch: str, version: str = "") -> dict[str, Any]:
        """The event that the file of `batch` is there, as S3 writes it."""
        found = {"key": self.key(batch), "versionId": version or None}
        record = {"eventSource": "aws:s3", "eventName": "ObjectCreated:Put"}
        return {"Records": [{**record, "s3": {"bucket": {"name": self.bucket}, "object": found}}]}

    def names(self, batch: str) -> list[str]:
        """The objects in the batch's folder, without its name."""
        folder = f"{self.output_prefix}{batch}/"
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder)
        return [found["Key"].removeprefix(folder) for page in pages for found in page.get("Contents", ())]

    def get(self, batch: str, name: str) -> bytes:
        """One file of the batch's folder."""
        found = self.s3.get_object(Bucket=self.bucket, Key=f"{self.output_prefix}{batch}/{name}")
        body: bytes = found["Body"].read()
        return body

    def lines(self, batch: str, name: str) -> list[dict[str, Any]]:
        """The lines of output.jsonl or error.jsonl."""
        return [json.loads(line) for line in self.get(batch, name).splitlines()]

    def record(self, batch: str) -> openai.types.Batch | None:
        """What batch.json says, by the official client's model of it; None if it is not there."""
        try:
            raw = self.get(batch, "batch.json")
        except self.s3.exceptions.NoSuchKey:
            return None
        return openai.types.Batch.model_validate_json(raw, strict=True)

    def is_over(self, batch: str) -> bool:
        """Whether batch.json says so."""
        found = self.record(batch)
        return found is not None and found.status in OVER

    async def over(self, batch: str) -> openai.types.Batch:
        """What batch.json says, once it says that the batch is over."""
        await asyncio.to_thread(until, lambda: self.is_over(batch))
        found = self.record(batch)
        assert found is not None
        return found

    async def quiet(self) -> None:
        """Return once the queue has no message."""
        await asyncio.to_thread(until, lambda: self.waiting() == (0, 0, 0))

    def waiting(self) -> tuple[int, int, int]:
        """How many messages the queue shows, hides, and keeps back."""
        names = ["", "NotVisible", "Delayed"]
        said = self.sqs.get_queue_attributes(QueueUrl=self.queue_url, AttributeNames=["All"])["Attributes"]
        visible, hidden, delayed = (int(said[f"ApproximateNumberOfMessages{name}"]) for name in names)
        return visible, hidden, delayed

    def dead(self) -> list[dict[str, Any]]:
        """The messages that were given up."""
        said = self.sqs.receive_message(QueueUrl=self.dead_url, MaxNumberOfMessages=10)
        return [json.loads(message["Body"]) for message in said.get("Messages", ())]


def make(store: ObjectStore, *, versioned: bool = True, dead_after: int = 5) -> Resources:
    """A bucket whose new files under `in/` are told to a queue, with a dead-letter queue, and a table."""
    name = f"batch-{uuid.uuid4()}"
    s3, sqs, dynamodb = (store.client(service) for service in ("s3", "sqs", "dynamodb"))
    dead_url = sqs.create_queue(QueueName=f"{name}-dead")["QueueUrl"]
    redrive = {"deadLetterTargetArn": _arn(sqs, dead_url), "maxReceiveCount": dead_after}
    attributes = {"VisibilityTimeout": "5400", "RedrivePolicy": json.dumps(redrive)}
    queue_url = sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]
    s3.create_bucket(Bucket=name)
    if versioned:
        s3.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    rules = [{"Name": "prefix", "Value": "in/"}, {"Name": "suffix", "Value": ".jsonl"}]
    told = {
        "QueueArn": _arn(sqs, queue_url),
        "Events": ["s3:ObjectCreated:*"],
        "Filter": {"Key": {"FilterRules": rules}},
    }
    s3.put_bucket_notification_configuration(
        Bucket=name, NotificationConfiguration={"QueueConfigurations": [told]}
    )
    dynamodb.create_table(
        TableName=name,
        KeySchema=[{"AttributeName": "pk", "KeyType": "HASH"}, {"AttributeName": "sk", "KeyType": "RANGE"}],
        AttributeDefinitions=[{"AttributeName": n, "AttributeType": "S"} for n in ("pk", "sk")],
        BillingMode="PAY_PER_REQUEST",
    )
    return Resources(store, name, queue_url, dead_url, name)


def of(stack: AwsStack) -> Resources:
    """Those of a stack of template.yaml, where workers may do what the stack's policy says and no more."""
    ids = stack.ids
    return Resources(stack, ids["BatchBucket"], ids["BatchQueue"], ids["BatchDlq"], ids["StateTable"])


def _arn(sqs: Any, queue_url: str) -> str:
    said = sqs.get_queue_attributes(QueueUrl=queue_url, AttributeNames=["QueueArn"])
    return str(said["Attributes"]["QueueArn"])


# --- lines, and an application that answers them -----------------------------------------------


def line(custom_id: str, text: str | None = None, url: str = URL, **more: Any) -> bytes:
    """A line that asks for `text` back, which is its `custom_id` if not said."""
    content = custom_id if text is None else text
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], **more}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}).encode() + b"\n"


def echoing(**options: Any) -> ScriptedApp:
    """The application that answers lines."""
    return ScriptedApp({}, makes={CHAT: echo}, **options)


def echoes(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The `custom_id` of each line of an output whose answer is it. Fails for any other answer."""
    for one in lines:
        assert one["response"]["status_code"] == 200
        assert one["response"]["body"]["choices"][0]["message"]["content"] == one["custom_id"]
        assert one["error"] is None
    return [one["custom_id"] for one in lines]


# --- a worker in the test's own process --------------------------------------------------------


@asynccontextmanager
async def consuming(
    app: ScriptedApp,
    resources: Resources,
    environ: Mapping[str, str] | None = None,
    *,
    times: Times = QUICK,
    queue_times: QueueTimes = QUICK_QUEUE,
    pace: Callable[[int], Pace] = SMALL_PARTS,
    **options: Any,
) -> AsyncIterator[tuple[Consumer, ScriptedEngine]]:
    """A worker that takes messages as `PLATFORM=sqs` does."""
    given = {"PLATFORM": "sqs", "MODEL_NAME": MODEL, "DRAIN_TIMEOUT_S": "10", **resources.environ}
    settings = Settings.from_environ({**given, **(environ or {})})
    engine = ScriptedEngine(app, settings)

    def batches(clients: Any) -> S3Batches:
        return S3Batches(settings, clients, times=times, pace=pace, **options)

    consumer = Sqs(settings, queue_times, batches).consumer(cast("Engine", engine))
    serving = asyncio.create_task(consumer.serve(Notifier(None), lambda: None))
    try:
        yield consumer, engine
    finally:
        if not consumer._work.stopping.is_set():
            serving.cancel()  # nobody waits for what the queue says to its last request
        await asyncio.wait({serving})
    if not serving.cancelled():
        serving.result()
