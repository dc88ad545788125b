"""A worker without an engine that makes tokens at a steady rate: `python -m tests.steady_worker`.

Chat only. `STEADY_TOKENS_PER_S` is the rate of each answer, `max_tokens` its length; a stream says what it
has used if it is asked for that, as vLLM does.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any, cast

from bench.paced import PacedEngine
from handler import platforms, sse
from handler.__main__ import end, exit_code
from handler.asgi import Message, Receive, Send
from handler.engine import Engine
from handler.phases import Phases
from handler.settings import Settings
from handler.supervision import Notifier, watch_lifeline

COMMAND = (sys.executable, "-m", "tests.steady_worker")
PROMPT_TOKENS = 3


class SteadyEngine(PacedEngine):
    """Answers by itself, `per_s` tokens a second."""

    async def _app(self, scope: Message, receive: Receive, send: Send) -> None:
        assert scope["path"] == "/v1/chat/completions", scope["path"]
        asked = json.loads((await receive())["body"])
        self._held += 1
        try:
            await (self._stream if asked.get("stream") else self._whole)(asked, send)
        finally:
            self._held -= 1

    async def _stream(self, asked: dict[str, Any], send: Send) -> None:
        await send(_start("text/event-stream; charset=utf-8"))
        for _ in range(asked["max_tokens"]):
            await asyncio.sleep(1 / self._per_s)
            choice = {"index": 0, "delta": {"content": "t"}, "finish_reason": None}
            await send(_more(_chunk(asked, choices=[choice])))
        if (asked.get("stream_options") or {}).get("include_usage"):
            await send(_more(_chunk(asked, choices=[], usage=_usage(asked))))
        await send(_more(sse.DONE))
        await send({"type": "http.response.body", "body": b""})

    async def _whole(self, asked: dict[str, Any], send: Send) -> None:
        await asyncio.sleep(asked["max_tokens"] / self._per_s)
        message = {"role": "assistant", "content": "t" * asked["max_tokens"]}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = {**_head(asked, "chat.completion"), "choices": [choice], "usage": _usage(asked)}
        await send(_start("application/json"))
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def _start(kind: str) -> Message:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]}


def _more(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


def _head(asked: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": asked["model"]}


def _chunk(asked: dict[str, Any], **more: Any) -> bytes:
    return sse.event({**_head(asked, "chat.completion.chunk"), **more})


def _usage(asked: dict[str, Any]) -> dict[str, int]:
    made = asked["max_tokens"]
    return {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": made, "total_tokens": PROMPT_TOKENS + made}


def work() -> None:
    """Serve until told to stop."""
    settings = Settings.from_environ(os.environ)
    if settings.lifeline_fd is not None:
        watch_lifeline(settings.lifeline_fd)
    phases, notifier = Phases(time.monotonic()), Notifier(settings.notify_socket)
    phases.done()
    platform = platforms.load(platforms.chosen(os.environ), settings)
    platform.prepare()
    engine = SteadyEngine(float(os.environ["STEADY_TOKENS_PER_S"]))
    platform.run(cast("Engine", engine), phases, notifier)


if __name__ == "__main__":
    end(exit_code(work))
