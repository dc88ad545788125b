"""A request that is refused before there is a worker gets what the worker would have said."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

from gateway.accounts.keys import Keys
from gateway.endpoints.admission import Admission
from handler import early
from handler.asgi import call_app
from handler.errors import NotAdmitted
from handler.messages import Headers, Request, read
from tests import gateways
from tests.pools import ScriptedPool
from tests.scripted_app import ScriptedApp
from tests.servers import KEY, MODEL, Stack

JSON = "application/json"
RIGHT: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    "completions": {"prompt": "Hi", "max_tokens": 1},
    "responses": {"input": "Hi", "max_output_tokens": 1},
    "messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    "messages/count_tokens": {"messages": [{"role": "user", "content": "Hi"}]},
}
"""Of each route that compares names a request that lacks nothing but the model."""

BODIES = {
    "empty": b"",
    "cut": b"{",
    "cut in a list": b'{"model": "tinychat", "messages": [',
    "single quotes": b"{'a': 1}",
    "two objects": b"{} {}",
    "an array": b'[1, {"a": 2}]',
    "a string": b'"x"',
    "half a character": b'"\\ud800"',
    "a number": b"5",
    "not a number": b"NaN",
    "a boolean": b"true",
    "null": b"null",
    "not UTF-8": b'{"a": "\xff"}',
    "a long number": b'{"a": ' + b"1" * 5000 + b"}",
    "deep": b"[" * 100_000,
}


WAITED = NotAdmitted("It waited.", retry_after_s=1, code="waited")


async def said_early(path: str, body: bytes, content_type: str | None) -> tuple[int, str | None, Any]:
    """Status, content type and body of a gateway's answer that has no worker yet."""
    check = partial(early.check, model=MODEL)
    pool = ScriptedPool(ScriptedApp({}))
    pool.refuse(WAITED)
    admission = Admission(pool, limit=1, queue_timeout_s=60, keep_alive_s=60, check=check)
    app = gateways.one(admission.call, Keys(KEY)).app(max_body_bytes=2**20, cors_origins=())
    headers: Headers = (("authorization", f"Bearer {KEY}"),)
    headers += (("content-type", content_type),) if content_type else ()
    async with call_app(app)(Request("POST", f"/v2/local/openai/v1/{path}", headers, body)) as reply:
        return reply.status, reply.header("content-type"), json.loads(await read(reply))


async def said_late(stack: Stack, path: str, body: bytes, content_type: str | None) -> tuple[int, str, Any]:
    """The same of the gateway with vLLM behind it."""
    headers = {"content-type": content_type} if content_type else {}
    async with stack.gateway.http() as http:
        reply = await http.post(path, content=body, headers=headers)
    return reply.status_code, reply.headers["content-type"], reply.json()


@pytest.mark.parametrize("path", sorted(RIGHT))
@pytest.mark.parametrize("name", ["other", "Tinychat", "tinychat ", 'a"b`c', "é🙂", "a\nb", "x" * 300])
async def test_an_unknown_model(name: str, path: str, stack: Stack) -> None:
    """Letter by letter, on every route that compares names."""
    body = json.dumps({"model": name, **RIGHT[path]}).encode()
    said = await said_early(path, body, JSON)
    assert said[0] == 404
    assert said == await said_late(stack, path, body, JSON)


@pytest.mark.parametrize("path", [*sorted(RIGHT), "tokenize", "detokenize"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
async def test_a_body_that_is_no_object(body: bytes, path: str, stack: Stack) -> None:
    """On every route of a model that generates."""
    said = await said_early(path, body, JSON)
    assert said[0] == 400
    assert said == await said_late(stack, path, body, JSON)


@pytest.mark.parametrize("content_type", [None, "text/plain", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("body", [b"{", b"{}"])
async def test_another_content_type(body: bytes, content_type: str | None, stack: Stack) -> None:
    """vLLM refuses it too."""
    said = await said_early("chat/completions", body, content_type)
    assert said[0] == 400
    assert said == await said_late(stack, "chat/completions", body, content_type)


@pytest.mark.parametrize(
    "change", [{}, {"model": MODEL}, {"model": None}, {"model": ""}], ids=["none", "right", "null", "empty"]
)
async def test_what_vllm_takes_is_not_refused(change: dict[str, Any], stack: Stack) -> None:
    """It waits."""
    body = json.dumps({**RIGHT["chat/completions"], **change}).encode()
    assert (await said_early("chat/completions", body, JSON))[2]["error"]["code"] == "waited"
    assert (await said_late(stack, "chat/completions", body, JSON))[0] == 200
