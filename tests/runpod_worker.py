"""A RunPod worker process with the real SDK and no engine: `python -m tests.runpod_worker`.

As `tests.scripted_worker` it gets its scripts from the `Director` at `SCRIPT_CONTROL` and tells it
what it sees. `{"die": true}` from there is the death of the engine.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import sys
import threading
from collections.abc import Coroutine
from typing import Any, cast

from handler.__main__ import end, exit_code
from handler.asgi import call_app
from handler.engine import Engine
from handler.phases import Phases
from handler.platforms import runpod
from handler.settings import Settings
from handler.supervision import Notifier, watch_lifeline
from tests.scripted_app import Script, ScriptedApp

COMMAND = (sys.executable, "-m", "tests.runpod_worker")


class RemoteEngine:
    """What the platform asks of an engine, played by a scripted application on a loop in a thread."""

    def __init__(self, environ: dict[str, str], capacity: int) -> None:
        self._environ = environ
        self._capacity = capacity
        self.dead: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._opened: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.loop: asyncio.AbstractEventLoop
        threading.Thread(target=lambda: asyncio.run(self._live()), daemon=True).start()
        self._opened.result()

    async def _live(self) -> None:
        self.loop = asyncio.get_running_loop()
        reader, writer = await asyncio.open_unix_connection(self._environ["SCRIPT_CONTROL"], limit=1 << 24)
        hello = {"pid": os.getpid(), "env": self._environ}
        writer.write(json.dumps(hello).encode() + b"\n")
        play = json.loads(await reader.readline())
        scripts = {route: [Script.load(s) for s in dumped] for route, dumped in play["scripts"].items()}

        def tell(what: str, name: str) -> None:
            writer.write(json.dumps([what, name]).encode() + b"\n")

        app = ScriptedApp(scripts, repeat=["repeat"] in play["start"], tell=tell)
        self.call = call_app(app, keep_alive_s=0)
        self._opened.set_result(None)
        while line := await reader.readline():
            order = json.loads(line)
            if order.get("die"):
                self.dead.set_result(None)
            else:
                app.gate(order["open"]).opened.set()

    @property
    def is_dead(self) -> bool:
        """Whether the test has killed it."""
        return self.dead.done()

    def capacity(self) -> int:
        """How many requests it works on at once."""
        return self._capacity

    def submit(self, work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        """Run `work` on the engine's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)


def work() -> None:
    """Take jobs until told to stop."""
    environ = dict(os.environ)
    settings = Settings.from_environ(environ)
    if settings.lifeline_fd is not None:
        watch_lifeline(settings.lifeline_fd)
    platform = runpod.open(settings)
    platform.fit()
    platform.prepare()
    phases = Phases(0.0)
    phases.done()
    engine = cast("Engine", RemoteEngine(environ, int(environ.get("CAPACITY", "8"))))
    platform.run(engine, phases, Notifier(settings.notify_socket))


if __name__ == "__main__":
    end(exit_code(work))
