"""The first token, made through the real route before a worker takes work."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from handler.errors import EngineFailed
from handler.messages import Call, Request, read

CANARY_TIMEOUT_S = 600.0


async def canary(call: Call, tasks: tuple[str, ...], model_id: str) -> dict[str, Any] | None:
    """Make a first token, or a first vector, through the real route.

    A chat where the model has a template, so that no client is the first to load it. Returns vLLM's answer,
    None for a model that does neither. Raises `EngineFailed` if it is not answered with 200.
    """
    one = {"model": model_id, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
    try:
        if "generate" in tasks:
            chat = {**one, "messages": [{"role": "user", "content": "Hello"}]}
            with suppress(_Refused):
                return await _asked(call, "/v1/chat/completions", chat)
            return await _asked(call, "/v1/completions", {**one, "prompt": "Hello"})
        if "embed" in tasks:
            return await _asked(call, "/v1/embeddings", {"model": model_id, "input": "Hello"})
    except _Refused as refused:
        raise EngineFailed(f"the engine started but answers {refused}") from None
    return None


class _Refused(Exception):
    """What was answered instead of a token."""


async def _asked(call: Call, path: str, body: dict[str, Any]) -> dict[str, Any]:
    raw = json.dumps(body).encode()
    async with call(Request("POST", path, (("content-type", "application/json"),), raw)) as reply:
        answer = await read(reply)
    if reply.status != 200:
        raise _Refused(f"{reply.status}: {answer.decode(errors='replace')[:500]}")
    found: dict[str, Any] = json.loads(answer)
    return found
