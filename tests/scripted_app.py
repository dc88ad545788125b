"""The one fake: an ASGI application that follows a script and records what it saw.

It stands where vLLM's application stands, in process or in a worker of its own
(`tests.scripted_worker`). It is strict: a call that no script expects fails the test, and
`finish()` fails when a script was never played.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from handler.asgi import Message, Receive, Send
from handler.messages import Headers
from handler.sse import DONE

JSON: Headers = (("content-type", "application/json"),)
EVENT_STREAM: Headers = (("content-type", "text/event-stream; charset=utf-8"),)


@dataclass(frozen=True, slots=True)
class Say:
    """Send these bytes as one body message."""

    data: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait at the gate called `name` until the test opens it."""

    name: str


@dataclass(frozen=True, slots=True)
class Fail:
    """Raise, as an application does that has a bug."""


@dataclass(frozen=True, slots=True)
class Crash:
    """End the process as `kill -9` does. For workers only."""


Step = Say | Pause | Fail | Crash
_STEPS: Mapping[str, type[Step]] = {"say": Say, "pause": Pause, "fail": Fail, "crash": Crash}


@dataclass(frozen=True, slots=True)
class Script:
    """One answer: status and headers go out with the first `Say`, or at the end without one."""

    steps: tuple[Step, ...] = ()
    status: int = 200
    headers: Headers = JSON

    def dump(self) -> dict[str, Any]:
        """The script as JSON, for a worker in another process."""
        steps = [
            [type(step).__name__.lower(), *(getattr(step, name) for name in step.__slots__)]
            for step in self.steps
        ]
        return {"status": self.status, "headers": self.headers, "steps": steps}

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> Script:
        """The inverse of `dump`."""
        steps = tuple(_STEPS[name](*values) for name, *values in value["steps"])
        return cls(steps, value["status"], tuple((name, text) for name, text in value["headers"]))


def answer(value: object, status: int = 200, headers: Headers = ()) -> Script:
    """A whole JSON answer."""
    return Script((Say(json.dumps(value)),), status, (*JSON, *headers))


def stream(*steps: Step | str) -> Script:
    """An event stream: each text is the data of one frame, and `[DONE]` is added."""
    frames = tuple(Say(f"data: {step}\n\n") if isinstance(step, str) else step for step in steps)
    return Script((*frames, Say(DONE.decode())), 200, EVENT_STREAM)


def echo(seen: Seen) -> Script:
    """A chat's answer with what the user said, in as many tokens as it has characters.

    A number is a status, and `hold NAME` waits at that gate first.
    """
    asked = json.loads(seen.body)
    said = asked["messages"][-1]["content"]
    if said.isdecimal():
        message = {"message": "as you wish", "type": "BadRequestError", "param": None, "code": int(said)}
        return answer({"error": message}, int(said))
    choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 2, "completion_tokens": len(said), "total_tokens": 2 + len(said)}
    body = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": asked.get("model")}
    whole = answer({**body, "choices": [choice], "usage": usage})
    word, _, gate = said.partition(" ")
    return replace(whole, steps=(Pause(gate), *whole.steps)) if word == "hold" else whole


@dataclass(slots=True)
class Gate:
    """Where a script waits: `reached` by the script, `opened` by the test."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Seen:
    """One call as the application saw it. `ended` is `finished`, `disconnected` or `failed`."""

    method: str
    path: str
    query: str
    headers: Headers
    body: bytes = b""
    ended: str | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def header(self, name: str) -> str | None:
        """The first value of the header `name`, or None."""
        return next((value for key, value in self.headers if key == name), None)


class ScriptedApp:
    """Plays `scripts`: of one route in order, the last one again and again if `repeat`.

    Routes are written `POST /v1/chat/completions`. One of `makes` is answered with what that makes of each
    call, however often. What was `seen` is kept if it `remembers`. `tell` hears `request`, `paused` and the
    ends named by `Seen`, each with the route or the gate.
    """

    def __init__(
        self,
        scripts: Mapping[str, Script | Sequence[Script]],
        *,
        repeat: bool = False,
        makes: Mapping[str, Callable[[Seen], Script]] | None = None,
        remembers: bool = True,
        tell: Callable[[str, str], None] = lambda what, name: None,
    ) -> None:
        self._scripts = {route: [s] if isinstance(s, Script) else list(s) for route, s in scripts.items()}
        self._repeat = repeat
        self._makes = makes or {}
        self._remembers = remembers
        self._tell = tell
        self._gates: dict[str, Gate] = {}
        self.seen: list[Seen] = []
        self.unexpected: list[str] = []

    def gate(self, name: str) -> Gate:
        """The gate at which `Pause(name)` waits."""
        return self._gates.setdefault(name, Gate())

    def finish(self) -> None:
        """Fail unless every script was played and every call was expected."""
        left = {
            route: len(scripts) for route, scripts in self._scripts.items() if scripts and not self._repeat
        }
        assert not self.unexpected, self.unexpected
        assert not left, left

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Play the next script of the route."""
        assert scope["type"] == "http", scope["type"]
        seen = Seen(
            scope["method"],
            scope["path"],
            scope["query_string"].decode(),
            tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]),
        )
        if self._remembers:
            self.seen.append(seen)
        route = f"{seen.method} {seen.path}"
        try:
            seen.body = await _body(receive)
            script = self._makes[route](seen) if route in self._makes else self._next(route)
            self._tell("request", route)
            play = asyncio.ensure_future(self._play(script, send))
            gone = asyncio.ensure_future(_disconnect(receive))
            try:
                await asyncio.wait({play, gone}, return_when=asyncio.FIRST_COMPLETED)
                seen.ended = "disconnected"
                if play.done():
                    seen.ended = "failed" if play.exception() else "finished"
                    play.result()
            finally:
                gone.cancel()
                play.cancel()
        finally:
            seen.over.set()
            self._tell(seen.ended or "failed", route)

    def _next(self, route: str) -> Script:
        scripts = self._scripts.get(route)
        if not scripts:
            self.unexpected.append(route)
            raise AssertionError(f"no script expects {route}")
        return scripts[0] if self._repeat and len(scripts) == 1 else scripts.pop(0)

    async def _play(self, script: Script, send: Send) -> None:
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in script.headers]
        start = {"type": "http.response.start", "status": script.status, "headers": headers}
        begun = False
        for step in script.steps:
            match step:
                case Say(data):
                    if not begun:
                        begun = True
                        await send(start)
                    await send({"type": "http.response.body", "body": data.encode(), "more_body": True})
                case Pause(name):
                    self.gate(name).reached.set()
                    self._tell("paused", name)
                    await self.gate(name).opened.wait()
                case Fail():
                    raise RuntimeError("the script says so")
                case Crash():
                    os.kill(os.getpid(), signal.SIGKILL)
        if not begun:
            await send(start)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        assert message["type"] == "http.request", "the client left before its body was whole"
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
