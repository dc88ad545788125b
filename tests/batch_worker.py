"""`PLATFORM=sqs python -m handler` with other engines, and quicker: `python -m tests.batch_worker`.

It asks the server of links at the socket `ENGINE_SOCKET`, which is the test's, or without one answers by
itself (`tests.scripted_app.echo`) until `ENGINE_DIES_AFTER` so many requests.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from handler.__main__ import end, exit_code
from handler.asgi import call_app
from handler.batch_window import Pace
from handler.engine import Engine
from handler.phases import Phases
from handler.platforms.s3_batch import S3Batches
from handler.platforms.sqs import Sqs
from handler.settings import Settings
from handler.supervision import Notifier
from tests import batch_stack
from tests.jobs_worker import SocketEngine
from tests.scripted_app import Script, ScriptedApp, Seen, answer, echo
from tests.servers import ROOT, engine_environ

TIMES, QUEUE_TIMES = replace(batch_stack.QUICK, lease_s=2.0), replace(batch_stack.QUICK_QUEUE, hidden_s=3)
"""What one that was killed had held is soon its successor's; there are never two at a time."""


class OwnEngine:
    """An engine that answers by itself, on a loop of its own."""

    def __init__(self, dies_after: float) -> None:
        self._left = dies_after
        self.dead: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.call = call_app(ScriptedApp({}, makes={batch_stack.CHAT: self._make}, remembers=False))

    def _make(self, seen: Seen) -> Script:
        self._left -= 1
        if self._left >= 0:
            return echo(seen)
        if not self.is_dead:
            self.dead.set_result(None)
        return answer({"error": {"message": "EngineCore encountered an issue."}}, 500)

    @property
    def is_dead(self) -> bool:
        """Whether it has answered as much as it may."""
        return self.dead.done()

    def capacity(self) -> int:
        """How many requests it works on at once."""
        return 64

    def submit(self, work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        """Run `work` on the engine's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)


def work() -> None:
    """Take messages until told to stop."""
    settings = Settings.from_environ(os.environ)
    pace = partial(Pace, part_lines=20) if "SMALL_PARTS" in os.environ else Pace

    def batches(clients: Any) -> S3Batches:
        return S3Batches(settings, clients, times=TIMES, pace=pace)

    platform = Sqs(settings, QUEUE_TIMES, batches)
    platform.prepare()
    phases = Phases(0.0)
    phases.done()
    socket = os.environ.get("ENGINE_SOCKET")
    own = OwnEngine(float(os.environ.get("ENGINE_DIES_AFTER", "inf")))
    engine = SocketEngine(Path(socket)) if socket else own
    platform.run(cast("Engine", engine), phases, Notifier(settings.notify_socket))


def environ(resources: batch_stack.Resources, **settings: str) -> dict[str, str]:
    """The environment of a worker."""
    return {
        **engine_environ(ROOT),
        **resources.store.environ,
        "PLATFORM": "sqs",
        **resources.environ,
        **settings,
    }


@contextmanager
def worker(
    environ: Mapping[str, str], errors: Path, module: str = "tests.batch_worker"
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker's process; killed when the block is left."""
    with errors.open("ab") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    end(exit_code(work))
