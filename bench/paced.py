"""A worker that says tokens at a steady rate: `python -m bench.paced` and a mode.

    worker      our platforms around it, as `PLATFORM` says
    per-token   RunPod's SDK with a handler that yields each frame by itself
    gateway-worker, gateway-per-token   a gateway whose worker it is, asked through jobs
    local-worker                        a gateway whose worker it is, asked through a socket

`PACE_TOKENS_PER_S` is the rate, `PACE_LINK_MS` the delay of the line to RunPod's side, each way.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Coroutine, MutableMapping
from typing import Any, cast
from urllib.parse import urlsplit

from gateway.__main__ import main as gateway_main
from handler import platforms, sse
from handler.__main__ import end, exit_code
from handler.asgi import Message, Receive, Send, call_app
from handler.engine import Engine
from handler.phases import Phases
from handler.platforms.runpod import import_sdk
from handler.settings import Settings
from handler.supervision import Notifier, watch_lifeline

ADDRESSES = (
    "RUNPOD_WEBHOOK_GET_JOB",
    "RUNPOD_WEBHOOK_POST_OUTPUT",
    "RUNPOD_WEBHOOK_POST_STREAM",
    "RUNPOD_WEBHOOK_PING",
)


def frame(number: int, tokens: int) -> bytes:
    """A chunk of a chat as vLLM makes it; the last one counts the tokens."""
    delta = {"role": "assistant", "content": f" word{number:04}"}
    usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
    return sse.event(
        {
            "id": "chatcmpl-b70d9e644d6e8fe8",
            "object": "chat.completion.chunk",
            "created": 1795426674,
            "model": "paced",
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}],
            **({"usage": usage} if number == tokens - 1 else {}),
        }
    )


async def paced(tokens: int, per_s: float) -> AsyncIterator[bytes]:
    """`tokens` frames, each at its time, whatever became of those before."""
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    for number in range(tokens):
        await asyncio.sleep(begun_s + number / per_s - loop.time())
        yield frame(number, tokens)
    yield sse.DONE


class PacedEngine:
    """What the platforms ask of an engine, on a loop in a thread."""

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._held = 0
        self.dead: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.is_dead = False
        self.loop = asyncio.new_event_loop()
        self.call = call_app(self._app)
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def capacity(self) -> int:
        """As many as anyone wants."""
        return 64

    def running(self) -> int:
        """How many streams it paces."""
        return self._held

    def submit(self, work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        """Run `work` on the engine's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def _app(self, _: Message, receive: Receive, send: Send) -> None:
        tokens = json.loads((await receive())["body"])["max_tokens"]
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._held += 1
        try:
            async for chunk in paced(tokens, self._per_s):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        finally:
            self._held -= 1
        await send({"type": "http.response.body", "body": b""})


def work(mode: str, environ: MutableMapping[str, str]) -> None:
    """Serve until told to stop."""
    settings = Settings.from_environ(environ)
    if settings.lifeline_fd is not None:
        watch_lifeline(settings.lifeline_fd)
    link = lengthen(environ) if float(environ.get("PACE_LINK_MS", "0")) else None
    per_s = float(environ["PACE_TOKENS_PER_S"])
    phases, notifier = Phases(0.0), Notifier(settings.notify_socket)
    phases.done()
    try:
        if mode == "per-token":
            notifier.ready(phases.report())
            per_token(per_s, environ)
            return
        platform = platforms.load(platforms.chosen(environ), settings)
        platform.prepare()
        platform.run(cast("Engine", PacedEngine(per_s)), phases, notifier)
    finally:
        if link is not None:
            link.kill()


def lengthen(environ: MutableMapping[str, str]) -> subprocess.Popen[str]:
    """Put a line between this worker and RunPod's side."""
    url = urlsplit(environ[ADDRESSES[0]])
    command = [sys.executable, "-m", "bench.link", str(url.hostname), str(url.port), environ["PACE_LINK_MS"]]
    link = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert link.stdout, "piped"
    port = int(link.stdout.readline())
    for name in ADDRESSES:
        environ[name] = environ[name].replace(f":{url.port}/", f":{port}/", 1)
    return link


def per_token(per_s: float, environ: MutableMapping[str, str]) -> None:
    """What a handler does that yields each token."""
    sdk = import_sdk("ERROR", environ)

    async def handler(job: dict[str, Any]) -> AsyncIterator[str]:
        async for chunk in paced(job["input"]["openai_input"]["max_tokens"], per_s):
            yield chunk.decode()

    sdk.serverless.start(
        {"handler": handler, "return_aggregate_stream": True, "concurrency_modifier": lambda _: 64}
    )


if __name__ == "__main__":
    mode = sys.argv[1]
    for prefix, upstream in (("gateway-", "runpod"), ("local-", "local")):
        if mode.startswith(prefix):
            command = (sys.executable, "-m", "bench.paced", mode.removeprefix(prefix))
            sys.exit(gateway_main(["serve", "--upstream", upstream], command))
    end(exit_code(lambda: work(mode, os.environ)))
