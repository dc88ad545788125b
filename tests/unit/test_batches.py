"""Batches over a real database and folder: every line is answered once, and counted once."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select
from sqlalchemy.exc import OperationalError

from gateway.accounts import usage
from gateway.accounts.keys import Key, Keys
from gateway.batches import results as batch_results
from gateway.batches import runs as batch_runs
from gateway.batches import table as batch_table
from gateway.batches.routes import Batches
from gateway.batches.run import Means
from gateway.batches.runs import BatchRuns
from gateway.files.routes import Files
from gateway.files.store import File, FileStore, new_id, put
from gateway.store import Store
from handler import batch_ask, batch_lines, early
from handler.errors import DeadlineExceeded, NotAdmitted, RequestError, UpstreamFailed, retry_after
from handler.messages import Reply, Request, Visit, once, read
from tests import gateways
from tests.asgi_client import turns

BASE = "/v2/local/openai/v1"
CHAT = "/v1/chat/completions"


def line(custom_id: str, **changes: Any) -> dict[str, Any]:
    """One request of a batch; its answer is its `custom_id`."""
    body = {"model": "m", "messages": [{"role": "user", "content": custom_id}], **changes.pop("body", {})}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body, **changes}


@dataclass
class Endpoint:
    """Answers a line with its own text and 3 + 2 tokens. `bad` texts are a 400; one of `gates` waits."""

    bad: set[str] = field(default_factory=set)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    reached: dict[str, asyncio.Event] = field(default_factory=dict)
    failures: dict[str, list[RequestError]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    running: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, asked: str) -> None:
        """Return once that line was asked, and all have been answered but the one at a gate."""
        while self.asked[-1] != asked or self.running > 1:
            self.news.clear()
            await self.news.wait()

    def gate(self, text: str) -> asyncio.Event:
        """Where the line with `text` waits."""
        self.reached[text] = asyncio.Event()
        return self.gates.setdefault(text, asyncio.Event())

    @asynccontextmanager
    async def ask(self, request: Request) -> AsyncIterator[Reply]:
        """A `Call`."""
        text = json.loads(request.body)["messages"][0]["content"]
        self.asked.append(text)
        self.visits.append(request.visit)
        self.running += 1
        try:
            if text in self.gates:
                self.reached[text].set()
                await self.gates[text].wait()
            if self.failures.get(text):
                raise self.failures[text].pop(0)
            if text in self.bad:
                yield Reply(400, (), once(b'{"error":{"message":"bad","code":"invalid_request"}}'))
                return
            answer = {"text": text, "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
            yield Reply(200, (), once(json.dumps(answer).encode()))
        except asyncio.CancelledError:
            self.cancelled.append(text)
            raise
        finally:
            self.running -= 1
            self.news.set()


class Place:
    """A gateway's database and folder, and what runs on it; `now` is its clock."""

    def __init__(self, folder: Path, database_url: str) -> None:
        self.store = Store.open(database_url)
        self.folder = folder / "files"
        self.now = 1_000_000.0
        self.endpoint = Endpoint()
        served = gateways.endpoint(self.endpoint.ask, capacity=2)
        self.endpoints = {"local": replace(served, refuse=partial(early.check, model="m"))}
        self.stored = [Key("k1", "one", b"1"), Key("k2", "two", b"2"), Key("boss", "boss", b"3", admin=True)]
        self.keys = Keys(None, self.stored, clock=lambda: self.now)

    @asynccontextmanager
    async def gateway(self) -> AsyncIterator[BatchRuns]:
        """One life of it."""
        files = FileStore(
            self.store, self.folder, max_file_bytes=1 << 30, max_stored_bytes=1 << 30, now=lambda: self.now
        )
        async with BatchRuns(Means(self.store, files, self.keys, self.endpoints, 10_000)) as runs:
            self.runs, self.files = runs, files
            self.parts = (
                Files(files, self.endpoints, self.keys, batch_table.check_delete),
                Batches(runs, self.endpoints, self.keys),
            )
            yield runs

    async def ask(
        self, method: str, path: str, body: object = None, *, key: str = "k1", query: str = ""
    ) -> tuple[int, Any]:
        """Status and body of an answer."""
        raw = b"" if body is None else json.dumps(body).encode()
        headers = (("content-type", "application/json"),)
        request = Request(method, BASE + path, headers, raw, query, Visit(caller=key))
        try:
            call = next(filter(None, (part.find(request) for part in self.parts)))
            async with call(request) as reply:
                raw = await read(reply)
        except RequestError as error:
            return error.status, error.body()["error"]
        return reply.status, json.loads(raw) if reply.header("content-type") == "application/json" else raw

    async def upload(self, *lines: object, key: str = "k1", purpose: str = "batch") -> str:
        """The id of a file of lines."""
        raw = b"".join((one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n" for one in lines)
        with self.files.draft() as draft:
            await draft.write(raw)
            file = await self.files.keep(
                draft, key_id=key, purpose=purpose, filename="in.jsonl", expires_in_s=3600
            )
        return file.id

    async def create(self, *lines: object, key: str = "k1", **changes: Any) -> dict[str, Any]:
        """A batch of these lines."""
        file_id = await self.upload(*lines, key=key)
        wanted = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **changes}
        status, batch = await self.ask("POST", "/batches", wanted, key=key)
        assert status == 200, batch
        return dict(batch)

    async def over(self, batch: Mapping[str, Any], key: str = "k1") -> dict[str, Any]:
        """The batch once it is over."""
        async with asyncio.timeout(60):
            while True:
                _, found = await self.ask("GET", f"/batches/{batch['id']}", key=key)
                if found["status"] in {"completed", "failed", "cancelled", "expired"}:
                    return dict(found)

    async def lines(self, file_id: str | None, key: str = "k1") -> list[dict[str, Any]]:
        """The lines of a file of results."""
        if file_id is None:
            return []
        status, raw = await self.ask("GET", f"/files/{file_id}/content", key=key)
        assert status == 200, raw
        return [json.loads(one) for one in raw.splitlines()]

    def used(self) -> list[tuple[Any, ...]]:
        """What was counted: key, endpoint, model, requests, tokens."""
        table = usage.USAGE.c
        columns = (table.key_id, table.endpoint, table.model, table.requests)
        wanted = select(*columns, table.prompt_tokens, table.completion_tokens).order_by(table.key_id)
        return [
            tuple(row) for row in self.store.read_now(lambda connection: connection.execute(wanted).all())
        ]


@pytest.fixture
async def place(tmp_path: Path, database_url: str) -> AsyncIterator[Place]:
    """An empty one, whose gateway is not started."""
    place = Place(tmp_path, database_url)
    yield place
    place.store.close()


@pytest.fixture
async def running(place: Place) -> AsyncIterator[Place]:
    """One whose gateway runs."""
    async with place.gateway():
        yield place


def texts(lines: list[dict[str, Any]]) -> list[str]:
    """What was answered, in the order of the file."""
    return [line["response"]["body"]["text"] for line in lines]


async def test_every_line_is_answered_in_the_order_of_the_input(running: Place) -> None:
    """The object and the lines are OpenAI's, and what was used is on the key's account."""
    begun = await running.create(*(line(str(n)) for n in range(20)), metadata={"a": "b"})
    assert (begun["status"], begun["object"], begun["request_counts"]["total"]) == ("validating", "batch", 0)
    batch = await running.over(begun)
    now = 1_000_000
    assert batch == {
        **begun,
        "status": "completed",
        "model": "m",
        "in_progress_at": now,
        "finalizing_at": now,
        "completed_at": now,
        "expires_at": now + 86_400,
        "output_file_id": batch["output_file_id"],
        "error_file_id": None,
        "request_counts": {"total": 20, "completed": 20, "failed": 0},
        "usage": {
            "input_tokens": 60,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 40,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 100,
        },
        "metadata": {"a": "b"},
    }
    lines = await running.lines(batch["output_file_id"])
    assert texts(lines) == [str(n) for n in range(20)]
    assert lines[3] == {
        "id": lines[3]["id"],
        "custom_id": "3",
        "response": {
            "status_code": 200,
            "request_id": lines[3]["id"],
            "body": {"text": "3", "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
        },
        "error": None,
    }
    _, file = await running.ask("GET", f"/files/{batch['output_file_id']}")
    assert (file["purpose"], file["filename"]) == ("batch_output", f"{batch['id']}_output.jsonl")
    assert running.used() == [("k1", "local", "m", 20, 60, 40)]
    assert {(visit.caller, visit.background) for visit in running.endpoint.visits} == {("k1", True)}
    assert {path.name for path in running.folder.iterdir()} == {
        batch["input_file_id"],
        batch["output_file_id"],
    }


async def test_no_more_lines_are_in_work_than_the_workers_take_and_one_that_waits(running: Place) -> None:
    """That one says that there is work for another worker."""
    for gate in "0123":
        running.endpoint.gate(gate)
    batch = await running.create(*(line(str(n)) for n in range(30)))
    await running.endpoint.reached["2"].wait()
    await turns()
    assert running.endpoint.asked == ["0", "1", "2"]
    for gate in "0123":
        running.endpoint.gates[gate].set()
    await running.over(batch)


async def test_more_lines_are_in_work_once_there_are_more_workers(running: Place) -> None:
    """One while there is none: the worker that starts for it is asked for more when it has answered."""
    for gate in "0123456":
        running.endpoint.gate(gate)
    served = running.endpoints["local"]
    running.endpoints["local"] = replace(served, workers=gateways.Workers(capacity=0))
    batch = await running.create(*(line(str(n)) for n in range(7)))
    await running.endpoint.reached["0"].wait()
    await turns()
    assert running.endpoint.asked == ["0"]
    running.endpoints["local"] = replace(served, workers=gateways.Workers(capacity=4))
    running.endpoint.gates["0"].set()
    await running.endpoint.reached["5"].wait()
    await turns()
    assert running.endpoint.asked == ["0", "1", "2", "3", "4", "5"]
    for gate in "123456":
        running.endpoint.gates[gate].set()
    assert (await running.over(batch))["request_counts"]["completed"] == 7


async def test_what_the_workers_refuse_is_among_the_errors(running: Place) -> None:
    """As their answer; it costs nothing."""
    running.endpoint.bad = {"1", "3"}
    batch = await running.over(await running.create(*(line(str(n)) for n in range(5))))
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 5, "completed": 3, "failed": 2}
    assert texts(await running.lines(batch["output_file_id"])) == ["0", "2", "4"]
    errors = await running.lines(batch["error_file_id"])
    assert [(one["custom_id"], one["response"]["status_code"]) for one in errors] == [("1", 400), ("3", 400)]
    assert errors[0]["response"]["body"]["error"]["code"] == "invalid_request"
    assert running.used() == [("k1", "local", "m", 3, 9, 6)]


async def test_a_line_is_asked_again_while_there_is_no_room_and_a_few_times_when_a_worker_was_lost(
    running: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first for as long as it takes."""
    monkeypatch.setattr(batch_ask, "BUSY_MAX_S", 0.0)
    monkeypatch.setattr("gateway.batches.run.PAUSE_S", 0.0)
    running.endpoint.failures = {
        "busy": [NotAdmitted("full", retry_after_s=1) for _ in range(9)],
        "late": [DeadlineExceeded("no turn", headers=retry_after(1)) for _ in range(9)],
        "slow": [DeadlineExceeded("too long") for _ in range(3)],
        "lost": [UpstreamFailed("lost"), UpstreamFailed("lost")],
        "broken": [UpstreamFailed("lost") for _ in range(3)],
    }
    batch = await running.over(await running.create(*map(line, running.endpoint.failures)))
    assert texts(await running.lines(batch["output_file_id"])) == ["busy", "late", "lost"]
    errors = await running.lines(batch["error_file_id"])
    assert [(one["custom_id"], one["response"]["status_code"]) for one in errors] == [
        ("slow", 504),
        ("broken", 502),
    ]
    assert Counter(running.endpoint.asked) == {"busy": 10, "late": 10, "slow": 3, "lost": 3, "broken": 3}


@pytest.mark.parametrize(
    ("lines", "faults"),
    [
        ([], [(None, "empty_file", None)]),
        ([b"", b"  "], [(None, "empty_file", None)]),
        ([b"no json", line("a"), b"[]"], [(1, "invalid_json_line", None), (3, "invalid_json_line", None)]),
        ([line("a"), line("b"), line("a")], [(3, "duplicate_custom_id", "custom_id")]),
        ([line("")], [(1, "invalid_custom_id", "custom_id")]),
        ([line("a", method="GET")], [(1, "invalid_method", "method")]),
        ([line("a"), b"", line("b", url="/v1/embeddings")], [(3, "url_mismatch", "url")]),
        ([line("a", url="/v1/nothing")], [(1, "unknown_url", None)]),
        ([line("a"), line("b", body={"model": "n"})], [(2, "model_mismatch", "body.model")]),
        ([line("a", body={"model": "n"}), line("b", body={"model": "n"})], [(1, "model_not_found", "model")]),
        ([line("a", body={"stream": True})], [(1, "invalid_request", "stream")]),
        ([line("a", body={"x": "x" * 20_000})], [(1, "request_too_large", None)]),
        ([line("a", body={"x": "x" * 200_000})], [(1, "request_too_large", None)]),
        (
            [{**line("a"), "body": 7}],
            [(1, "missing_required_parameter", "body")],
        ),
    ],
)
async def test_a_bad_line_fails_the_batch_before_anything_is_asked(
    running: Place, lines: list[object], faults: list[tuple[int | None, str, str | None]]
) -> None:
    """Every fault has its line, and the file of the batch is free again."""
    batch = await running.over(await running.create(*lines))
    assert batch["status"] == "failed"
    assert batch["failed_at"] == 1_000_000
    assert batch["errors"]["object"] == "list"
    assert [(one["line"], one["code"], one["param"]) for one in batch["errors"]["data"]] == faults
    assert batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert running.endpoint.asked == []
    assert (await running.ask("DELETE", f"/files/{batch['input_file_id']}"))[0] == 200
    assert list(running.folder.iterdir()) == []


async def test_a_file_has_at_most_so_many_requests(running: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at OpenAI."""
    monkeypatch.setattr("gateway.batches.check.REQUESTS_MAX", 3)
    batch = await running.over(await running.create(*(line(str(n)) for n in range(4))))
    assert [one["code"] for one in batch["errors"]["data"]] == ["too_many_tasks"]


async def test_not_every_fault_of_a_large_file_is_told(
    running: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones are."""
    monkeypatch.setattr("gateway.batches.check.FAULTS_MAX", 3)
    batch = await running.over(await running.create(*[b"no json"] * 9))
    assert [one["line"] for one in batch["errors"]["data"]] == [1, 2, 3]


async def test_a_key_asks_its_own_models_only(running: Place) -> None:
    """In a batch as anywhere."""
    running.keys.store([Key("k1", "one", b"1", models=frozenset({"other"}))])
    batch = await running.over(await running.create(line("a")))
    assert [one["code"] for one in batch["errors"]["data"]] == ["model_not_found"]


async def test_a_line_without_a_model_asks_the_endpoints(running: Place) -> None:
    """As a request does."""
    body = {"messages": [{"content": "a"}]}
    batch = await running.over(await running.create({**line("a"), "body": body}, line("b")))
    assert (batch["status"], batch["model"]) == ("completed", "m")


async def test_a_cancelled_batch_keeps_what_has_ended(running: Place) -> None:
    """What runs is stopped, and the rest is told that it was not asked."""
    running.endpoint.gate("1")
    batch = await running.create(*(line(str(n)) for n in range(9)))
    await running.endpoint.reached["1"].wait()
    await running.endpoint.until(asked="8")
    status, cancelling = await running.ask("POST", f"/batches/{batch['id']}/cancel")
    assert (status, cancelling["status"], cancelling["cancelling_at"]) == (200, "cancelling", 1_000_000)
    done = await running.over(batch)
    assert (done["status"], done["cancelled_at"]) == ("cancelled", 1_000_000)
    assert running.endpoint.cancelled == ["1"]
    assert texts(await running.lines(done["output_file_id"])) == ["0", *(str(n) for n in range(2, 9))]
    (error,) = await running.lines(done["error_file_id"])
    assert (error["custom_id"], error["response"], error["error"]["code"], error["error"]["line"]) == (
        "1",
        None,
        "batch_cancelled",
        2,
    )
    assert running.used() == [("k1", "local", "m", 8, 24, 16)]
    status, error = await running.ask("POST", f"/batches/{batch['id']}/cancel")
    assert (status, error["message"]) == (409, "Cannot cancel a batch with status 'cancelled'.")


async def test_a_batch_that_waits_for_its_turn_is_cancelled_at_once(running: Place) -> None:
    """Without waiting for that of another."""
    running.endpoint.gate("a")
    first = await running.create(line("a"))
    await running.endpoint.reached["a"].wait()
    second = await running.create(line("b"))
    await running.ask("POST", f"/batches/{second['id']}/cancel")
    done = await running.over(second)
    assert (done["status"], done["request_counts"]) == (
        "cancelled",
        {"total": 1, "completed": 0, "failed": 1},
    )
    running.endpoint.gates["a"].set()
    assert (await running.over(first))["status"] == "completed"
    assert running.endpoint.asked == ["a"]


async def test_batches_of_a_key_take_turns_and_those_of_two_do_not(running: Place) -> None:
    """A large one holds up its own key's only."""
    running.endpoint.gate("a")
    first = await running.create(line("a"))
    await running.endpoint.reached["a"].wait()
    second = await running.create(line("b"))
    others = await running.create(line("c"), key="k2")
    assert (await running.over(others, "k2"))["status"] == "completed"
    assert running.endpoint.asked == ["a", "c"]
    running.endpoint.gates["a"].set()
    assert (await running.over(first))["status"] == (await running.over(second))["status"] == "completed"


async def test_what_was_not_asked_in_time_has_expired(place: Place) -> None:
    """What has ended stays, the rest is told so."""
    async with place.gateway():
        place.endpoint.gate("1")
        batch = await place.create(line("0"), line("1"), line("2"))
        await place.endpoint.reached["1"].wait()
    place.now += 86_400
    async with place.gateway():
        done = await place.over(batch)
        assert (done["status"], done["expired_at"]) == ("expired", 1_086_400)
        errors = await place.lines(done["error_file_id"])
        outputs = await place.lines(done["output_file_id"])
    assert [one["error"]["code"] for one in errors] == ["batch_expired"] * len(errors)
    assert sorted(texts(outputs) + [one["custom_id"] for one in errors]) == ["0", "1", "2"]
    assert done["request_counts"]["completed"] == len(outputs)


async def test_the_next_gateway_goes_on_where_this_one_was(place: Place) -> None:
    """No line that was committed is asked again, and none is missing."""
    async with place.gateway():
        place.endpoint.gate("5")
        batch = await place.create(*(line(str(n)) for n in range(12)))
        await place.endpoint.reached["5"].wait()
        await place.endpoint.until(asked="11")
    before = list(place.endpoint.asked)
    place.endpoint.gates["5"].set()
    async with place.gateway():
        done = await place.over(batch)
        assert texts(await place.lines(done["output_file_id"])) == [str(n) for n in range(12)]
    assert sorted(before, key=int) == [str(n) for n in range(12)]
    assert place.endpoint.asked[len(before) :] == [
        str(n) for n in range(5, 12)
    ]  # 0 to 4 had ended without a gap
    assert place.used() == [("k1", "local", "m", 12, 36, 24)]


async def test_what_was_written_and_not_committed_is_written_anew(place: Place) -> None:
    """A gateway was killed between the two."""
    async with place.gateway():
        place.endpoint.gate("2")
        batch = await place.create(*(line(str(n)) for n in range(4)))
        await place.endpoint.reached["2"].wait()
    row = place.store.read_now(lambda connection: batch_table.one(connection, batch["id"]))
    with (place.folder / row.output_file_id).open("ab") as output:
        output.write(b'{"half of a li' * 1000)
    place.endpoint.gates["2"].set()
    async with place.gateway():
        done = await place.over(batch)
        assert texts(await place.lines(done["output_file_id"])) == ["0", "1", "2", "3"]


async def test_a_cancel_outlives_the_gateway(place: Place) -> None:
    """The next one does not ask the rest."""
    async with place.gateway() as runs:
        place.endpoint.gate("0")
        batch = await place.create(line("0"), line("1"))
        await place.endpoint.reached["0"].wait()
        runs.stop()
        assert (await place.ask("POST", f"/batches/{batch['id']}/cancel"))[1]["status"] == "cancelling"
    async with place.gateway():
        done = await place.over(batch)
    assert done["status"] == "cancelled"


async def test_a_batch_whose_results_are_gone_has_failed(place: Place) -> None:
    """It says so, and does not begin again: its key has paid."""
    async with place.gateway():
        place.endpoint.gate("1")
        batch = await place.create(line("0"), line("1"))
        await place.endpoint.reached["1"].wait()
    row = place.store.read_now(lambda connection: batch_table.one(connection, batch["id"]))
    assert row.output_bytes > 0
    (place.folder / row.output_file_id).unlink()
    async with place.gateway():
        done = await place.over(batch)
    assert (done["status"], done["errors"]["data"][0]["code"]) == ("failed", "file_not_found")


async def test_a_batch_that_meets_a_full_disk_waits(running: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again, and nothing is lost or counted twice."""
    monkeypatch.setattr(batch_runs, "AGAIN_S", 0.0)
    failures: list[Exception] = [OSError(28, "No space left on device")] * 3
    unreadable = [OperationalError("SELECT", {}, sqlite3.OperationalError("disk I/O error"))]
    one = batch_table.one

    def look(connection: Connection, batch_id: str) -> batch_table.Row:
        if unreadable:
            raise unreadable.pop()
        return one(connection, batch_id)

    monkeypatch.setattr(batch_table, "one", look)
    real = batch_results.Results.append

    def full(self: Any, *pieces: bytes) -> tuple[int, ...]:
        written = real(self, *pieces)
        if failures:
            raise failures.pop()
        return written

    monkeypatch.setattr(batch_results.Results, "append", full)
    batch = await running.over(await running.create(*(line(str(n)) for n in range(9))))
    assert failures == unreadable == []
    assert texts(await running.lines(batch["output_file_id"])) == [str(n) for n in range(9)]
    assert running.used() == [("k1", "local", "m", 9, 27, 18)]


async def test_the_batch_of_a_revoked_key_is_cancelled(running: Place) -> None:
    """Nothing more is asked for it."""
    running.endpoint.gate("0")
    running.endpoint.gate("1")
    running.endpoint.gate("2")
    batch = await running.create(*(line(str(n)) for n in range(6)))
    await running.endpoint.reached["2"].wait()
    running.keys.store([Key("k1", "one", b"1", revoked_s=1), running.stored[2]])
    running.endpoint.gates["0"].set()
    done = await running.over(batch, "boss")
    assert done["status"] == "cancelled"
    assert running.endpoint.asked == ["0", "1", "2"]
    assert texts(await running.lines(done["output_file_id"], "boss")) == ["0"]


async def test_an_endpoint_that_is_gone_is_waited_for(
    running: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reload may bring it back."""
    monkeypatch.setattr(batch_ask, "BUSY_MAX_S", 0.0)
    monkeypatch.setattr("gateway.batches.run.PAUSE_S", 0.0)
    running.endpoint.gate("0")
    batch = await running.create(line("0"), line("1"), line("2"), line("3"))
    await running.endpoint.reached["0"].wait()
    gone = running.endpoints.pop("local")
    running.endpoint.gates["0"].set()
    await asyncio.sleep(0)
    running.endpoints["local"] = gone
    assert (await running.over(batch))["request_counts"]["completed"] == 4


async def test_a_client_that_leaves_while_its_batch_is_made_leaves_one_that_runs(running: Place) -> None:
    """It was written down, so somebody has to work on it."""
    file_id = await running.upload(line("0"))
    blocked = threading.Event()
    blocking = asyncio.ensure_future(running.store.write(lambda _: blocked.wait()))
    wanted = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    creating = asyncio.ensure_future(running.ask("POST", "/batches", wanted))
    await turns()
    creating.cancel()
    await turns()
    blocked.set()
    await blocking
    with pytest.raises(asyncio.CancelledError):
        await creating
    (batch,) = (await running.ask("GET", "/batches"))[1]["data"]
    assert (await running.over(batch))["status"] == "completed"


async def test_a_file_in_use_is_neither_deleted_nor_expires(running: Place) -> None:
    """Until its batch is over."""
    running.endpoint.gate("0")
    batch = await running.create(line("0"))
    await running.endpoint.reached["0"].wait()
    status, error = await running.ask("DELETE", f"/files/{batch['input_file_id']}")
    assert (status, error["code"]) == (409, "conflict")
    running.now += 7200
    used = running.store.read_now(batch_table.inputs)
    assert set(await running.files.expired()) == used == {batch["input_file_id"]}
    running.endpoint.gates["0"].set()
    assert (await running.over(batch))["status"] == "completed"
    assert running.store.read_now(batch_table.inputs) == set()


async def test_results_expire_when_the_batch_says_so(running: Place) -> None:
    """From when they are there."""
    batch = await running.create(line("0"), output_expires_after={"anchor": "created_at", "seconds": 3600})
    done = await running.over(batch)
    assert (await running.ask("GET", f"/files/{done['output_file_id']}"))[1]["expires_at"] == 1_003_600


async def test_a_batch_is_its_keys_alone(running: Place) -> None:
    """Another key finds, cancels and reads nothing; an admin's does. Files of others make no batch."""
    batch = await running.over(await running.create(line("0")))
    for method, path in [("GET", ""), ("POST", "/cancel")]:
        status, error = await running.ask(method, f"/batches/{batch['id']}{path}", key="k2")
        assert (status, error["message"]) == (404, f"No batch found with id '{batch['id']}'.")
    assert (await running.ask("GET", "/batches", key="k2"))[1]["data"] == []
    assert (await running.ask("GET", f"/files/{batch['output_file_id']}", key="k2"))[0] == 404
    assert (await running.ask("GET", "/batches", key="boss"))[1]["data"] == [batch]
    wanted = {"input_file_id": batch["input_file_id"], "endpoint": CHAT, "completion_window": "24h"}
    status, error = await running.ask("POST", "/batches", wanted, key="k2")
    assert (status, error["param"], error["code"]) == (400, "input_file_id", "file_not_found")


async def test_a_list_of_batches_is_paged(running: Place) -> None:
    """The newest first."""
    ids = [(await running.over(await running.create(line("0"))))["id"] for _ in range(3)]
    page = (await running.ask("GET", "/batches", query="limit=2"))[1]
    assert ([one["id"] for one in page["data"]], page["has_more"]) == ([ids[2], ids[1]], True)
    page = (await running.ask("GET", "/batches", query=f"limit=2&after={page['last_id']}"))[1]
    assert ([one["id"] for one in page["data"]], page["has_more"]) == ([ids[0]], False)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input_file_id": None}, "input_file_id"),
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"input_file_id": "\ud800"}, "input_file_id"),
        ({"endpoint": None}, "endpoint"),
        ({"endpoint": "/v1/audio/transcriptions"}, "endpoint"),
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"endpoint": "/v1/files"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ({"output_expires_after": {"seconds": 3600}}, "output_expires_after.anchor"),
    ],
)
async def test_a_batch_that_can_t_be_made_is_refused(
    running: Place, changes: dict[str, Any], param: str
) -> None:
    """By the name of what is wrong."""
    file_id = await running.upload(line("0"))
    wanted = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **changes}
    status, error = await running.ask("POST", "/batches", wanted)
    assert (status, error["param"]) == (400, param)


async def test_a_file_for_something_else_makes_no_batch(running: Place) -> None:
    """Nor one that is too large."""
    wanted = {"endpoint": CHAT, "completion_window": "24h"}
    file_id = await running.upload(line("0"), purpose="user_data")
    status, error = await running.ask("POST", "/batches", {**wanted, "input_file_id": file_id})
    assert (status, error["code"]) == (400, "invalid_file_purpose")
    size_bytes = batch_lines.FILE_MAX_BYTES + 1
    large = File(new_id("file-"), "k1", "batch", "large", size_bytes, "0" * 64, 0, None)
    running.store.write_now(lambda connection: put(connection, large))
    status, error = await running.ask("POST", "/batches", {**wanted, "input_file_id": large.id})
    assert (status, error["code"]) == (400, "file_too_large")


async def test_a_key_has_so_many_batches_at_most(running: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """That are not over."""
    monkeypatch.setattr("gateway.batches.routes.UNFINISHED_MAX", 1)
    running.endpoint.gate("0")
    batch = await running.create(line("0"))
    wanted = {"input_file_id": batch["input_file_id"], "endpoint": CHAT, "completion_window": "24h"}
    status, error = await running.ask("POST", "/batches", wanted)
    assert (status, error["code"]) == (429, "too_many_batches")
    running.endpoint.gates["0"].set()
    await running.over(batch)
    assert (await running.ask("POST", "/batches", wanted))[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "", 405),
        ("DELETE", "/batch_1", 405),
        ("GET", "/batch_1/cancel", 405),
        ("GET", "/batch_1", 404),
        ("GET", "/batch_1\0", 404),
        ("POST", "/batch_\ud800/cancel", 404),
    ],
)
async def test_what_there_is_not(running: Place, method: str, path: str, status: int) -> None:
    """In the usual words."""
    assert (await running.ask(method, f"/batches{path}"))[0] == status
