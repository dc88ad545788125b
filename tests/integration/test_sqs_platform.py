"""`handler.platforms.sqs`: a queue on moto's server, a scripted engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from handler.errors import AwsFailed, ModelNotFound
from handler.platforms import sqs
from handler.settings import Settings
from handler.supervision import Notifier
from tests.batch_stack import CHAT, QUICK_QUEUE, URL, Resources, consuming, line
from tests.contract import recorded
from tests.scripted_app import Fail, Pause, Script, ScriptedApp, Seen, echo
from tests.until import until


def job(resources: Resources, name: str, text: str = "Hi", **more: Any) -> dict[str, Any]:
    """A message with one request, whose answer goes to an object called `name`."""
    body = {"model": "tinychat", "messages": [{"role": "user", "content": text}], **more}
    reply_to = f"s3://{resources.bucket}/replies/{name}.json"
    return {"openai_route": URL, "openai_input": body, "reply_to": reply_to, "custom_id": name}


def replies(resources: Resources) -> Mapping[str, str]:
    """The settings that let answers go there."""
    return {"REPLY_TO": f"s3://{resources.bucket}/replies"}


def reply(resources: Resources, name: str) -> dict[str, Any]:
    """The answer in the object called `name`."""
    found = resources.s3.get_object(Bucket=resources.bucket, Key=f"replies/{name}.json")
    told: dict[str, Any] = json.loads(found["Body"].read())
    return told


def waiting_at(*names: str) -> ScriptedApp:
    """An application that waits at the gate called as what it is asked, if that is one of `names`."""

    def make(seen: Seen) -> Script:
        script, said = echo(seen), json.loads(seen.body)["messages"][-1]["content"]
        return replace(script, steps=(Pause(said), *script.steps)) if said in names else script

    return ScriptedApp({}, makes={CHAT: make})


async def test_a_message_is_done_and_deleted(resources: Resources) -> None:
    """Its answer is where it says; a fault of the request is an answer too, one of the worker is not."""
    for message in (job(resources, "good"), job(resources, "bad", "404"), {"Event": "s3:TestEvent"}):
        resources.send(message)
    async with consuming(ScriptedApp({}, makes={CHAT: echo}), resources, replies(resources)):
        await resources.quiet()
    good, bad = reply(resources, "good"), reply(resources, "bad")
    assert (good["custom_id"], good["response"]["status_code"]) == ("good", 200)
    assert good["response"]["body"]["choices"][0]["message"]["content"] == "Hi"
    assert (bad["custom_id"], bad["response"]["status_code"]) == ("bad", 404)
    assert resources.dead() == []


async def test_a_message_that_fails_comes_again_and_is_given_up(resources: Resources) -> None:
    """By the queue, after five times; others are done meanwhile."""
    failing = job(resources, "failing")
    resources.send(failing)
    resources.send({"no": "work"})
    resources.send(job(resources, "good", "good"))

    def make(seen: Seen) -> Script:
        return echo(seen) if b"good" in seen.body else Script((Fail(),))

    app = ScriptedApp({}, makes={CHAT: make})
    async with consuming(app, resources, replies(resources)):
        await resources.quiet()
    dead = resources.dead()
    assert sorted(dead, key=len) == [{"no": "work"}, failing]
    assert reply(resources, "good")["response"]["status_code"] == 200
    assert len(app.seen) == 6


async def test_as_many_messages_are_worked_on_as_the_engine_takes(resources: Resources) -> None:
    """The others are left for other workers."""
    app = waiting_at("a")
    for number in range(5):
        resources.send(job(resources, str(number), "a"))
    async with consuming(app, resources, {**replies(resources), "MAX_CONCURRENCY": "2"}):
        await asyncio.to_thread(until, lambda: len(app.seen) == 2)
        await asyncio.to_thread(until, lambda: resources.waiting() == (3, 2, 0))
        assert len(app.seen) == 2
        app.gate("a").opened.set()
        await resources.quiet()
    assert len(app.seen) == 5


async def test_beside_a_batch_no_message_is_taken(resources: Resources) -> None:
    """It has the whole engine; the message is for another worker."""
    app = waiting_at("x")
    resources.put("a", [line("x")])
    async with consuming(app, resources, replies(resources)):
        await app.gate("x").reached.wait()
        resources.send(job(resources, "later"))
        async with consuming(waiting_at(), resources, replies(resources)):
            await asyncio.to_thread(until, lambda: resources.waiting() == (0, 1, 0))
        app.gate("x").opened.set()
        await resources.over("a")
    assert reply(resources, "later")["response"]["status_code"] == 200
    assert len(app.seen) == 1


async def test_a_message_is_hidden_for_as_long_as_it_is_worked_on(resources: Resources) -> None:
    """However long that is; another worker has nothing to do."""
    app, idle = waiting_at("long"), ScriptedApp({})
    resources.send(job(resources, "long", "long"))
    times, hidden = replace(QUICK_QUEUE, hidden_s=5), asyncio.Semaphore(0)
    async with consuming(app, resources, replies(resources), queue_times=times) as (consumer, _):
        await app.gate("long").reached.wait()
        hide = consumer._queue.hide

        async def hide_and_tell(message: Any, for_s: int) -> None:
            await hide(message, for_s)
            hidden.release()

        consumer._queue.hide = hide_and_tell  # type: ignore[method-assign] # the test counts
        async with consuming(idle, resources, replies(resources), queue_times=times):
            for _ in range(4):  # each a third of the time
                await hidden.acquire()
            app.gate("long").opened.set()
            await resources.quiet()
    assert (len(app.seen), len(idle.seen)) == (1, 0)


async def test_a_stop_lets_answers_end(resources: Resources) -> None:
    """And takes nothing more."""
    app = waiting_at("a")
    resources.send(job(resources, "a", "a"))
    async with consuming(app, resources, replies(resources)) as (consumer, _):
        await app.gate("a").reached.wait()
        consumer.stop()
        resources.send(job(resources, "b"))
        app.gate("a").opened.set()
    assert reply(resources, "a")["response"]["status_code"] == 200
    assert resources.waiting() == (1, 0, 0)


async def test_what_is_not_done_by_the_drains_deadline_is_handed_back(resources: Resources) -> None:
    """At once, for another worker."""
    app = waiting_at("a")
    resources.send(job(resources, "a", "a"))
    settings = {**replies(resources), "DRAIN_TIMEOUT_S": "0.1"}
    times = replace(QUICK_QUEUE, again_s=900, hidden_s=900)
    async with consuming(app, resources, settings, queue_times=times) as (consumer, _):
        await app.gate("a").reached.wait()
        consumer.stop()
    assert resources.waiting() == (1, 0, 0)
    assert app.seen[0].ended == "disconnected"


async def test_a_queue_that_can_not_be_asked_is_asked_again(
    resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is loaded: a worker is not given up for a moment without network."""
    monkeypatch.setattr(sqs, "PAUSE_S", 0.01)
    resources.send(job(resources, "a"))
    async with consuming(waiting_at(), resources, replies(resources)) as (consumer, _):
        real, calls = consumer._queue.receive, 0

        async def receive() -> Any:
            nonlocal calls
            calls += 1
            if calls < 4:
                raise AwsFailed("no network")
            return await real()

        consumer._queue.receive = receive  # type: ignore[method-assign] # the network fails
        await resources.quiet()
    assert calls >= 4


async def test_what_was_used_is_written_down(resources: Resources) -> None:
    """For everybody who may write to the queue together."""
    resources.send(job(resources, "a"))
    app = ScriptedApp({CHAT: recorded.chat()})
    async with consuming(app, resources, {**replies(resources), "USAGE_TABLE": resources.table}) as (
        consumer,
        _,
    ):
        await resources.quiet()
        consumer.stop()
    (item,) = resources.store.client("dynamodb").scan(TableName=resources.table)["Items"]
    assert (item["pk"]["S"], item["prompt_tokens"]["N"]) == ("usage#aws:sqs", "24")


def test_a_worker_that_can_not_start_leaves_the_messages_to_others() -> None:
    """It ends, also where others stay and tell."""
    settings = Settings.from_environ({"PLATFORM": "sqs", "SQS_QUEUE_URL": "http://127.0.0.1:1/1/queue"})
    with pytest.raises(ModelNotFound):
        sqs.open(settings).fail(ModelNotFound("no model"), Notifier(None))
