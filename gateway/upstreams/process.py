"""One worker process: started in a group of its own, heard through `NOTIFY_SOCKET`, ended whole."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.upstreams import folder
from gateway.upstreams.launch import Launched, Launcher
from gateway.upstreams.notify import NotifySocket
from gateway.upstreams.output import Output

NOT_INHERITED = ("HOST", "PORT", "API_KEY", "DATABASE_URL")
"""The gateway's own: a worker has no port, and no key of clients."""

_REASONS = {
    64: "its command line is wrong",
    65: "what was baked does not match its manifest",
    66: "the model was not found",
    70: "the engine failed",
    75: "the machine lacks memory, a device or a system library",
    78: "its settings are wrong",
}
PERMANENT = frozenset({64, 65, 66, 78})
"""Exit codes (sysexits.h) that come again until a person changes something."""
SLOTS_GUESS = 16
"""How many requests a worker works on at once that has not said it (`X_SLOTS`)."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a worker ended: `code` as `subprocess` gives it, `said` its last word on why."""

    code: int
    said: str | None = None

    @property
    def reason(self) -> str:
        """One clause for a person, without a full stop."""
        if self.said:
            return self.said.rstrip(".")
        if self.code < 0:
            with suppress(ValueError):
                return f"it was ended by {signal.Signals(-self.code).name}"
        return _REASONS.get(self.code, f"it exited with code {self.code}")


class WorkerProcess:
    """A worker from its start to its end.

    Three futures tell its life: `ready` holds what it measured of its cold start, once it
    said READY=1; `left` is done when it takes no more; `exited` holds how it ended. Files of its
    own are called `path` and a suffix. Raises `OSError` if they can't be made.
    """

    def __init__(self, path: Path, output: Output, progress: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()
        self.path = path
        self.output = output
        self.slots = 0
        """How many requests it works on at once; known once it is ready."""
        self.ready: asyncio.Future[dict[str, Any]] = loop.create_future()
        self.exited: asyncio.Future[Exit] = loop.create_future()
        self.left: asyncio.Future[None] = loop.create_future()
        self._progress = progress
        self._said: str | None = None
        self._process: Launched | None = None
        self._life: asyncio.Task[None] | None = None
        self._notify = NotifySocket(path.with_suffix(".notify"), self._hear)

    def start(self, launcher: Launcher, environ: Mapping[str, str], told: Mapping[str, str]) -> None:
        """Have `launcher` start it in `environ`; `told` is how it is asked."""
        env = {name: value for name, value in environ.items() if name not in NOT_INHERITED}
        env |= {**told, "NOTIFY_SOCKET": str(self.path.with_suffix(".notify"))}
        self._life = asyncio.create_task(self._live(launcher, env))

    @property
    def pid(self) -> int | None:
        """Its process id, once it has one."""
        return None if self._process is None else self._process.pid

    async def _live(self, launcher: Launcher, environ: Mapping[str, str]) -> None:
        end = Exit(70, "it was told to end before it had begun")
        try:
            self._process = await launcher.launch(environ, self.output)
            folder.remember(self._pid_file, self._process.pid)
            code = await self._process.wait()
            self._kill_group()  # what it started and left behind
            self._notify.drain()
            end = Exit(code, self._said)
        except OSError as error:
            end = Exit(70, error.strerror or str(error))
        finally:
            self._close()
            self.exited.set_result(end)

    def is_leaving(self) -> bool:
        """Whether it takes no more, by what it has said up to now."""
        if not self.exited.done():
            self._notify.drain()
        return self.left.done()

    def leave(self) -> None:
        """It takes no more, whoever said so."""
        if not self.left.done():
            self.left.set_result(None)

    def terminate(self) -> None:
        """Ask the worker to drain. The processes it started are its own to stop."""
        self.leave()
        if self._process is None:
            self._give_up()
            return
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGTERM)

    def kill(self, why: str | None = None) -> None:
        """End the worker's whole group now, expected or, for a reason that is told, not."""
        if why is None:
            self.leave()
        self._said = why or self._said
        self._kill_group()

    def _kill_group(self) -> None:
        if self._process is None:
            self._give_up()
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _give_up(self) -> None:
        """It has no process yet: want none."""
        if self._life is not None:
            self._life.cancel()

    async def end(self, timeout_s: float) -> None:
        """Terminate, and kill what is left after `timeout_s`."""
        if not self.exited.done():
            self.terminate()
        await asyncio.wait({self.exited}, timeout=timeout_s)
        if not self.exited.done():
            self.kill()
            await asyncio.wait({self.exited})

    def _hear(self, fields: Mapping[str, str]) -> None:
        if "STOPPING" in fields:
            self.leave()
        elif "EXIT_STATUS" in fields:
            self._said = fields.get("STATUS") or None
        elif "READY" in fields:
            if not self.ready.done():
                self.slots = _slots(fields.get("X_SLOTS", ""))
                self.ready.set_result(_cold_start(fields.get("X_COLD_START", "")))
        elif status := fields.get("STATUS"):
            self._progress(status)

    def _close(self) -> None:
        self._notify.close()
        self.output.close()
        self._pid_file.unlink(missing_ok=True)
        if self._process is not None:
            self._process.let_go()

    @property
    def _pid_file(self) -> Path:
        return self.path.with_suffix(".pid")


def _slots(text: str) -> int:
    return max(1, int(text)) if text.isdecimal() and len(text) < 7 else SLOTS_GUESS


def _cold_start(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
