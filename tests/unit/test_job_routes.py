"""RunPod's API of jobs, through the gateway's application: shapes, faults, limits, and whose a job is."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from gateway.accounts.keys import Key, Keys
from gateway.accounts.limits import Limits
from gateway.accounts.usage import USAGE, Prices
from gateway.app import Gateway
from gateway.jobs import Jobs
from gateway.jobs.account import Account
from gateway.jobs.destinations import Allowed
from gateway.jobs.rates import LIMITS, Rates
from gateway.jobs.routes import JobRoutes, worker_counts
from gateway.metrics import Metrics
from gateway.store import Store
from handler.asgi import App, call_app
from handler.auth import digest
from handler.errors import RateLimited
from handler.messages import Headers, Request, read
from tests.job_endpoints import CHAT, ScriptedEndpoint, frames, used, whole
from tests.scripted_app import EVENT_STREAM, Pause, Say, Script, ScriptedApp, answer

INPUT = {"openai_route": "/v1/chat/completions", "openai_input": {"model": "m", "messages": []}}
NO_COUNTS = {"completed": 0, "failed": 0, "inProgress": 0, "inQueue": 0, "retried": 0}


def keys() -> Keys:
    """An admin's, and two others; `few` may ask twice a minute, and nothing but `m`."""
    stored = [
        Key("key_one", "one", digest("one")),
        Key("key_few", "few", digest("few"), requests_per_minute=2, models=frozenset({"m"})),
    ]
    return Keys("admin", stored)


class Api:
    """The gateway, asked by a client."""

    def __init__(self, app: App, jobs: Jobs, endpoint: ScriptedEndpoint, store: Store) -> None:
        self._call = call_app(app)
        self.jobs = jobs
        self.endpoint = endpoint
        self.store = store

    async def ask(
        self, method: str, path: str, body: Any = None, *, key: str = "one", headers: Headers = ()
    ) -> tuple[int, Any]:
        """Status and body of an answer."""
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        told = (("authorization", f"Bearer {key}"), ("content-length", str(len(raw))), *headers)
        path, _, query = path.partition("?")
        async with self._call(Request(method, f"/v2/local/{path}", told, raw, query)) as reply:
            return reply.status, json.loads(await read(reply))

    async def run(self, key: str = "one", job_input: Any = None) -> str:
        """The id of a new job."""
        status, body = await self.ask("POST", "run", {"input": job_input or INPUT}, key=key)
        assert (status, set(body), body["status"]) == (200, {"id", "status"}, "IN_QUEUE")
        return str(body["id"])

    async def ended(self, job_id: str, *, key: str = "one") -> Any:
        """What `/status` says of a job once it has ended."""
        job = await self.jobs.find(job_id)
        assert job is not None
        await self.jobs.wait(job, 60)
        status, body = await self.ask("GET", f"status/{job_id}", key=key)
        assert status == 200
        return body


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """A database of its own."""
    store = Store.open(database_url)
    yield store
    store.close()


@asynccontextmanager
async def api(store: Store, app: ScriptedApp, **more: Any) -> AsyncIterator[Api]:
    """A gateway whose only endpoint is `local`."""
    endpoint = ScriptedEndpoint(app)
    endpoints = {"local": endpoint}
    known, limits = keys(), Limits()
    account = Account(known, limits, lambda _: ("m", Prices(2_000_000, 4_000_000)))
    async with Jobs(store, endpoints, costs=account, limit=100) as jobs:
        routes = JobRoutes(jobs, endpoints, account, Allowed.of(["hooks.local"]), **more)
        gateway = Gateway([routes], known, Metrics(), limits)
        yield Api(gateway.app(max_body_bytes=1 << 25, cors_origins=()), jobs, endpoint, store)


async def test_run_status_and_what_it_has_cost(store: Store) -> None:
    """The shapes are RunPod's; tokens are counted for the job's key, at its endpoint's prices."""
    async with api(store, ScriptedApp({CHAT: whole(id="x")})) as asked:
        job_id = await asked.run()
        body = await asked.ended(job_id)
        usage = await store.read(lambda connection: connection.execute(USAGE.select()).one())
    assert job_id.endswith("-u1")
    assert set(body) == {"delayTime", "executionTime", "id", "output", "status"}
    assert (body["id"], body["status"], body["output"]) == (job_id, "COMPLETED", [{**used(), "id": "x"}])
    assert all(isinstance(body[name], int) for name in ("delayTime", "executionTime"))
    assert (usage.key_id, usage.endpoint, usage.model) == ("key_one", "local", "m")
    assert (usage.requests, usage.prompt_tokens, usage.completion_tokens, usage.cost_nano) == (1, 3, 2, 14)


async def test_runsync_is_answered_with_what_came_of_it(store: Store) -> None:
    """Or with how it stands after `wait`."""
    async with api(store, ScriptedApp({CHAT: [whole(), Script((Pause("here"),))]})) as asked:
        status, body = await asked.ask("POST", "runsync", {"input": INPUT})
        assert (status, body["id"][:5], body["status"], body["output"]) == (
            200,
            "sync-",
            "COMPLETED",
            [used()],
        )
        status, body = await asked.ask("POST", "runsync?wait=1000", {"input": INPUT})
        assert (status, body["status"], "output" in body) == (200, "IN_PROGRESS", False)


async def test_results_are_kept_as_long_as_runpod_does(store: Store) -> None:
    """30 minutes of `/run`, one of `/runsync`; `?ttl=` shortens it."""
    async with api(store, ScriptedApp({CHAT: [whole(), whole()]})) as asked:
        _, sync = await asked.ask("POST", "runsync", {"input": INPUT})
        job_id = await asked.run()
        await asked.ended(job_id)
        for name, kept_s in ((sync["id"], 60), (job_id, 1800)):
            job = await asked.jobs.find(name)
            assert job is not None
            assert job.ended_at is not None
            assert job.expires_at == job.ended_at + kept_s
        await asked.ask("GET", f"status/{job_id}?ttl=6000")
        job = await asked.jobs.find(job_id)
        assert job is not None
        assert job.expires_at is not None
        assert job.expires_at <= time.time() + 6
        assert (await asked.ask("GET", f"status/{job_id}?ttl=0"))[0] == 200
        status, body = await asked.ask("GET", f"status/{job_id}")
    assert (status, body["error"]["code"]) == (404, "job_not_found")


async def test_a_stream_is_polled(store: Store) -> None:
    """As RunPod's client reads it; the attempt is told, because another one begins anew."""
    async with api(store, ScriptedApp({CHAT: frames("a")})) as asked:
        streamed = {**INPUT, "openai_input": {"model": "m", "messages": [], "stream": True}}
        job_id = await asked.run(job_input=streamed)
        outputs: list[str] = []
        while True:
            _, part = await asked.ask("GET", f"stream/{job_id}")
            assert (set(part), part["attempt"]) == ({"attempt", "status", "stream"}, 1)
            outputs += [one["output"] for one in part["stream"]]
            if part["status"] == "COMPLETED" and not part["stream"]:
                break
    assert "".join(outputs).endswith('"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n')


async def test_cancel_retry_purge_and_health(store: Store) -> None:
    """A job that has ended is not cancelled any more, and only one that failed is tried again."""
    app = ScriptedApp({CHAT: [Script((Pause("here"),)), answer({"error": {"message": "no"}}, 500), whole()]})
    async with api(store, app, workers=lambda _: worker_counts([("ready", 1), ("starting", 0)])) as asked:
        first = await asked.run()
        await app.gate("here").reached.wait()
        assert await asked.ask("POST", f"cancel/{first}") == (200, {"id": first, "status": "CANCELLED"})
        assert await asked.ask("POST", f"cancel/{first}") == (200, {"id": first, "status": "CANCELLED"})
        second = await asked.run()
        assert (await asked.ended(second))["status"] == "FAILED"
        assert await asked.ask("POST", f"retry/{second}") == (200, {"id": second, "status": "IN_QUEUE"})
        assert (await asked.ended(second))["status"] == "COMPLETED"
        status, body = await asked.ask("POST", f"retry/{second}")
        assert (status, body["error"]["code"]) == (400, "job_not_retriable")
        asked.endpoint.gate = asyncio.Event()
        for _ in range(3):
            await asked.run()
        assert await asked.ask("GET", "health") == (
            200,
            {
                "jobs": {**NO_COUNTS, "completed": 1, "inQueue": 3},
                "workers": {
                    "idle": 0,
                    "initializing": 1,
                    "ready": 1,
                    "running": 1,
                    "throttled": 0,
                    "unhealthy": 0,
                },
            },
        )
        assert await asked.ask("POST", "purge-queue") == (200, {"removed": 3, "status": "completed"})
        asked.endpoint.gate.set()


async def test_a_job_is_its_keys(store: Store) -> None:
    """To another key it does not exist, an admin sees all; a queue is purged of one's own jobs."""
    async with api(store, ScriptedApp({CHAT: [whole()] * 2})) as asked:
        asked.endpoint.gate = asyncio.Event()
        mine, other = await asked.run(), await asked.run("few")
        for method, operation in (
            ("GET", "status"),
            ("GET", "stream"),
            ("POST", "cancel"),
            ("POST", "retry"),
        ):
            status, body = await asked.ask(method, f"{operation}/{mine}", key="few")
            assert (status, body["error"]["code"]) == (404, "job_not_found"), operation
        assert (await asked.ask("GET", f"status/{mine}", key="admin"))[0] == 200
        assert (await asked.ask("POST", "purge-queue"))[1]["removed"] == 1
        assert (await asked.ask("GET", f"status/{other}", key="few"))[1]["status"] == "IN_QUEUE"
        assert (await asked.ask("POST", "purge-queue", key="admin"))[1]["removed"] == 1
        asked.endpoint.gate.set()


async def test_a_keys_limits_and_models_hold_for_jobs(store: Store) -> None:
    """They are looked at when it submits; a job that nobody understands takes one of its requests too."""
    async with api(store, ScriptedApp({CHAT: whole()})) as asked:
        other = {**INPUT, "openai_input": {"model": "other", "messages": []}}
        status, body = await asked.ask("POST", "run", {"input": other}, key="few")
        assert (status, body["error"]["code"]) == (404, "model_not_found")
        listing = {"openai_route": "/v1/models", "openai_input": {}}
        status, body = await asked.ask("POST", "run", {"input": listing}, key="few")
        assert (status, body["error"]["code"]) == (400, "invalid_request"), "a job would tell them all"
        await asked.run("few")
        await asked.run("few", {"nothing": 1})
        status, body = await asked.ask("POST", "run", {"input": INPUT}, key="few")
        assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")


@pytest.mark.parametrize("name", ["idempotency-key", "x-idempotency-key"])
async def test_an_idempotency_key_is_answered_with_the_same_job(store: Store, name: str) -> None:
    """It does not count for the key's limits again; a body that differs is 422."""
    headers = ((name, "once"),)
    async with api(store, ScriptedApp({CHAT: whole()})) as asked:
        first = await asked.ask("POST", "run", {"input": INPUT}, key="few", headers=headers)
        await asked.ended(first[1]["id"], key="few")
        again = [
            await asked.ask("POST", "run", {"input": INPUT}, key="few", headers=headers) for _ in range(3)
        ]
        assert again == [(200, {"id": first[1]["id"], "status": "COMPLETED"})] * 3
        status, body = await asked.ask("POST", "run", {"input": {}}, key="few", headers=headers)
        assert (status, body["error"]["code"]) == (422, "idempotency_key_reused")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        ([], "input"),
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": {}, "policy": 1}, "policy"),
        ({"input": {}, "policy": {"lowPriority": 1}}, "policy.lowPriority"),
        ({"input": {}, "policy": {"executionTimeout": 4999}}, "policy.executionTimeout"),
        ({"input": {}, "policy": {"executionTimeout": 10**400}}, "policy.executionTimeout"),
        ({"input": {}, "policy": {"executionTimeout": True}}, "policy.executionTimeout"),
        ({"input": {}, "policy": {"ttl": 9999}}, "policy.ttl"),
        ({"input": {}, "policy": {"ttl": 604_800_001}}, "policy.ttl"),
        ({"input": {}, "policy": {"ttl": "1"}}, "policy.ttl"),
        ({"input": {}, "webhook": 1}, "webhook"),
        ({"input": {}, "webhook": "ftp://example.com/"}, "webhook"),
        ({"input": {}, "webhook": "https://"}, "webhook"),
        ({"input": {}, "webhook": "http://127.0.0.1/"}, "webhook"),
        ({"input": {}, "webhook": "http://[::ffff:10.0.0.1]/"}, "webhook"),
        ({"input": {}, "webhook": "https://example.com/" + "x" * 2048}, "webhook"),
    ],
)
async def test_what_a_job_cant_be_made_of_is_400(store: Store, body: Any, param: str | None) -> None:
    """And says of what."""
    async with api(store, ScriptedApp({})) as asked:
        status, told = await asked.ask("POST", "run", body)
    assert (status, told["error"]["param"], told["error"]["code"]) == (400, param, "invalid_request")


async def test_policies_and_webhooks_are_taken(store: Store) -> None:
    """In milliseconds; what is not said is as on RunPod."""
    async with api(store, ScriptedApp({CHAT: [whole()] * 2})) as asked:
        policy = {"executionTimeout": 5000, "ttl": 604_800_000, "lowPriority": True}
        body = {"input": INPUT, "policy": policy, "webhook": "http://hooks.local/x", "s3Config": {}}
        _, told = await asked.ask("POST", "run", body)
        job = await asked.jobs.find(told["id"])
        assert job is not None
        assert (job.execution_timeout_s, job.ttl_s, job.background, job.webhook) == (
            5,
            604_800,
            True,
            "http://hooks.local/x",
        )
        plain = await asked.jobs.find(await asked.run())
        assert plain is not None
        assert (plain.execution_timeout_s, plain.ttl_s, plain.background, plain.webhook) == (
            600,
            86_400,
            False,
            None,
        )


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "run", 405, "method_not_allowed"),
        ("GET", "cancel/x", 405, "method_not_allowed"),
        ("POST", "health", 405, "method_not_allowed"),
        ("GET", "status/x", 404, "job_not_found"),
        ("GET", "status/x\0", 404, "job_not_found"),
        ("POST", "cancel/\0x", 404, "job_not_found"),
        ("GET", "status", 404, "unknown_url"),
        ("GET", "status/x/y", 404, "unknown_url"),
        ("POST", "run/x", 404, "unknown_url"),
        ("POST", "runsync?wait=999", 400, "invalid_request"),
        ("POST", "runsync?wait=300001", 400, "invalid_request"),
        ("POST", "runsync?wait=ten", 400, "invalid_request"),
    ],
)
async def test_what_is_not_there(store: Store, method: str, path: str, status: int, code: str) -> None:
    """In OpenAI's shape, as everything else of the gateway."""
    async with api(store, ScriptedApp({})) as asked:
        got, body = await asked.ask(method, path)
    assert (got, body["error"]["code"]) == (status, code)


async def test_an_endpoint_that_is_not_there_is_404(store: Store) -> None:
    """With its name."""
    async with api(store, ScriptedApp({})) as asked:
        status, body = await asked.ask("GET", "../other/health")
    assert (status, body["error"]["code"]) == (404, "unknown_url")


@pytest.mark.parametrize(("operation", "limit"), [("run", 10 << 20), ("runsync", 20 << 20)])
async def test_a_job_that_is_too_large_is_413(store: Store, operation: str, limit: int) -> None:
    """By what its client announces, before it is read, and by what it sends."""
    announced = (("content-length", str(limit + 1)),)
    async with api(store, ScriptedApp({})) as asked:
        routes = JobRoutes(
            asked.jobs, {"local"}, Account(keys(), Limits(), lambda _: ("m", Prices())), Allowed()
        )
        head = Request("POST", f"/v2/local/{operation}", announced)
        for request in (head, replace(head, headers=(), body=b"x" * (limit + 1))):
            with pytest.raises(Exception, match=f"larger than {limit} bytes") as refused:
                routes.find(request)
            assert getattr(refused.value, "status", None) == 413


async def test_each_operation_has_runpods_limits(store: Store) -> None:
    """A key's own: another one is not turned away."""
    async with api(store, ScriptedApp({})) as asked:
        answers = [(await asked.ask("POST", "purge-queue"))[0] for _ in range(3)]
        assert answers == [200, 200, 429]
        assert (await asked.ask("POST", "purge-queue", key="admin"))[0] == 200


def test_rates_forget_what_is_ten_seconds_ago() -> None:
    """And hold only so many at once."""
    now = [0.0]
    rates = Rates(lambda: now[0])
    for n in range(LIMITS["cancel"].in_window):
        now[0] = n / 100
        with rates.counted("cancel", "e", "k"):
            pass
    with pytest.raises(RateLimited) as refused, rates.counted("cancel", "e", "k"):
        pass
    assert dict(refused.value.headers)["retry-after"] == "9"
    with rates.counted("cancel", "other", "k"), rates.counted("cancel", "e", "other"):
        pass
    now[0] = 10.0
    with rates.counted("cancel", "e", "k"):
        pass
    now[0] = 100.0
    held = [rates.counted("cancel", "e", "k") for _ in range(LIMITS["cancel"].at_once)]
    for one in held:
        one.__enter__()
    with pytest.raises(RateLimited), rates.counted("cancel", "e", "k"):
        pass
    held[0].__exit__(None, None, None)
    with rates.counted("cancel", "e", "k"):
        pass


async def test_the_stream_of_a_lost_attempt_begins_anew(store: Store) -> None:
    """What was told of the first is not taken for the second's."""
    script = Script((Say("data: 1\n\n"), Pause("here")), headers=EVENT_STREAM)
    app = ScriptedApp({CHAT: [script, script]})
    streamed = {**INPUT, "openai_input": {"model": "m", "messages": [], "stream": True}}
    async with api(store, app) as asked:
        job_id = await asked.run(job_input=streamed)
        _, before = await asked.ask("GET", f"stream/{job_id}")
    async with api(store, app) as asked:  # the gateway was restarted
        _, after = await asked.ask("GET", f"stream/{job_id}")
    expected = {"attempt": 1, "status": "IN_PROGRESS", "stream": [{"output": "data: 1\n\n"}]}
    assert (before, after) == (expected, {**expected, "attempt": 2})
