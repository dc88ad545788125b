"""What vLLM 0.32 answered to the scenarios, word for word but for ids and times.

The same scenarios run on vLLM itself: what is recorded here can't drift from what it says.
"""

from __future__ import annotations

import json
from typing import Any

from tests.scripted_app import Script, answer, stream
from tests.servers import MODEL

NOTHING = {"prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None, "metrics": None}
USAGE = {"prompt_tokens": 24, "total_tokens": 30, "completion_tokens": 6}
WORDS = ("Hello", "!", " How", " can", " I", " help")


def chat(content: str | None = "".join(WORDS), finish: str = "length", **message: Any) -> Script:
    """A chat completion."""
    said = {"role": "assistant", "content": content, "refusal": None, "reasoning": None, **message}
    choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": finish, "stop_reason": None}
    return answer(
        {
            "id": "chatcmpl-ad6c1373b9361a08",
            "object": "chat.completion",
            "created": 1795426674,
            "model": MODEL,
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": "vllm-0.32.0-24c2b4a2",
            "usage": {**USAGE, "prompt_tokens_details": None, "completion_tokens_details": None},
            **NOTHING,
        }
    )


def chat_with_logprobs() -> Script:
    """A chat completion of one token that names two candidates."""
    candidates = [
        {"token": "Hello", "logprob": -0.0045, "bytes": [72, 101, 108, 108, 111]},
        {"token": "Goodbye", "logprob": -6.8795, "bytes": [71, 111, 111, 100, 98, 121, 101]},
    ]
    body = json.loads(chat("Hello").steps[0].data)  # type: ignore[union-attr] # the one step says something
    body["choices"][0]["logprobs"] = {"content": [{**candidates[0], "top_logprobs": candidates}]}
    body["usage"] |= {"completion_tokens": 1, "total_tokens": 25}
    return answer(body)


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
    """One chunk of a chat stream."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return _chunk("chatcmpl-b70d9e644d6e8fe8", "chat.completion.chunk", [choice], more)


def _chunk(id: str, kind: str, choices: list[dict[str, Any]], more: dict[str, Any]) -> str:
    body = {"id": id, "object": kind, "created": 1795426674, "model": MODEL, "choices": choices}
    return json.dumps({**body, **more}, separators=(",", ":"))


ROLE = chunk({"role": "assistant", "content": ""}, prompt_token_ids=None, prompt_text=None)
DELTAS = [chunk({"content": word}) for word in WORDS[:-1]]
LAST = chunk({"content": WORDS[-1]}, "length")
CHAT_USAGE = _chunk("chatcmpl-b70d9e644d6e8fe8", "chat.completion.chunk", [], {"usage": USAGE})
CHAT_STREAM = stream(ROLE, *DELTAS, LAST)
CHAT_STREAM_WITH_USAGE = stream(ROLE, *DELTAS, LAST, CHAT_USAGE)

WEATHER = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
TOOL_CALL = chat(
    None,
    "tool_calls",
    tool_calls=[{"id": "chatcmpl-tool-b77a507af85ec64b", "type": "function", "function": WEATHER}],
)
TOOL_STREAM = stream(
    ROLE,
    chunk(
        {
            "tool_calls": [
                {
                    "id": "chatcmpl-tool-9e87",
                    "type": "function",
                    "index": 0,
                    "function": {"name": "get_weather"},
                }
            ]
        }
    ),
    *(
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
        for part in ('{"', "city", '": "', 'Paris"}')
    ),
    chunk({}, "tool_calls"),
)

TEXT = "HelloHelloHelloHello"


def completion() -> Script:
    """A text completion."""
    choice = {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    return answer(
        {
            "id": "cmpl-b15dc22d2a315c4a",
            "object": "text_completion",
            "created": 1795426711,
            "model": MODEL,
            "choices": [choice],
            "system_fingerprint": "vllm-0.32.0-24c2b4a2",
            "usage": {"prompt_tokens": 1, "total_tokens": 5, "completion_tokens": 4},
        }
    )


def completion_stream() -> Script:
    """The chunks of a text completion, and its usage."""
    choices = [
        {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": finish, "stop_reason": None}
        for finish in (None, None, None, "length")
    ]
    usage = {"usage": {"prompt_tokens": 1, "total_tokens": 5, "completion_tokens": 4}}
    return stream(
        *(_chunk("cmpl-aa1d8582caa5108a", "text_completion", [choice], {}) for choice in choices),
        _chunk("cmpl-aa1d8582caa5108a", "text_completion", [], usage),
    )


def models() -> Script:
    """The list of models, with the folder of the weights."""
    model = {
        "id": MODEL,
        "object": "model",
        "created": 1795424520,
        "owned_by": "vllm",
        "root": "/models/tinychat",
        "parent": None,
        "max_model_len": 1024,
    }
    return answer({"object": "list", "data": [model]})


def error(message: str, status: int, kind: str = "BadRequestError", param: str | None = None) -> Script:
    """An `ErrorResponse`."""
    return answer({"error": {"message": message, "type": kind, "param": param, "code": status}}, status)


NO_MODEL = error("The model `other` does not exist. Valid aliases: tinychat.", 404, "NotFoundError", "model")
