"""The admin API's keys and usage, and what a key of each kind may do."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date
from typing import Any

import pytest
from sqlalchemy import text

from gateway.accounts import usage
from gateway.accounts.clients import Clients
from gateway.accounts.key_table import Following
from gateway.accounts.keys import Keys
from gateway.accounts.limits import Limits
from gateway.accounts.metering import Metering
from gateway.accounts.usage import Entry, Prices
from gateway.admin import Admin
from gateway.app import Gateway, Part
from gateway.metrics import Metrics
from gateway.parts import OpenAI
from gateway.store import Store
from handler.asgi import App, call_app
from handler.messages import Headers, Request, read
from tests import gateways
from tests.scripted_app import ScriptedApp, answer

ADMIN = "admin-key"
JSON: Headers = (("content-type", "application/json"),)
LISTING = {"object": "list", "data": [{"id": "m"}, {"id": "lora"}]}
CHAT = "/v2/one/openai/v1/chat/completions"


class Place:
    """A gateway of two endpoints with a database, whose admin key is `ADMIN`."""

    def __init__(self, app: App, store: Store, scripted: ScriptedApp) -> None:
        self.app = app
        self.store = store
        self.scripted = scripted

    async def ask(
        self, method: str, path: str, body: object = None, *, key: str = ADMIN, headers: Headers = JSON
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON (or text) of an answer."""
        path, _, query = path.partition("?")
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        head = (("authorization", f"Bearer {key}"), *headers)
        async with call_app(self.app)(Request(method, path, head, raw, query)) as reply:
            raw = await read(reply)
            is_json = "json" in (reply.header("content-type") or "")
            return reply.status, dict(reply.headers), json.loads(raw) if is_json else raw.decode()

    async def key(self, **fields: Any) -> str:
        """A new key."""
        status, _, made = await self.ask("POST", "/admin/keys", {"name": "k", **fields})
        assert status == 201, made
        return str(made["key"])


@asynccontextmanager
async def opened(database_url: str) -> AsyncIterator[Place]:
    """The gateway, and its database."""
    store = Store.open(database_url)
    keys, limits = Keys(ADMIN), Limits(lambda: 0.0)
    following = Following(keys, store)
    scripted = ScriptedApp(
        {
            "POST /v1/chat/completions": answer({"model": "m", "usage": {"prompt_tokens": 5}}),
            "POST /v1/audio/transcriptions": answer({}),
            "GET /v1/models": answer(LISTING),
            "GET /v1/models/m": answer({"id": "m"}),
        },
        repeat=True,
    )
    metering = Metering(store, keys, limits)
    clients = Clients(keys, limits, metering)
    endpoints = {
        name: gateways.endpoint(
            call_app(scripted),
            name,
            call=clients.call(call_app(scripted), endpoint_id=name, model_id="m", prices=Prices()),
        )
        for name in ("one", "two")
    }
    parts: list[Part] = [OpenAI(endpoints), Admin(store, following)]
    app = Gateway(parts, keys, Metrics(), limits).app(max_body_bytes=2000, cors_origins=())
    try:
        async with metering:
            yield Place(app, store, scripted)
    finally:
        store.close()


@pytest.fixture
async def place(database_url: str) -> AsyncIterator[Place]:
    """One of the test's own."""
    async with opened(database_url) as place:
        yield place


async def test_a_key_is_shown_once_and_opens_until_it_is_revoked(place: Place) -> None:
    """Made, listed and revoked; this gateway knows at once."""
    status, headers, made = await place.ask("POST", "/admin/keys", {"name": "a", "requests_per_minute": 5})
    assert (status, headers["cache-control"]) == (201, "no-store")
    key = made.pop("key")
    status, _, listed = await place.ask("GET", "/admin/keys")
    assert (status, listed) == (200, {"data": [made]})
    assert made["requests_per_minute"] == 5
    assert (await place.ask("POST", CHAT, {}, key=key))[0] == 200
    status, _, gone = await place.ask("DELETE", f"/admin/keys/{made['id']}")
    assert (status, gone["id"], gone["revoked_at"] is None) == (200, made["id"], False)
    assert (await place.ask("POST", CHAT, {}, key=key))[0] == 401


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("PUT", "/admin/keys", {}, (405, "method_not_allowed")),
        ("GET", "/admin/keys/x", None, (405, "method_not_allowed")),
        ("POST", "/admin/usage", {}, (405, "method_not_allowed")),
        ("DELETE", "/admin/keys/x", None, (404, "key_not_found")),
        ("DELETE", "/admin/keys/x\0", None, (404, "key_not_found")),
        ("DELETE", "/admin/keys/env", None, (400, "key_is_set")),
        ("POST", "/admin/keys", b"{", (400, "invalid_request")),
        ("POST", "/admin/keys", [], (400, "invalid_request")),
        ("POST", "/admin/keys", {"name": ""}, (400, "invalid_key")),
        ("GET", "/admin/usage?from=yesterday&group=colour&x=1", None, (400, "invalid_question")),
        ("GET", "/admin/usage?format=xml", None, (400, "invalid_question")),
        ("GET", "/admin/usage?from=2026-11-27&to=2026-11-26", None, (400, "invalid_question")),
        ("GET", "/admin/nothing", None, (404, "unknown_url")),
    ],
)
async def test_what_is_wrong_is_told(
    place: Place, method: str, path: str, body: object, expected: tuple[int, str]
) -> None:
    """In OpenAI's shape."""
    status, _, answered = await place.ask(method, path, body)
    assert (status, answered["error"]["code"]) == expected


@pytest.mark.parametrize("path", ["/admin/keys", "/admin/usage", "/admin/nothing", "/admin"])
async def test_only_an_admin_comes_in(place: Place, path: str) -> None:
    """Whether there is such a route or not; for the key check the body is not looked at."""
    key = await place.key()
    status, _, answered = await place.ask("POST", path, b"x" * 5000, key=key)
    assert (status, answered["error"]["type"], answered["error"]["code"]) == (
        403,
        "permission_error",
        "forbidden",
    )
    status, _, answered = await place.ask("POST", path, b"x" * 5000, key="wrong")
    assert (status, answered["error"]["code"]) == (401, "invalid_api_key")


async def test_an_endpoint_that_a_key_may_not_use_is_not_there(place: Place) -> None:
    """Its answer is that of one that does not exist, on every route below it."""
    key = await place.key(endpoints=["one"])
    assert (await place.ask("POST", CHAT, {}, key=key))[0] == 200
    for path in ("/v2/two/openai/v1/models", "/v2/two/run", "/v2/two", "/v2/none/openai/v1/models"):
        status, _, answered = await place.ask("GET", path, key=key)
        name = path.split("/")[2]
        assert (status, answered["error"]["message"]) == (404, f"The endpoint `{name}` does not exist.")


FORM = (("content-type", "multipart/form-data; boundary=B"),)


def form(*models: str) -> bytes:
    """A form with those models and a file that mentions another."""
    parts = [f'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\n{name}\r\n' for name in models]
    file = '--B\r\nContent-Disposition: form-data; name="file"; filename="model"\r\n\r\nmodel=lora\r\n'
    return ("".join(parts) + file + "--B--\r\n").encode()


@pytest.mark.parametrize(
    ("path", "headers", "body", "status"),
    [
        ("chat/completions", JSON, {"model": "lora"}, 200),
        ("chat/completions", JSON, {"model": "m"}, 404),
        ("chat/completions", JSON, {"model": "LORA"}, 404),
        ("chat/completions", JSON, {"model": ["lora"]}, 404),
        ("chat/completions", JSON, {}, 404),
        ("chat/completions", JSON, {"model": None}, 404),
        ("chat/completions", JSON, b'{"model": "lora", "model": "m"}', 404),
        ("chat/completions", JSON, b"{", 400),
        ("chat/completions", (), {"model": "lora"}, 400),
        ("audio/transcriptions", FORM, form("lora"), 200),
        ("audio/transcriptions", FORM, form("m"), 404),
        ("audio/transcriptions", FORM, form(), 404),
        ("audio/transcriptions", FORM, form("lora", "m"), 400),
        ("audio/transcriptions", JSON, b'{"model": "lora"}', 400),
    ],
)
async def test_a_key_asks_its_models_only(
    place: Place, path: str, headers: Headers, body: object, status: int
) -> None:
    """What names none asks the endpoint's own, and what can't be read is refused."""
    key = await place.key(models=["lora"])
    got, _, answered = await place.ask("POST", f"/v2/one/openai/v1/{path}", body, key=key, headers=headers)
    assert got == status, answered
    if status == 404:
        assert (answered["error"]["code"], answered["error"]["param"]) == ("model_not_found", "model")
    assert len(place.scripted.seen) == (status == 200)


async def test_a_key_sees_its_models_only(place: Place) -> None:
    """In the list and by name; another key sees all."""
    for models, listed, one in ((["m"], [{"id": "m"}], 200), (["lora"], [{"id": "lora"}], 404)):
        key = await place.key(name=models[0], models=models)
        _, _, listing = await place.ask("GET", "/v2/one/openai/v1/models", key=key)
        assert (listing["data"], listing["object"]) == (listed, "list")
        assert (await place.ask("GET", "/v2/one/openai/v1/models/m", key=key))[0] == one
    assert (await place.ask("GET", "/v2/one/openai/v1/models"))[2] == LISTING


async def test_every_answer_to_a_limited_key_says_how_it_stands(place: Place) -> None:
    """Refusals too; what asks for no tokens takes no request; keys without limits hear nothing of it."""
    key = await place.key(requests_per_minute=2, tokens_per_minute=100)
    names = ("x-ratelimit-remaining-requests", "x-ratelimit-remaining-tokens", "retry-after")
    said = []
    for method, path in (
        ("POST", CHAT),
        ("GET", "/v2/one/openai/v1/models"),
        ("GET", "/v2/nothing"),
        ("GET", "/admin/keys"),
        ("POST", CHAT),
        ("POST", CHAT),
    ):
        status, headers, _ = await place.ask(method, path, {"model": "m"}, key=key)
        said.append((status, *(headers.get(name) for name in names)))
    assert said == [
        (200, "1", "100", None),  # the answer's tokens are known at its end
        (200, "1", "95", None),
        (404, "1", "95", None),
        (403, "1", "95", None),
        (200, "0", "95", None),
        (429, "0", "90", "30"),
    ]
    _, headers, _ = await place.ask("POST", CHAT, {})
    assert not [name for name in headers if name.startswith("x-ratelimit")]


async def test_usage_is_answered_by_day_key_endpoint_and_model(place: Place) -> None:
    """With filters, sums and CSV; a key is known by its name after it is revoked."""
    await place.key(name="a")
    _, _, listed = await place.ask("GET", "/admin/keys")
    key_id = listed["data"][0]["id"]
    entries = [
        (Entry(key_id, "one", "m", 10, 20, 1_500_000_000), date(2027, 1, 1)),
        (Entry(key_id, "one", "m", 1, 2, 1), date(2027, 1, 1)),
        (Entry(key_id, "two", "m", 100, 200, 7), date(2027, 1, 2)),
        (Entry("env", "one", "lora", 5, 5, 0, requests=3), date(2027, 1, 2)),
        (Entry("door", "one", "m", 2, 4, 0), date(2027, 1, 3)),
    ]
    for entry, day in entries:
        place.store.write_now(lambda c, e=entry, d=day: usage.add(c, e, d))  # type: ignore[misc]
    await place.ask("DELETE", f"/admin/keys/{key_id}")
    _, _, everything = await place.ask("GET", "/admin/usage")
    assert everything == {
        "data": [
            row("2027-01-01", key_id, "a", "one", "m", (2, 11, 22, 1.500000001)),
            row("2027-01-02", "env", "API_KEY", "one", "lora", (3, 5, 5, 0)),
            row("2027-01-02", key_id, "a", "two", "m", (1, 100, 200, 7e-9)),
            row("2027-01-03", "door", "this machine", "one", "m", (1, 2, 4, 0)),
        ],
        "totals": {"requests": 7, "prompt_tokens": 118, "completion_tokens": 231, "cost": 1.500000008},
    }
    for query, sums in {
        "key=this+machine": [1, 2, 4],
        "key=door": [1, 2, 4],
        "from=2027-01-02&key=a": [1, 100, 200],
        f"to=2027-01-01&key={key_id}&endpoint=one&model=m": [2, 11, 22],
        "key=API_KEY&endpoint=": [3, 5, 5],
        "key=env": [3, 5, 5],
        "key=nobody": [0, 0, 0],
    }.items():
        _, _, answered = await place.ask("GET", f"/admin/usage?{query}")
        totals = answered["totals"]
        assert [totals[name] for name in ("requests", "prompt_tokens", "completion_tokens")] == sums, query
    _, headers, table = await place.ask("GET", "/admin/usage?group=endpoint,key&format=csv")
    assert headers["content-type"] == "text/csv; charset=utf-8"
    assert table.splitlines() == [
        "endpoint,key_id,key_name,requests,prompt_tokens,completion_tokens,cost",
        "one,door,this machine,1,2,4,0.00",
        "one,env,API_KEY,3,5,5,0.00",
        f"one,{key_id},a,2,11,22,1.500000001",
        f"two,{key_id},a,1,100,200,0.000000007",
    ]


async def test_a_database_that_fails_is_told_as_what_passes(place: Place) -> None:
    """Clients come again; what the database has said is not for them."""
    place.store.write_now(lambda connection: connection.execute(text("ALTER TABLE keys RENAME TO away")))
    status, headers, body = await place.ask("POST", "/admin/keys", {"name": "a"})
    assert (status, body["error"]["code"], headers["retry-after"]) == (503, "storage_unavailable", "5")
    assert "keys" not in body["error"]["message"]


async def test_no_cell_is_a_formula(place: Place) -> None:
    """Whatever a key is called, whoever opens the table in a spreadsheet runs nothing by it."""
    _, _, made = await place.ask("POST", "/admin/keys", {"name": "=1+2"})
    entry = Entry(made["id"], "one", "@m", 1, 2, 0)
    place.store.write_now(lambda connection: usage.add(connection, entry, date(2027, 1, 1)))
    _, _, table = await place.ask("GET", "/admin/usage?group=key,model&format=csv")
    assert table.splitlines()[1] == f"{made['id']},'=1+2,'@m,1,1,2,0.00"
    _, _, shown = await place.ask("GET", "/admin/usage?group=key")
    assert shown["data"][0]["key_name"] == "=1+2"


def row(
    day: str, key_id: str, key_name: str, endpoint: str, model: str, counts: tuple[int, int, int, float]
) -> dict[str, object]:
    """A row of the admin API's answer."""
    names = ("requests", "prompt_tokens", "completion_tokens", "cost")
    own = {"day": day, "key_id": key_id, "key_name": key_name, "endpoint": endpoint, "model": model}
    return {**own, **dict(zip(names, counts, strict=True))}
