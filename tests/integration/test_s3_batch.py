"""Batches through a queue: real boto3, moto's server, a worker's own edge, a scripted application."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from handler import batch_source, edge
from handler.asgi import call_app
from handler.batch_lines import Progress
from handler.batch_window import Pace, Part
from handler.errors import UpstreamFailed
from handler.platforms import batch_shift, batch_upload
from handler.platforms.aws_clients import Clients
from handler.platforms.batch_lease import Lease, Leases, Taken
from handler.platforms.batch_store import BatchStore, Place
from handler.platforms.lambda_messages import Created, Shift
from handler.platforms.s3_batch import S3Batches
from handler.settings import Settings
from tests import batch_stack
from tests.batch_stack import (
    CHAT,
    QUICK,
    QUICK_QUEUE,
    URL,
    Resources,
    consuming,
    echoes,
    echoing,
    line,
)
from tests.integration.test_lambda_platform import sqs
from tests.lambda_function import function
from tests.object_store import ObjectStore
from tests.scripted_app import Pause, Script, ScriptedApp, Seen, answer, echo
from tests.servers import MODEL
from tests.until import until


def slow(name: str = "rest", *, after: int = 0) -> ScriptedApp:
    """The application, whose answers but the first `after` wait at the gate called `name`."""
    calls = 0

    def make(seen: Seen) -> Script:
        nonlocal calls
        calls += 1
        script = echo(seen)
        return script if calls <= after else replace(script, steps=(Pause(name), *script.steps))

    return ScriptedApp({}, makes={CHAT: make})


def paced(each_s: float, *, waits: bool = False) -> ScriptedApp:
    """The application, each of whose answers takes its time; if it `waits`, once its gate `begin` opens."""

    def make(seen: Seen) -> Script:
        script = echo(seen)
        return replace(script, steps=(Pause("begin"), Pause(str(len(app.seen))), *script.steps))

    def let_go(what: str, name: str) -> None:
        if what == "paused" and name != "begin":
            asyncio.get_running_loop().call_later(each_s, app.gate(name).opened.set)

    app = ScriptedApp({}, makes={CHAT: make}, tell=let_go)
    if not waits:
        app.gate("begin").opened.set()
    return app


def asked(app: ScriptedApp) -> list[str]:
    """What the application was asked, in order."""
    return [json.loads(seen.body)["messages"][-1]["content"] for seen in app.seen]


def parts(resources: Resources, batch: str) -> list[dict[str, Any]]:
    """The metadata of the batch's parts, each with its start, in order."""
    found = []
    for name in sorted(resources.names(batch)):
        if name.startswith("parts/"):
            key = f"{resources.output_prefix}{batch}/{name}"
            said = resources.s3.head_object(Bucket=resources.bucket, Key=key)
            start = int(name.rpartition("/")[2].removesuffix(".jsonl"))
            found.append({"first": start, **{key: int(value) for key, value in said["Metadata"].items()}})
    return found


def _done(resources: Resources, batch: str) -> int:
    """How many lines are in parts."""
    return int(next((part["completed"] for part in reversed(parts(resources, batch))), 0))


@asynccontextmanager
async def working(
    app: ScriptedApp, resources: Resources, batch: str, version: str
) -> AsyncIterator[asyncio.Task[None]]:
    """One shift on a batch, whose message nobody else gets."""
    settings = Settings.from_environ({"MODEL_NAME": MODEL, **resources.environ})
    batches = S3Batches(settings, Clients(), times=QUICK, pace=partial(Pace, part_lines=1))
    loop = asyncio.get_running_loop()
    shift = Shift(edge.openai(call_app(app)), 4, loop.time() + 60, asyncio.Event())
    working = asyncio.create_task(batches(Created(resources.bucket, resources.key(batch), version), shift))
    try:
        yield working
    finally:
        working.cancel()
        await asyncio.wait({working})


# --- a batch ------------------------------------------------------------------------------------


async def test_a_batch_of_a_thousand_lines_with_fifty_bad_ones(resources: Resources) -> None:
    """Each good line is answered once, each bad one is told, in the order of the file; counts are right."""
    bad = {
        "no json": b"}{\n",
        "no id": b'{"method": "POST"}\n',
        "duplicate": line("line-0"),
        "wrong url": line("bad-url", url="/v1/nothing"),
        "wrong method": line("bad-method").replace(b'"POST"', b'"GET"'),
        "refused": line("bad-400", text="400"),
        "failing": line("bad-500", text="500"),
    }
    codes = {
        "no json": (None, "invalid_json_line"),
        "no id": (None, "invalid_custom_id"),
        "duplicate": ("line-0", "duplicate_custom_id"),
        "wrong url": ("bad-url", "unknown_url"),
        "wrong method": ("bad-method", "invalid_method"),
        "refused": ("bad-400", 400),
        "failing": ("bad-500", 500),
    }
    rest = ["duplicate"] * 43
    places = dict(zip(sorted(random.Random(7).sample(range(1, 1000), 50)), [*bad, *rest], strict=True))
    good = [f"line-{number}" for number in range(1000) if number not in places]
    lines = [bad[places[number]] if number in places else line(f"line-{number}") for number in range(1000)]
    resources.put("a", lines, Metadata={"project": "x"})
    app = echoing()
    async with consuming(app, resources):
        found = await resources.over("a")
        await resources.quiet()
    assert found.status == "completed"
    assert found.request_counts is not None
    assert found.request_counts.model_dump() == {"total": 1000, "completed": 950, "failed": 50}
    assert echoes(resources.lines("a", "output.jsonl")) == good
    errors = resources.lines("a", "error.jsonl")
    assert [
        (one["custom_id"], one["error"]["code"] if one["error"] else one["response"]["status_code"])
        for one in errors
    ] == [codes[places[number]] for number in sorted(places)]
    assert [one["error"]["line"] for one in errors if one["error"]] == [
        number + 1 for number in sorted(places) if places[number] not in {"refused", "failing"}
    ]
    assert sorted(asked(app)) == sorted([*good, "400", "500", "500", "500"])
    assert resources.dead() == []


async def test_what_batch_json_says_is_openais(resources: Resources) -> None:
    """The whole object of a batch that is over."""
    version = resources.put("team/a", [line("x"), line("bad", text="404")], Metadata={"project": "x"})
    began = int(time.time())
    async with consuming(echoing(), resources):
        found = await resources.over("team/a")
    told = found.model_dump()
    moments = {
        name: told.pop(name) for name in ("created_at", "in_progress_at", "finalizing_at", "completed_at")
    }
    assert began <= moments["created_at"] <= moments["in_progress_at"] <= moments["finalizing_at"]
    assert moments["finalizing_at"] <= moments["completed_at"] <= time.time()
    folder = f"s3://{resources.bucket}/out/team/a"
    assert told == {
        "id": "team/a",
        "object": "batch",
        "endpoint": URL,
        "model": MODEL,
        "errors": None,
        "input_file_id": f"s3://{resources.bucket}/in/team/a.jsonl",
        "completion_window": "24h",
        "status": "completed",
        "output_file_id": f"{folder}/output.jsonl",
        "error_file_id": f"{folder}/error.jsonl",
        "expires_at": moments["created_at"] + 24 * 3600,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": None,
        "cancelled_at": None,
        "request_counts": {"total": 2, "completed": 1, "failed": 1},
        "usage": {
            "input_tokens": 2,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 1,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 3,
        },
        "metadata": {"project": "x", "input_version": version, "attempt": "1"},
    }


async def test_a_batch_without_errors_names_no_file_of_them(resources: Resources) -> None:
    """As OpenAI's; the file is there and empty, whatever was there before."""
    resources.s3.put_object(Bucket=resources.bucket, Key="out/a/error.jsonl", Body=b"old\n")
    resources.put("a", [line("x")])
    async with consuming(echoing(), resources):
        found = await resources.over("a")
    assert (found.error_file_id, resources.get("a", "error.jsonl")) == (None, b"")


async def test_long_results_are_put_together_in_pieces(
    resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any length; what S3 has at the end are the parts, one after the other."""
    monkeypatch.setattr(batch_upload, "PIECE_BYTES", 5 << 20)
    texts = [f"{number}-" + "x" * 300_000 for number in range(40)]
    resources.put("a", [line(str(number), text=text) for number, text in enumerate(texts)])
    async with consuming(echoing(), resources, pace=partial(Pace, part_bytes=1 << 20)):
        found = await resources.over("a")
    assert found.request_counts is not None
    assert found.request_counts.completed == 40
    answers = [one["response"]["body"]["choices"][0] for one in resources.lines("a", "output.jsonl")]
    assert [choice["message"]["content"] for choice in answers] == texts
    chain = parts(resources, "a")
    assert len(chain) > 5
    assert [part["first"] for part in chain] == [0, *[part["start"] for part in chain[:-1]]]
    assert resources.s3.list_multipart_uploads(Bucket=resources.bucket).get("Uploads", []) == []


async def test_a_line_that_is_too_long_is_a_bad_line(resources: Resources) -> None:
    """It is never held; those around it are answered."""
    resources.put("a", [line("x"), line("long", text="x" * 9_000_000), line("y")])
    async with consuming(echoing(), resources, {"MAX_BODY_BYTES": "1MiB"}):
        await resources.over("a")
    assert echoes(resources.lines("a", "output.jsonl")) == ["x", "y"]
    (error,) = resources.lines("a", "error.jsonl")
    assert (error["error"]["code"], error["error"]["line"]) == ("request_too_large", 2)


# --- files that are none ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([b"\n", b" \r\n"], "empty_file"),
        ([], "empty_file"),
        ([line(str(number)) for number in range(5)], "too_many_requests"),
        ([line("x", text="x" * 5000)], "file_too_large"),
    ],
)
async def test_a_file_beyond_openais_limits_is_a_failed_batch(
    resources: Resources, monkeypatch: pytest.MonkeyPatch, lines: list[bytes], code: str
) -> None:
    """It says why, and nothing of it is asked."""
    monkeypatch.setattr(batch_source, "REQUESTS_MAX", 4)
    monkeypatch.setattr(batch_shift, "REQUESTS_MAX", 4)
    monkeypatch.setattr(batch_shift, "FILE_MAX_BYTES", 4000)
    resources.put("a", lines)
    app = echoing()
    async with consuming(app, resources):
        found = await resources.over("a")
        await resources.quiet()
    assert (found.status, found.output_file_id, app.seen) == ("failed", None, [])
    assert found.errors is not None
    assert found.errors.data is not None
    assert [error.code for error in found.errors.data] == [code]
    assert found.failed_at is not None


async def test_only_files_under_the_prefix_are_batches(resources: Resources) -> None:
    """A worker never reads what it writes, whatever it is told; another bucket is a mistake that is kept."""
    keys = ["in/readme.txt", "in/.jsonl", "other.jsonl", "out/a/output.jsonl", "out/in/b.jsonl"]
    for key in keys:
        resources.s3.put_object(Bucket=resources.bucket, Key=key, Body=line("x"))
        event = resources.created("a")
        event["Records"][0]["s3"]["object"]["key"] = key
        resources.send(event)
    event = resources.created("a")
    event["Records"][0]["s3"]["bucket"]["name"] = "another"
    resources.send(event)
    resources.send({"Event": "s3:TestEvent"})
    async with consuming(ScriptedApp({}), resources):
        await resources.quiet()
    assert resources.dead() == [event]
    found = resources.s3.list_objects_v2(Bucket=resources.bucket)["Contents"]
    assert [one["Key"] for one in found] == sorted(keys)


# --- events that come twice, late, or side by side ----------------------------------------------


async def test_events_that_come_again_or_out_of_order_change_nothing(resources: Resources) -> None:
    """Before, while and after the batch is worked on."""
    version = resources.put("a", [line(str(number), text="x") for number in range(100)])
    going_on = {"type": "batch.continue", "bucket": resources.bucket, "key": "in/a.jsonl", "version": version}
    for message in (going_on, resources.created("a", version), resources.created("a", version), going_on):
        resources.send(message)
    app = echoing()
    async with consuming(app, resources):
        await resources.over("a")
        before = {name: resources.get("a", name) for name in resources.names("a")}
        resources.send(going_on)
        resources.send(resources.created("a", version))
        resources.send(resources.created("a"))
        await resources.quiet()
        assert {name: resources.get("a", name) for name in resources.names("a")} == before
    assert len(app.seen) == 100


async def test_of_two_workers_on_a_batch_one_works(resources: Resources) -> None:
    """The other looks again until it is over, and is free for other work."""
    resources.put("a", [line(str(number), text="x") for number in range(20)])
    first, second = slow(), echoing()
    async with consuming(first, resources):
        await first.gate("rest").reached.wait()
        async with consuming(second, resources):
            resources.send(resources.created("a"))
            resources.put("b", [line("x")])
            await resources.over("b")
            first.gate("rest").opened.set()
            assert (await resources.over("a")).request_counts is not None
            await resources.quiet()
    assert (len(first.seen), len(second.seen)) == (20, 1)
    assert resources.dead() == []


async def test_a_newer_file_takes_the_place_of_one_that_is_worked_on(resources: Resources) -> None:
    """The worker on the old one stops; an event of the old one that comes late changes nothing."""
    old = resources.put("a", [line(f"old-{number}") for number in range(1000)])
    first, second = paced(0.1), echoing()
    async with working(first, resources, "a", old) as shift:
        await asyncio.to_thread(until, lambda: parts(resources, "a"))
        async with consuming(second, resources):
            new = resources.put("a", [line(f"new-{number}") for number in range(20)])
            found = await resources.over("a")
            await shift
            resources.send(resources.created("a", old))
            await resources.quiet()
    assert found.metadata is not None
    assert found.metadata["input_version"] == new
    assert resources.record("a") == found
    assert echoes(resources.lines("a", "output.jsonl")) == [f"new-{number}" for number in range(20)]
    assert len(second.seen) == 20
    assert len(first.seen) < 1000


async def test_without_versions_a_file_is_known_by_its_etag(aws: ObjectStore) -> None:
    """The same content again is the same batch, another is another."""
    resources = batch_stack.make(aws, versioned=False)
    app = echoing()
    async with consuming(app, resources):
        for text, calls in (("x", 1), ("x", 1), ("y", 2)):
            resources.put("a", [line(text)])
            await resources.quiet()
            assert len(app.seen) == calls
            assert echoes(resources.lines("a", "output.jsonl")) == [text]


# --- shifts -------------------------------------------------------------------------------------


async def test_a_batch_is_gone_on_with_after_a_shift(aws: ObjectStore) -> None:
    """By messages of its own: more shifts than a message may fail are no failure.

    A busy machine stalls: a shift's last line gets more than a second to end in, and a message stays hidden.
    """
    resources = batch_stack.make(aws, dead_after=1)
    ids = [str(number) + "x" for number in range(80)]
    resources.put("a", [line(custom_id) for custom_id in ids])
    app = paced(0.12)
    times, queue_times = replace(QUICK, handover_s=2.5), replace(QUICK_QUEUE, shift_s=10.0, hidden_s=60)
    settings = {"MAX_CONCURRENCY": "1"}
    async with consuming(app, resources, settings, times=times, queue_times=queue_times):
        found = await resources.over("a")
        await resources.quiet()
    assert found.metadata is not None
    assert int(found.metadata["attempt"]) > 1
    assert resources.dead() == []
    assert sorted(set(asked(app))) == sorted(ids)
    assert echoes(resources.lines("a", "output.jsonl")) == ids


async def test_a_lambda_function_runs_batches(resources: Resources) -> None:
    """From the same messages; before an invocation's time is over it asks for the next by one of its own."""
    ids = [str(number) + "x" for number in range(80)]
    resources.put("a", [line(custom_id) for custom_id in ids])
    app = paced(0.1)
    settings = {**resources.environ, "MAX_CONCURRENCY": "1"}
    invocations = 0
    async with function(app, settings, at_once=1, timeout_s=8.0) as on:
        while not resources.is_over("a"):
            said = await asyncio.to_thread(
                resources.sqs.receive_message, QueueUrl=resources.queue_url, WaitTimeSeconds=5
            )
            for message in said.get("Messages", ()):
                invocations += 1
                told = await (await on.api.invoke(sqs(message["Body"]), timeout_s=8.0)).whole()
                assert told == {"batchItemFailures": []}
                resources.sqs.delete_message(
                    QueueUrl=resources.queue_url, ReceiptHandle=message["ReceiptHandle"]
                )
    assert invocations > 1
    assert echoes(resources.lines("a", "output.jsonl")) == ids


async def test_a_line_that_takes_longer_than_a_shift_is_given_up(resources: Resources) -> None:
    """Or nobody would ever be done; those that waited for it count."""
    resources.put("a", [line("endless"), *[line(str(number) + "x") for number in range(5)]])

    def make(seen: Seen) -> Script:
        script = echo(seen)
        return replace(script, steps=(Pause("never"),)) if b"endless" in seen.body else script

    app = ScriptedApp({}, makes={CHAT: make})
    async with consuming(app, resources, queue_times=replace(QUICK_QUEUE, shift_s=2.0)):
        await resources.over("a")
    (error,) = resources.lines("a", "error.jsonl")
    assert (error["custom_id"], error["error"]["code"]) == ("endless", "request_timeout")
    assert echoes(resources.lines("a", "output.jsonl")) == [str(number) + "x" for number in range(5)]
    assert app.seen[0].ended == "disconnected"


async def test_a_worker_that_stops_hands_its_batch_on(resources: Resources) -> None:
    """What runs may end, what is left is for another worker, at once; nothing is asked twice."""
    ids = [str(number) + "x" for number in range(30)]
    resources.put("a", [line(custom_id) for custom_id in ids])
    first, second = slow(after=4), echoing()
    times = replace(QUICK, lease_s=600.0)
    async with consuming(first, resources, {"MAX_CONCURRENCY": "2"}, times=times) as (consumer, _):
        await first.gate("rest").reached.wait()
        consumer.stop()
        first.gate("rest").opened.set()
    assert not resources.is_over("a")
    assert resources.waiting() == (1, 0, 0)
    async with consuming(second, resources):
        await resources.over("a")
        await resources.quiet()
    assert asked(first) == ids[:6]
    assert sorted(asked(first) + asked(second)) == sorted(ids)
    assert echoes(resources.lines("a", "output.jsonl")) == ids


async def test_a_dead_engine_is_no_fault_of_a_line(resources: Resources) -> None:
    """What it held is asked again by the worker that takes its place; the message counts as failed."""
    ids = [str(number) + "x" for number in range(30)]
    resources.put("a", [line(custom_id) for custom_id in ids])

    def make(seen: Seen) -> Script:
        if len(first.seen) < 5:
            return echo(seen)
        if not engine.is_dead:
            engine.dead.set_result(None)
        return answer({"error": {"message": "the engine core died"}}, 500)

    first, second = ScriptedApp({}, makes={CHAT: make}), echoing()
    async with consuming(first, resources) as (consumer, engine):
        engine.dead.add_done_callback(lambda _: consumer.stop())
        await consumer._work.stopping.wait()
    assert not resources.is_over("a")
    assert resources.waiting() == (1, 0, 0)
    async with consuming(second, resources):
        found = await resources.over("a")
        await resources.quiet()
    assert found.request_counts is not None
    assert (found.request_counts.completed, found.request_counts.failed) == (30, 0)
    assert echoes(resources.lines("a", "output.jsonl")) == ids


async def test_a_worker_without_room_is_asked_again(resources: Resources) -> None:
    """However often that is; it says nothing of the line."""
    resources.put("a", [line("x")])
    now = (("retry-after", "0"),)
    busy = [answer({"error": {"message": "full"}}, status, now) for status in (503, 429)]

    def make(seen: Seen) -> Script:
        return busy[len(app.seen) % 2] if len(app.seen) < 9 else echo(seen)

    app = ScriptedApp({}, makes={CHAT: make})
    async with consuming(app, resources, times=replace(QUICK, pause_s=0.001)):
        await resources.over("a")
    assert echoes(resources.lines("a", "output.jsonl")) == ["x"]
    assert len(app.seen) == 9


# --- ends that a user or the clock brings -------------------------------------------------------


async def test_a_batch_is_cancelled_by_an_object(resources: Resources) -> None:
    """What was answered is kept, what runs is stopped, the rest is told. One from before the file is none."""
    ids = [str(number) + "x" for number in range(30)]
    resources.s3.put_object(Bucket=resources.bucket, Key="out/a/cancel", Body=b"")
    await asyncio.sleep(1.1)  # S3 tells times in seconds
    resources.put("a", [line(custom_id) for custom_id in ids])
    app = slow(after=10)
    async with consuming(app, resources, {"MAX_CONCURRENCY": "2"}):
        await app.gate("rest").reached.wait()
        resources.s3.put_object(Bucket=resources.bucket, Key="out/a/cancel", Body=b"")
        found = await resources.over("a")
        await resources.quiet()
    assert found.status == "cancelled"
    assert found.cancelling_at is not None
    assert found.cancelled_at is not None
    assert found.completed_at is None
    assert found.request_counts is not None
    assert found.request_counts.model_dump() == {"total": 30, "completed": 10, "failed": 20}
    assert echoes(resources.lines("a", "output.jsonl")) == ids[:10]
    errors = resources.lines("a", "error.jsonl")
    assert [one["custom_id"] for one in errors] == ids[10:]
    assert {one["error"]["code"] for one in errors} == {"batch_cancelled"}
    assert [seen.ended for seen in app.seen[10:]] == ["disconnected"] * 2


async def test_a_batch_may_be_cancelled_before_it_begins(resources: Resources) -> None:
    """Nothing of it is asked, all of it is told."""
    resources.put("a", [line(str(number) + "x") for number in range(30)])
    resources.s3.put_object(Bucket=resources.bucket, Key="out/a/cancel", Body=b"")
    app = ScriptedApp({})
    async with consuming(app, resources):
        found = await resources.over("a")
    assert (found.status, found.endpoint) == ("cancelled", URL)
    assert found.request_counts is not None
    assert found.request_counts.model_dump() == {"total": 30, "completed": 0, "failed": 30}


async def test_what_is_not_asked_within_a_day_has_expired(resources: Resources) -> None:
    """What was answered by then is kept."""
    day = 0.0
    resources.put("a", [line(str(number) + "x") for number in range(20)])
    app = slow(after=5)
    async with consuming(app, resources, {"MAX_CONCURRENCY": "2"}, now=lambda: time.time() + day):
        await app.gate("rest").reached.wait()
        day = 24 * 3600.0
        found = await resources.over("a")
    assert found.status == "expired"
    assert found.request_counts is not None
    assert found.request_counts.model_dump() == {"total": 20, "completed": 5, "failed": 15}
    assert {one["error"]["code"] for one in resources.lines("a", "error.jsonl")} == {"batch_expired"}
    assert found.expired_at is not None
    assert found.expires_at is not None
    assert found.expired_at >= found.expires_at


async def test_a_file_that_is_deleted_ends_its_batch(resources: Resources) -> None:
    """By the next worker that looks; a file that is gone before is no batch at all."""
    version = resources.put("a", [line(str(number) + "x") for number in range(20)])
    app = slow()
    async with consuming(app, resources) as (consumer, _):
        await app.gate("rest").reached.wait()
        resources.s3.delete_object(Bucket=resources.bucket, Key="in/a.jsonl")
        consumer.stop()
        app.gate("rest").opened.set()
    resources.send(resources.created("never-there"))
    async with consuming(app, resources):
        found = await resources.over("a")
        await resources.quiet()
    assert found.status == "failed"
    assert found.errors is not None
    assert found.errors.data is not None
    assert found.errors.data[0].code == "input_deleted"
    assert found.metadata is not None
    assert found.metadata["input_version"] == version


# --- failures around it -------------------------------------------------------------------------


async def test_a_message_that_can_not_be_worked_on_ends_as_a_dead_letter(resources: Resources) -> None:
    """After five times, and nothing is forgotten."""
    resources.put("a", [line("x")])
    await asyncio.to_thread(resources.store.client("dynamodb").delete_table, TableName=resources.table)
    app = ScriptedApp({})
    async with consuming(app, resources):
        await resources.quiet()
    (dead,) = [message for message in resources.dead() if "Records" in message]
    assert dead["Records"][0]["s3"]["object"]["key"] in {"in/a.jsonl", "in%2Fa.jsonl"}
    assert resources.names("a") == []


# --- fences -------------------------------------------------------------------------------------


@pytest.fixture
def store(resources: Resources) -> BatchStore:
    """The objects of the batch called a."""
    place = Place("a", resources.bucket, "in/a.jsonl", resources.bucket, "out/a/")
    return BatchStore(place, Clients())


def a_part(start: int, text: bytes, end: int) -> Part:
    """A part with one good line."""
    return Part(start, Progress(end, 2, 1, 0), [text + b"\n"])


def test_a_lease_is_anothers_only_once_it_has_expired(resources: Resources) -> None:
    """Each holder is told apart, a replaced one can neither renew nor release."""
    now = 1000.0
    leases = Leases(resources.table, Clients(), 60.0, now=lambda: now)
    first = leases.take("bucket/in/a.jsonl", "v1", "first")
    assert first == Lease("bucket/in/a.jsonl", "v1", "first", 1)
    now += 50
    assert leases.renew(first) is True
    now += 50
    assert leases.take("bucket/in/a.jsonl", "v1", "second") == Taken(10.0)
    assert leases.take("bucket/in/a.jsonl", "v2", "second") == Lease("bucket/in/a.jsonl", "v2", "second", 1)
    now += 11
    second = leases.take("bucket/in/a.jsonl", "v1", "second")
    assert second == Lease("bucket/in/a.jsonl", "v1", "second", 2)
    assert (leases.renew(first), leases.release(first)) == (False, False)
    assert leases.release(second) is True
    third = leases.take("bucket/in/a.jsonl", "v1", "third")
    assert third == Lease("bucket/in/a.jsonl", "v1", "third", 3)
    assert leases.take("bucket/in/a.jsonl", "v1", "third") == Lease("bucket/in/a.jsonl", "v1", "third", 4)


def test_what_a_replaced_holder_writes_is_refused(store: BatchStore) -> None:
    """batch.json, a part and the results; what the new one has written stays."""
    _, nothing = store.load()
    old = store.save({"by": "old"}, nothing)
    assert old is not None
    results = store.results()
    new = store.save({"by": "new"}, old)
    assert new is not None
    assert store.save({"by": "old again"}, old) is None
    assert store.save({"by": "old again"}, nothing) is None
    assert store.load() == ({"by": "new"}, new)

    assert store.put_part("v1", a_part(0, b"new", 10)) is True
    assert store.put_part("v1", a_part(0, b"old", 5)) is False
    assert (store.parts("v1"), store.progress("v1", 0).start) == ([0], 10)

    assert store.merge("v1", results, lambda: True) is True
    assert store.merge("v1", results, lambda: True) is False
    assert store.merge("v1", store.results(), lambda: False) is False


def test_a_write_whose_answer_was_lost_was_written(store: BatchStore) -> None:
    """To write the same again is no sign of another holder."""
    _, nothing = store.load()
    first = store.save({"a": 1}, nothing)
    assert store.save({"a": 1}, nothing) == first


def test_a_part_that_is_missing_is_not_passed_over(store: BatchStore) -> None:
    """Rather no results than wrong ones."""
    store.put_part("v1", a_part(0, b"a", 10))
    store.put_part("v1", a_part(20, b"c", 30))
    with pytest.raises(UpstreamFailed, match="begins at 10 is missing, another is at 20"):
        store.merge("v1", store.results(), lambda: True)


async def test_a_worker_whose_lease_was_taken_stops(resources: Resources) -> None:
    """What it has written counts, and the one that has the batch now goes on behind it."""
    ids = [str(number) + "x" for number in range(20)]
    version = resources.put("a", [line(custom_id) for custom_id in ids])
    first, second = slow(after=4), echoing()
    async with working(first, resources, "a", version) as shift:
        await first.gate("rest").reached.wait()
        await asyncio.to_thread(until, lambda: _done(resources, "a") == 4)
        await asyncio.to_thread(_take_away, resources, version)
        await shift
    assert {seen.ended for seen in first.seen[4:]} == {"disconnected"}
    async with consuming(second, resources):
        found = await resources.over("a")
        await resources.quiet()
    assert found.metadata is not None
    assert found.metadata["attempt"] == "3"
    assert echoes(resources.lines("a", "output.jsonl")) == ids
    assert sorted(asked(second)) == sorted(ids[4:])


def _take_away(resources: Resources, version: str) -> None:
    """Have the lease be another's, as when its holder has hung for an hour, and then nobody's."""
    leases = Leases(resources.table, Clients(), 60.0, now=lambda: time.time() + 3600)
    taken = leases.take(f"{resources.bucket}/in/a.jsonl", version, "another")
    assert isinstance(taken, Lease)
    assert leases.release(taken)


async def test_two_that_work_on_the_same_lines_count_once(aws: ObjectStore) -> None:
    """Whose leases know nothing of each other: each part is one of theirs, and the chain has no gap."""
    resources = batch_stack.make(aws)
    ids = [str(number) + "x" for number in range(200)]
    resources.put("a", [line(custom_id) for custom_id in ids])
    resources.send(resources.created("a"))
    other_table = {"BATCH_TABLE": batch_stack.make(aws).table}
    apps, times = [paced(each_s, waits=True) for each_s in (0.005, 0.01)], replace(QUICK, save_s=3600.0)
    async with (
        consuming(apps[0], resources, times=times, pace=partial(Pace, part_lines=7)),
        consuming(apps[1], resources, other_table, times=times, pace=partial(Pace, part_lines=11)),
    ):
        for app in apps:
            await app.gate("begin").reached.wait()
        for app in apps:
            app.gate("begin").opened.set()
        await resources.over("a")
        await resources.quiet()
    assert echoes(resources.lines("a", "output.jsonl")) == ids
    assert len(apps[0].seen) + len(apps[1].seen) > 200
    assert resources.dead() == []
