"""The gateway reads along what an answer uses: its client gets, frame by frame, what vLLM would have said."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from handler import sse
from tests.servers import MODEL, Server, Stack

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
TEXT = {"prompt": "Hello", "max_tokens": 1}
"""One token: more may come in one frame or in two."""
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
TOOLS = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"stream_options": None},
    {"stream_options": {}},
    {"stream_options": {"include_usage": False}},
    {"stream_options": {"include_usage": "no", "continuous_usage_stats": "yes"}},
    {"stream_options": {"include_usage": False, "continuous_usage_stats": True}},
    {"stream_options": {"continuous_usage_stats": True}},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"stream_options": {"include_usage": "perhaps"}},
    {"stream_options": {"continuous_usage_stats": "perhaps"}},
    {"stream_options": 5},
)
_OWN = re.compile(rb'"(id|created)": ?("[^"]*"|\d+)')
"""What no two answers have in common."""


async def said(server: Server, path: str, body: dict[str, Any]) -> tuple[int, list[bytes]]:
    """Status and frames of an answer, or the one body that it is."""
    async with server.http() as http:
        reply = await http.post(path, json={"model": MODEL, "temperature": 0, "seed": 1, **body})
    streams = reply.headers["content-type"].startswith("text/event-stream")
    return reply.status_code, [
        _OWN.sub(rb'"\1":0', frame) for frame in (sse.split(reply.content) if streams else [reply.content])
    ]


@pytest.mark.parametrize("options", OPTIONS, ids=json.dumps)
@pytest.mark.parametrize(("path", "body"), [("chat/completions", CHAT), ("completions", TEXT)])
async def test_a_stream_is_as_it_would_have_been(
    path: str, body: dict[str, Any], options: dict[str, Any], stack: Stack
) -> None:
    """Whatever its client has said of usage: of what the gateway asks for besides, nothing is seen."""
    asked = {**body, "stream": True, **options}
    assert await said(stack.gateway, path, asked) == await said(stack.worker, path, asked)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {**CHAT, "n": 3, "temperature": 1}),
        ("chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}),
        ("chat/completions", {**CHAT, **TOOLS}),
        ("chat/completions", {**CHAT, "echo": True, "return_token_ids": True}),
        ("completions", {**TEXT, "n": 3, "temperature": 1}),
        ("completions", {**TEXT, "logprobs": 2}),
        ("completions", {**TEXT, "prompt": ["Hello", "Hi there"]}),
        ("completions", {**TEXT, "echo": True, "stop": ["e"]}),
        ("completions", {**TEXT, "max_tokens": 0, "echo": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(sorted(value)),
)
async def test_an_answer_is_as_it_would_have_been(
    path: str, body: dict[str, Any], streams: bool, stack: Stack
) -> None:
    """Several choices, in whatever order they end, tokens with their probabilities, calls of tools."""
    asked = {**body, "stream": streams}
    (status, metered), (_, plain) = [await said(on, path, asked) for on in (stack.gateway, stack.worker)]
    assert (status, sorted(metered)) == (200, sorted(plain))


async def test_a_call_of_a_tool_ends_as_it_would_have(stack: Stack) -> None:
    """How many tokens are in a frame is the engine's to say each time; how it ends is not."""
    asked = {**CHAT, **TOOLS, "max_tokens": 40, "stream": True}
    (_, metered), (_, plain) = [
        await said(on, "chat/completions", asked) for on in (stack.gateway, stack.worker)
    ]
    assert (metered[0], metered[-2:]) == (plain[0], plain[-2:])
    assert b'"finish_reason":"' in metered[-2]
    assert b"tool_calls" in b"".join(metered)
