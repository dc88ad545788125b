"""A worker process without an engine: the contract between gateway and worker, scripted.

`python -m tests.scripted_worker` connects to the `Director` at `SCRIPT_CONTROL`, which is
the test, and gets its script: how it starts, what it answers. Both ends speak lines of
JSON, so that a test waits for what happens and never sleeps.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handler.asgi import App, Message, Receive, Send
from handler.server import Server, config
from handler.supervision import watch_lifeline
from tests.scripted_app import Script, ScriptedApp, echo

COMMAND = (sys.executable, "-m", "tests.scripted_worker")
COLD_START = {
    "total_s": 1.5,
    "facts": {"load_format": "mmap"},
    "phases": [
        {"name": name, "begin_s": begin_s, "end_s": end_s, "cpu_s": cpu_s, "major_faults": faults}
        for name, begin_s, end_s, cpu_s, faults in (
            ("import vllm", 0.1, 0.7, 0.6, 0),
            ("open engine", 0.7, 1.4, 0.2, 400),
            ("first token", 1.4, 1.5, 0.0, 0),
        )
    ],
}

Scripts = Mapping[str, Script | Sequence[Script] | None]
"""What is answered, by route; for None `tests.scripted_app.echo`."""
READY: tuple[tuple[str, ...], ...] = (("status", "loading weights"), ("ready",))
"""A start that works: what the worker says, waits for, or dies of, in order."""


@dataclass(slots=True)
class Worker:
    """The test's view of one worker process."""

    pid: int
    env: dict[str, str]
    _writer: asyncio.StreamWriter
    events: list[tuple[str, str]] = field(default_factory=list)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def saw(self, what: str, name: str = "", count: int = 1) -> None:
        """Return once the worker has told `what` `count` times (`gone` when it has ended)."""
        async with self._news:
            await self._news.wait_for(lambda: self.events.count((what, name)) >= count)

    def open(self, gate: str) -> None:
        """Let what waits at `gate` go on."""
        self.order(open=gate)

    def order(self, **what: Any) -> None:
        """Tell it something that it has to do."""
        self._writer.write(json.dumps(what).encode() + b"\n")

    def kill(self) -> None:
        """Kill it, and it alone, as the kernel does when memory is short."""
        os.kill(self.pid, signal.SIGKILL)

    async def told(self, what: str, name: str) -> None:
        """Keep what the worker told."""
        async with self._news:
            self.events.append((what, name))
            self._news.notify_all()


class Director:
    """Listens at `path`; gives the nth worker the nth of `plays`, and keeps those that came.

    With `repeat` workers play the last script of a route again and again.
    """

    def __init__(
        self, path: Path, *plays: tuple[Sequence[Sequence[str]], Scripts], repeat: bool = False
    ) -> None:
        self.path = path
        self._repeat = repeat
        self._plays = list(plays)
        self._workers: asyncio.Queue[Worker] = asyncio.Queue()
        self._handlers: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Director]:
        """The director, for as long as the block runs."""
        server = await asyncio.start_unix_server(self._accept, str(self.path))
        try:
            yield self
        finally:
            server.close()
            for task in self._handlers:
                task.cancel()
            await asyncio.gather(*self._handlers, return_exceptions=True)

    async def worker(self) -> Worker:
        """The next worker that was started."""
        return await self._workers.get()

    def unused(self) -> int:
        """How many plays no worker came for."""
        return len(self._plays)

    def play_for(self, _: Worker) -> tuple[Sequence[Sequence[str]], Scripts]:
        """What the worker that has come is to do."""
        return self._plays.pop(0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        try:
            hello = json.loads(await reader.readline())
            worker = Worker(hello["pid"], hello["env"], writer)
            start, scripts = self.play_for(worker)
            play = {
                "start": start,
                "scripts": {r: None if s is None else _dump(s) for r, s in scripts.items()},
                "repeat": self._repeat,
            }
            writer.write(json.dumps(play).encode() + b"\n")
            self._workers.put_nowait(worker)
            while line := await reader.readline():
                await worker.told(*json.loads(line))
            await worker.told("gone", "")
        except ConnectionError:
            await worker.told("gone", "")
        finally:
            writer.close()


def _dump(scripts: Script | Sequence[Script]) -> list[dict[str, Any]]:
    return [script.dump() for script in ([scripts] if isinstance(scripts, Script) else scripts)]


def _probed(app: ScriptedApp, tell: Callable[[str, str], None]) -> App:
    """`app`, and the probe that each worker of HTTP answers; `tell` hears of it."""

    async def probed(scope: Message, receive: Receive, send: Send) -> None:
        if scope["path"] != "/ping":
            await app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        tell("probed", "")

    return probed


class Actor:
    """The worker itself: starts as its play says, serves its scripts, drains on SIGTERM."""

    def __init__(
        self, environ: Mapping[str, str], writer: asyncio.StreamWriter, scripts: Scripts, *, repeat: bool
    ) -> None:
        self._uds = environ.get("UDS", "")
        self._writer = writer
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.connect(environ["NOTIFY_SOCKET"])
        played = {route: script for route, script in scripts.items() if script is not None}
        makes = dict.fromkeys(scripts.keys() - played.keys(), echo)
        self.app = ScriptedApp(
            played, repeat=repeat, makes=makes, remembers=not (makes or repeat), tell=self._tell
        )
        self._slots = "16"
        drain_s = math.ceil(float(environ.get("DRAIN_TIMEOUT_S", "30")))
        self._server = Server(config(_probed(self.app, self._tell), shutdown_s=drain_s, links=True))

    def _tell(self, what: str, name: str) -> None:
        self._writer.write(json.dumps([what, name]).encode() + b"\n")

    def _say(self, **fields: str) -> None:
        with suppress(OSError):  # the gateway may be gone
            self._notify.send("\n".join(f"{name}={value}" for name, value in fields.items()).encode())

    def stop(self) -> None:
        """SIGTERM: drain, or go at once if nothing was served yet."""
        if not self._server.started:
            os._exit(0)
        self._say(STOPPING="1", STATUS="draining")
        self._tell("stopping", "")
        self._server.should_exit = True

    async def play(self, start: Sequence[Sequence[str]]) -> None:
        """The steps of `start`, in order: the methods below."""
        for what, *values in start:
            await getattr(self, what)(*values)

    async def status(self, text: str) -> None:
        """Say what it does."""
        self._say(STATUS=text)

    async def pause(self, gate: str) -> None:
        """Wait for the test."""
        self._tell("paused", gate)
        await self.app.gate(gate).opened.wait()

    async def say_why(self, text: str, code: str) -> None:
        """Say why it is about to end."""
        self._say(STATUS=text, EXIT_STATUS=code)

    async def exit(self, code: str) -> None:
        """End."""
        os._exit(int(code))

    async def child(self) -> None:
        """Start a process that outlives its parent unless the whole group is ended: an engine core."""
        process = await asyncio.create_subprocess_exec("sleep", "600")
        self._tell("child", str(process.pid))

    async def takes_jobs(self) -> None:
        """Be ready and do nothing: the test speaks for RunPod's SDK."""
        self._say(READY="1", STATUS="ready", X_COLD_START=json.dumps(COLD_START))
        await asyncio.Event().wait()

    async def has_slots(self, number: str) -> None:
        """It works on so many requests at once."""
        self._slots = number

    async def write(self, text: str) -> None:
        """Write a line to standard error."""
        print(text, file=sys.stderr, flush=True)

    async def ready(self, slots: str = "") -> None:
        """Serve until told to stop, `slots` requests at once if it says so."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._uds)
        listener.listen()  # connections queue up from now on
        self._say(
            READY="1", STATUS="ready", X_COLD_START=json.dumps(COLD_START), X_SLOTS=slots or self._slots
        )
        self._tell("ready", "")
        await self._server.serve(sockets=[listener])


async def work(environ: Mapping[str, str]) -> None:
    """Be a worker until SIGTERM, or until the gateway is gone."""
    assert environ["PLATFORM"] == ("http" if "UDS" in environ else "runpod")
    reader, writer = await asyncio.open_unix_connection(environ["SCRIPT_CONTROL"], limit=1 << 24)
    writer.write(json.dumps({"pid": os.getpid(), "env": dict(environ)}).encode() + b"\n")
    play = json.loads(await reader.readline())
    scripts = {
        route: dumped and [Script.load(script) for script in dumped]
        for route, dumped in play["scripts"].items()
    }
    actor = Actor(environ, writer, scripts, repeat=play["repeat"])

    async def obey() -> None:
        while line := await reader.readline():
            actor.app.gate(json.loads(line)["open"]).opened.set()

    obeying = asyncio.create_task(obey())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, actor.stop)
    watch_lifeline(int(environ["LIFELINE_FD"]))
    await actor.play(play["start"])
    obeying.cancel()


if __name__ == "__main__":
    asyncio.run(work(os.environ))
