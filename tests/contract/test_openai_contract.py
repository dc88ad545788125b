"""One scenario each: what the official client sees, whichever program and application answers.

The prompts make the small model say what is recorded at temperature 0, or nothing is
asserted of the words.
"""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from handler import sse
from tests.contract import recorded
from tests.scripted_app import Script
from tests.servers import MAX_MODEL_LEN, MODEL, Server

CHAT = "POST /v1/chat/completions"
COMPLETIONS = "POST /v1/completions"
MODELS = "GET /v1/models"

MESSAGES: Any = [
    {"role": "system", "content": "You are helpful."},
    {"role": "user", "content": "Hi"},
]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CHAT_BODY: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
COMPLETION_BODY: dict[str, Any] = {"model": MODEL, "prompt": "Hello", "max_tokens": 4, "temperature": 0}


def scripts(*pairs: tuple[str, Script]) -> pytest.MarkDecorator:
    """What the scripted application plays: a script for each call, in order."""
    routes: dict[str, list[Script]] = {}
    for route, script in pairs:
        routes.setdefault(route, []).append(script)
    return pytest.mark.scripts(routes)


# --- chat ---------------------------------------------------------------------------------------


@scripts((CHAT, recorded.chat()))
async def test_chat(server: Server) -> None:
    """A whole answer: one choice, who said it, why it ended, what it cost."""
    async with server.client() as client:
        reply = await client.chat.completions.create(**CHAT_BODY)
    assert reply.id.startswith("chatcmpl-")
    assert (reply.object, reply.model) == ("chat.completion", MODEL)
    (choice,) = reply.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert choice.message.content
    assert choice.message.tool_calls is None
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 6
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 6


@scripts((CHAT, recorded.chat()), (CHAT, recorded.CHAT_STREAM))
async def test_a_chat_stream_says_what_the_whole_answer_says(server: Server) -> None:
    """First the role, then the words, then why it ended; one id on all chunks and no usage."""
    async with server.client() as client:
        whole = await client.chat.completions.create(**CHAT_BODY)
        chunks = [chunk async for chunk in await client.chat.completions.create(**CHAT_BODY, stream=True)]
    assert {(chunk.id, chunk.object, chunk.model) for chunk in chunks} == {
        (chunks[0].id, "chat.completion.chunk", MODEL)
    }
    assert [len(chunk.choices) for chunk in chunks] == [1] * len(chunks)
    first, *rest = [chunk.choices[0] for chunk in chunks]
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert "".join(choice.delta.content or "" for choice in rest) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in rest] == [None] * (len(rest) - 1) + ["length"]
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)


@scripts((CHAT, recorded.CHAT_STREAM_WITH_USAGE))
async def test_a_chat_stream_tells_its_usage_when_asked(server: Server) -> None:
    """In one more chunk, the last, without choices."""
    async with server.client() as client:
        stream = await client.chat.completions.create(
            **CHAT_BODY, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = [chunk async for chunk in stream]
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 6
    assert last.usage.total_tokens == last.usage.prompt_tokens + 6


@scripts((CHAT, recorded.CHAT_STREAM))
async def test_the_bytes_of_a_stream(server: Server) -> None:
    """Each event is one `data:` line and a blank one, `[DONE]` is the last, and nothing may buffer them."""
    async with server.http() as http:
        reply = await http.post("chat/completions", json={**CHAT_BODY, "stream": True})
    assert reply.status_code == 200
    headers = ("content-type", "cache-control", "x-accel-buffering", "content-length")
    assert [reply.headers.get(name) for name in headers] == [
        "text/event-stream; charset=utf-8",
        "no-cache",
        "no",
        None,
    ]
    *frames, last = sse.split(reply.content)
    assert last == sse.DONE
    assert all(sse.data(frame)["object"] == "chat.completion.chunk" for frame in frames)
    assert b"".join([*frames, last]) == reply.content


def test_the_synchronous_client(request: pytest.FixtureRequest) -> None:
    """The other half of the SDK, on vLLM behind both programs."""
    stack = request.getfixturevalue("stack")
    for server in (stack.worker, stack.gateway):
        with server.sync_client() as client:
            reply = client.chat.completions.create(**CHAT_BODY)
            with client.chat.completions.create(**CHAT_BODY, stream=True) as stream:
                words = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert reply.choices[0].message.content == words


@scripts((CHAT, recorded.chat_with_logprobs()))
async def test_logprobs(server: Server) -> None:
    """The token that was chosen, and the candidates, the likeliest first."""
    async with server.client() as client:
        reply = await client.chat.completions.create(
            **{**CHAT_BODY, "max_tokens": 1}, logprobs=True, top_logprobs=2
        )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    (token,) = logprobs.content
    assert token.token == reply.choices[0].message.content
    assert bytes(token.bytes or []).decode() == token.token
    best, second = token.top_logprobs
    assert (best.token, best.logprob) == (token.token, token.logprob)
    assert best.logprob > second.logprob


@scripts((CHAT, recorded.TOOL_CALL))
async def test_a_tool_call(server: Server) -> None:
    """The model asks for a function by name, with arguments that are JSON."""
    async with server.client() as client:
        reply = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is the weather in Paris?"}],
            tools=TOOLS,
            max_tokens=100,
            temperature=0,
        )
    (choice,) = reply.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    assert call.id


@scripts((CHAT, recorded.TOOL_STREAM))
async def test_a_tool_call_in_a_stream(server: Server) -> None:
    """Its name comes first, its arguments in pieces."""
    async with server.client() as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is the weather in Paris?"}],
            tools=TOOLS,
            max_tokens=100,
            temperature=0,
            stream=True,
        )
        choices = [chunk.choices[0] async for chunk in stream]
    parts = [call for choice in choices for call in choice.delta.tool_calls or []]
    functions = [part.function for part in parts if part.function]
    assert {part.index for part in parts} == {0}
    assert [part.id is not None for part in parts] == [True] + [False] * (len(parts) - 1)
    assert functions[0].name == "get_weather"
    assert json.loads("".join(function.arguments or "" for function in functions)) == {"city": "Paris"}
    assert choices[-1].finish_reason == "tool_calls"


@scripts((CHAT, recorded.chat('"yes"', "stop")))
async def test_structured_output(server: Server) -> None:
    """What is said obeys the schema, whatever the model would have liked to say."""
    schema = {"name": "answer", "schema": {"enum": ["yes", "no"]}, "strict": True}
    response_format: Any = {"type": "json_schema", "json_schema": schema}
    async with server.client() as client:
        reply = await client.chat.completions.create(
            **{**CHAT_BODY, "max_tokens": 20}, response_format=response_format
        )
    assert json.loads(reply.choices[0].message.content or "") in {"yes", "no"}
    assert reply.choices[0].finish_reason == "stop"


# --- completions --------------------------------------------------------------------------------


@scripts((COMPLETIONS, recorded.completion()), (COMPLETIONS, recorded.completion_stream()))
async def test_completions(server: Server) -> None:
    """Plain and streamed say the same."""
    async with server.client() as client:
        whole = await client.completions.create(**COMPLETION_BODY)
        stream = await client.completions.create(
            **COMPLETION_BODY, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = [chunk async for chunk in stream]
    assert whole.id.startswith("cmpl-")
    assert (whole.object, whole.model, len(whole.choices)) == ("text_completion", MODEL, 1)
    assert (whole.choices[0].index, whole.choices[0].finish_reason) == (0, "length")
    assert {(chunk.id, chunk.object, chunk.model) for chunk in chunks} == {
        (last.id, "text_completion", MODEL)
    }
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens == whole.usage.prompt_tokens + 4


# --- models -------------------------------------------------------------------------------------


@scripts((MODELS, recorded.models()), (MODELS, recorded.models()))
async def test_models(server: Server) -> None:
    """The list and the one model are the same, under the name that clients use, and name no folder."""
    async with server.client() as client:
        (listed,) = (await client.models.list()).data
        one = await client.models.retrieve(MODEL)
    assert listed.model_dump(exclude={"created", "permission"}) == one.model_dump(
        exclude={"created", "permission"}
    )
    assert (one.id, one.object, one.owned_by) == (MODEL, "model", "vllm")
    assert (one.root, one.max_model_len) == (MODEL, MAX_MODEL_LEN)  # type: ignore[attr-defined] # beyond OpenAI's


@scripts((MODELS, recorded.models()), (MODELS, recorded.models()))
@pytest.mark.parametrize("path", ["models/", "models/tinychat/"])
async def test_a_slash_at_the_end_is_no_redirect(server: Server, path: str) -> None:
    """A redirect would name the address behind the gateway."""
    async with server.http() as http:
        for _ in range(2):
            assert (await http.get(path)).status_code == 200


# --- errors through the official client ---------------------------------------------------------


@scripts((CHAT, recorded.NO_MODEL), (CHAT, recorded.NO_MODEL))
@pytest.mark.parametrize("stream", [False, True])
async def test_an_unknown_model_is_a_not_found_error(server: Server, stream: bool) -> None:
    """Streamed or not, the client raises its own class, with every field."""
    async with server.client() as client:
        for _ in range(2):
            with pytest.raises(openai.NotFoundError) as raised:
                await client.chat.completions.create(
                    model="other", messages=MESSAGES, stream=stream, extra_headers={"x-request-id": "req-1"}
                )
            error = raised.value
            assert error.body == {
                "message": "The model `other` does not exist. Valid aliases: tinychat.",
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
            }
            assert (error.code, error.param, error.type) == (
                "model_not_found",
                "model",
                "invalid_request_error",
            )
            assert error.request_id == "req-1"


@scripts((MODELS, recorded.models()))
async def test_an_unknown_model_can_not_be_retrieved(server: Server) -> None:
    """Its id may look like a path."""
    async with server.client() as client:
        with pytest.raises(openai.NotFoundError) as raised:
            await client.models.retrieve("org/other")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


@scripts()
async def test_what_is_no_route_is_a_not_found_error(server: Server) -> None:
    """Whether vLLM has it or not."""
    async with server.client() as client:
        for path in ("/fine_tuning/jobs", "/load_lora_adapter"):
            with pytest.raises(openai.NotFoundError) as raised:
                await client.post(path, cast_to=object, body={})
            assert raised.value.code == "unknown_url"


@pytest.mark.parametrize(
    "server",
    [
        *("scripted-worker", "scripted-gateway", "scripted-runpod", "scripted-url"),
        *("vllm-worker", "vllm-gateway", "vllm-runpod"),
    ],
    indirect=True,
)
@scripts()
async def test_what_leads_out_of_the_url_is_a_not_found_error(server: Server) -> None:
    """Where it comes to us: a REST API refuses what is not under its resource."""
    async with server.client() as client:
        with pytest.raises(openai.NotFoundError) as raised:
            await client.post("/../invocations", cast_to=object, body={})
    assert raised.value.code == "unknown_url"


@scripts()
async def test_the_wrong_method_is_405(server: Server) -> None:
    """With the right one in `Allow`."""
    async with server.http() as http:
        reply = await http.get("chat/completions")
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    assert reply.json()["error"]["code"] == "method_not_allowed"


# --- request ids --------------------------------------------------------------------------------


@scripts((CHAT, recorded.chat()), (CHAT, recorded.CHAT_STREAM), (CHAT, recorded.chat()))
async def test_every_answer_has_a_request_id(server: Server) -> None:
    """The client's own if it is fit for a log, whole and streamed; it is never the engine's."""
    async with server.http() as http:
        given = [{"x-request-id": "req-abc"}, {"x-request-id": "req-abc"}, {"x-request-id": "x" * 129}]
        replies = [
            await http.post("chat/completions", json={**CHAT_BODY, "stream": stream}, headers=headers)
            for stream, headers in zip((False, True, False), given, strict=True)
        ]
    assert [reply.status_code for reply in replies] == [200, 200, 200]
    assert [reply.headers.get_list("x-request-id") for reply in replies[:2]] == [["req-abc"], ["req-abc"]]
    (made,) = replies[2].headers.get_list("x-request-id")
    assert made.startswith("req_")
    assert not any(b"req-abc" in reply.content for reply in replies)
