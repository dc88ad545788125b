"""The official clients' own retries, against a gateway that says when to come again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from gateway.accounts.clients import Clients
from gateway.accounts.keys import Key, Keys
from gateway.accounts.limits import Limits
from gateway.accounts.metering import Metering
from gateway.accounts.usage import Prices
from gateway.store import Store
from handler.auth import digest
from handler.errors import NotAdmitted, RateLimited, json_reply
from handler.listener import listen
from handler.messages import Reply, Request
from handler.server import Server, config
from tests import gateways

SECRET = "ft-limited"
CHOICE = {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}
ANSWER = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [CHOICE],
    "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3},
}
MESSAGES: Any = [{"role": "user", "content": "Hi"}]


class Clock(Limits):
    """Limits on a clock that goes on by a second when they refuse, and else never."""

    def __init__(self) -> None:
        super().__init__(lambda: self.now_s)
        self.now_s = 0.0

    def take(self, key: Key) -> None:
        """Let one in, or refuse it."""
        try:
            super().take(key)
        except RateLimited:
            self.now_s += 1
            raise


class Endpoint:
    """Answers, but refuses the first `refusals`."""

    def __init__(self, refusals: int = 0) -> None:
        self._refusals = refusals
        self.asked = 0
        self.limits = Clock()
        self.url = ""

    @asynccontextmanager
    async def call(self, _: Request) -> AsyncIterator[Reply]:
        """One answer."""
        self.asked += 1
        if self.asked <= self._refusals:
            raise NotAdmitted("No worker can take it.", retry_after_s=1)
        yield json_reply(200, ANSWER)


@contextmanager
def serving(endpoint: Endpoint, folder: Path, *, requests_per_minute: int | None = None) -> Iterator[None]:
    """A gateway in front of `endpoint`, in a thread with a loop of its own, as a client finds it."""
    key = Key("key_a", "a", digest(SECRET), requests_per_minute=requests_per_minute)
    limits = endpoint.limits
    listening = threading.Event()
    ended: Callable[[], object]

    async def serve() -> None:
        nonlocal ended
        store = Store.open(f"sqlite:///{folder}/gateway.db")
        keys = Keys(stored=[key])
        metering = Metering(store, keys, limits)
        call = Clients(keys, limits, metering).call(
            endpoint.call, endpoint_id="local", model_id="m", prices=Prices()
        )
        app = gateways.one(call, keys, limits=limits).app(max_body_bytes=1000, cors_origins=())
        server = Server(config(app, shutdown_s=1))
        loop = asyncio.get_running_loop()
        ended = lambda: loop.call_soon_threadsafe(setattr, server, "should_exit", True)  # noqa: E731
        with listen("127.0.0.1", 0) as listener:
            endpoint.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v2/local/openai/v1"
            listening.set()
            async with metering:
                await server.serve(sockets=[listener])
        store.close()

    thread = threading.Thread(target=asyncio.run, args=[serve()])
    thread.start()
    listening.wait()
    try:
        yield
    finally:
        ended()
        thread.join()


def chat(url: str, max_retries: int, *, asynchronous: bool) -> Any:
    """The answer with its headers."""
    asked: Any = {"model": "m", "messages": MESSAGES}
    if not asynchronous:
        with openai.OpenAI(base_url=url, api_key=SECRET, max_retries=max_retries) as client:
            return client.chat.completions.with_raw_response.create(**asked)

    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=url, api_key=SECRET, max_retries=max_retries) as client:
            return await client.chat.completions.with_raw_response.create(**asked)

    return asyncio.run(ask())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_limited_client_waits_and_succeeds(tmp_path: Path, asynchronous: bool) -> None:
    """It is refused once, waits for as long as it is told, and has its answer, which says how it stands."""
    endpoint = Endpoint()
    with serving(endpoint, tmp_path, requests_per_minute=1):
        first = chat(endpoint.url, 0, asynchronous=asynchronous)
        assert first.headers["x-ratelimit-remaining-requests"] == "0"
        assert first.headers["x-ratelimit-reset-requests"] == "1m0s"

        with pytest.raises(openai.RateLimitError) as refused:
            chat(endpoint.url, 0, asynchronous=asynchronous)
        assert refused.value.code == "rate_limit_exceeded"
        assert refused.value.response.headers["retry-after"] == "60"
        assert refused.value.response.headers["x-ratelimit-limit-requests"] == "1"

        endpoint.limits.now_s = 59.5  # half a second short: the client has to wait, but no minute
        second = chat(endpoint.url, 2, asynchronous=asynchronous)
        assert second.parse().choices[0].message.content == "Hi"
        assert second.retries_taken == 1
    assert endpoint.asked == 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_client_that_is_not_admitted_comes_again(tmp_path: Path, asynchronous: bool) -> None:
    """After `Retry-After`, as often as it may."""
    endpoint = Endpoint(refusals=2)
    with serving(endpoint, tmp_path):
        with pytest.raises(openai.InternalServerError) as refused:
            chat(endpoint.url, 0, asynchronous=asynchronous)
        assert (refused.value.status_code, refused.value.code) == (503, "not_admitted")
        assert refused.value.response.headers["retry-after"] == "1"
        answered = chat(endpoint.url, 2, asynchronous=asynchronous)
        assert answered.parse().choices[0].message.content == "Hi"
        assert answered.retries_taken == 1
    assert endpoint.asked == 3
