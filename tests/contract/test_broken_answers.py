"""What goes wrong behind the edge, which vLLM can't be made to do at will, as the official client sees it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from handler import sse
from tests.contract import recorded
from tests.scripted_app import EVENT_STREAM, JSON, Fail, Pause, Say, Script, stream
from tests.servers import MODEL, Server

CONNECTED = pytest.mark.parametrize("server", ["scripted-worker", "scripted-gateway"], indirect=True)
WHOLE = pytest.mark.parametrize(
    "server", ["scripted-runpod", "scripted-lambda", "scripted-url"], indirect=True
)
"""The paths on which an answer that is no stream is sent once it is whole."""
EVERY = pytest.mark.parametrize(
    "server",
    ["scripted-worker", "scripted-gateway", "scripted-runpod", "scripted-lambda", "scripted-url"],
    indirect=True,
)
TOLD = pytest.mark.parametrize(
    "server", ["scripted-worker", "scripted-gateway", "scripted-runpod"], indirect=True
)
"""The paths on which it is told that a client has left: Lambda tells a function nothing."""

CHAT = "POST /v1/chat/completions"
BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
DIED = json.dumps(
    {"error": {"message": "EngineCore encountered an issue.", "type": "x", "param": None, "code": 500}}
)
MANY = "\u00e9\U0001f600" * 20_000
OVERLOADED = recorded.error("The queue is full.", 503, "Service Unavailable")
FAILED = recorded.error("oops", 500, "InternalServerError")


@EVERY
@pytest.mark.scripts({CHAT: stream(recorded.ROLE, *recorded.DELTAS, DIED, recorded.LAST)})
async def test_an_error_in_mid_stream_is_raised_after_the_words(server: Server) -> None:
    """The client has what was said and an `APIError` without a status, which it does not try again."""
    async with server.client().with_options(max_retries=2) as client:
        answer = await client.chat.completions.create(**BODY, stream=True)
        said = [(await anext(answer)).choices[0].delta.content for _ in range(len(recorded.WORDS))]
        with pytest.raises(openai.APIError) as raised:
            await anext(answer)
    assert said == ["", *recorded.WORDS[:-1]]
    assert not isinstance(raised.value, openai.APIStatusError)
    assert raised.value.body == {
        "message": "EngineCore encountered an issue.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }


@EVERY
@pytest.mark.scripts({CHAT: Script((Say(f"data: {recorded.ROLE}\n\ndata: cut"), Fail()), 200, EVENT_STREAM)})
async def test_a_stream_that_breaks_off_says_so(server: Server) -> None:
    """Its bytes end with one whole error frame, without `[DONE]` and without the half frame."""
    async with server.http() as http:
        reply = await http.post("chat/completions", json={**BODY, "stream": True})
    first, last = sse.split(reply.content)
    assert (reply.status_code, sse.data(first)["object"]) == (200, "chat.completion.chunk")
    assert sse.data(last)["error"]["code"] == "internal_error"


@CONNECTED
@pytest.mark.scripts({CHAT: Script((Say('{"id": "chatcmpl-1", '), Pause("a"), Fail()), 200, JSON)})
async def test_an_answer_that_breaks_off_is_no_answer(server: Server, scripted: Any) -> None:
    """Half a JSON body under a 200 would be taken for a whole one: the connection is cut instead."""
    scripted.gate("a").opened.set()
    async with server.client() as client:
        with pytest.raises(openai.APIConnectionError):
            await client.chat.completions.create(**BODY)


@WHOLE
@pytest.mark.scripts({CHAT: Script((Say('{"id": "chatcmpl-1", '), Pause("a"), Fail()), 200, JSON)})
async def test_an_answer_that_is_sent_whole_and_breaks_off_is_a_502(server: Server, scripted: Any) -> None:
    """A job and an invocation are answered whole or not at all: there is still a status to say it with."""
    scripted.gate("a").opened.set()
    async with server.client() as client:
        with pytest.raises(openai.InternalServerError) as raised:
            await client.chat.completions.create(**BODY)
    assert (raised.value.status_code, raised.value.code) == (502, "upstream_failed")


@EVERY
@pytest.mark.scripts({CHAT: Script((Fail(),))})
async def test_a_failure_is_a_500_in_openais_shape(server: Server) -> None:
    """With a request id to find it by in the log, and without its details."""
    async with server.client() as client:
        with pytest.raises(openai.InternalServerError) as raised:
            await client.chat.completions.create(**BODY)
    assert raised.value.body == {
        "message": "The engine failed while it answered this request.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert raised.value.request_id


@EVERY
@pytest.mark.scripts({CHAT: OVERLOADED})
async def test_a_full_queue_is_a_503_that_says_when(server: Server) -> None:
    """The client's own retries wait that long."""
    async with server.client() as client:
        with pytest.raises(openai.InternalServerError) as raised:
            await client.chat.completions.create(**BODY)
    assert (raised.value.status_code, raised.value.code) == (503, "overloaded")
    assert raised.value.response.headers["retry-after"] == "5"


@EVERY
@pytest.mark.scripts({CHAT: [FAILED, recorded.chat()]})
async def test_the_client_tries_again_after_a_500(server: Server) -> None:
    """As it does with OpenAI: the second answer is what the program sees."""
    async with server.client().with_options(max_retries=1) as client:
        reply = await client.chat.completions.create(**BODY)
    assert reply.choices[0].message.content == "".join(recorded.WORDS)


@EVERY
@pytest.mark.scripts({CHAT: stream(MANY)})
async def test_characters_of_many_bytes_arrive_whole(server: Server) -> None:
    """However large a frame is, and through however many reads it comes."""
    async with server.http() as http:
        reply = await http.post("chat/completions", json={**BODY, "stream": True})
    assert reply.content == f"data: {MANY}\n\ndata: [DONE]\n\n".encode()


@TOLD
@pytest.mark.scripts({CHAT: Script((Pause("never"),))})
async def test_a_client_that_leaves_is_noticed_by_the_application(server: Server, scripted: Any) -> None:
    """Through every hop, before anything was answered."""
    async with server.client() as client:
        asking = asyncio.create_task(client.chat.completions.create(**BODY))
        await scripted.gate("never").reached.wait()
        asking.cancel()
        await asyncio.wait({asking})
        assert asking.cancelled()
        await scripted.seen[0].over.wait()
    assert scripted.seen[0].ended == "disconnected"
