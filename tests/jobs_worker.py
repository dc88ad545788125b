"""A worker of RunPod (the real SDK) or Lambda whose engine is an application in the test's own process.

`python -m tests.jobs_worker` is that worker and asks the server of links at the socket `ENGINE_SOCKET`.
`python -m tests.jobs_worker gateway` is a gateway in front of one of RunPod.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import sys
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from gateway.__main__ import main as gateway_main
from gateway.upstreams.link import Link
from handler import platforms
from handler.__main__ import end, exit_code
from handler.engine import Engine
from handler.messages import Reply, Request
from handler.phases import Phases
from handler.settings import Settings
from handler.supervision import Notifier, watch_lifeline

COMMAND = (sys.executable, "-m", "tests.jobs_worker")


class SocketEngine:
    """What the platform asks of an engine, asked of the server of links at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.dead: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.is_dead = False
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """Ask on a link of its own: each test has a server of its own."""
        link = Link(self._path)
        try:
            async with link.call(request) as reply:
                yield reply
        finally:
            await link.close()

    def capacity(self) -> int:
        """How many requests it works on at once."""
        return int(os.environ.get("CAPACITY", "8"))

    def submit(self, work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        """Run `work` on the engine's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)


def work() -> None:
    """Take what the platform brings until told to stop."""
    settings = Settings.from_environ(os.environ)
    if settings.lifeline_fd is not None:
        watch_lifeline(settings.lifeline_fd)
    platform = platforms.load(platforms.chosen(os.environ), settings)
    platform.prepare()
    phases = Phases(0.0)
    phases.done()
    engine = cast("Engine", SocketEngine(Path(os.environ["ENGINE_SOCKET"])))
    platform.run(engine, phases, Notifier(settings.notify_socket))


if __name__ == "__main__":
    if sys.argv[1:2] == ["gateway"]:
        sys.exit(gateway_main(["serve", "--upstream", "runpod"], COMMAND))
    end(exit_code(work))
