"""How a worker's process comes to be: started from nothing, or forked by a warm parent.

Either way it has an end of a lifeline, which it drains on when the other closes, and leads a
process group of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from gateway.upstreams import folder
from gateway.upstreams.output import Output, secrets_of
from gateway.upstreams.precedence import before_us

FORK_LINE_MAX_BYTES = 64 << 10
NEWS_S = 1.0
"""How long after a worker's end its parent may take to say how it was."""
PARENT_GRACE_S = 5.0
"""What a warm parent gets to end its last worker, which was told to end before it."""


class Launched(Protocol):
    """A process, from its start on."""

    pid: int

    async def wait(self) -> int:
        """How it exited, as `subprocess` says it; to be called once."""

    def let_go(self) -> None:
        """Close the lifeline."""


class Launcher(Protocol):
    """Starts workers."""

    async def launch(self, environ: Mapping[str, str], output: Output) -> Launched:
        """Start one, which writes to `output`. Raises `OSError` if it can't be."""

    async def close(self) -> None:
        """Leave no process but the workers."""

    def kill(self) -> None:
        """The same at once."""


class Fresh:
    """Starts `command` anew for each worker."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command

    async def launch(self, environ: Mapping[str, str], output: Output) -> Launched:
        """A process of its own."""
        process, lifeline = await _spawn(self._command, environ, output)
        return _Spawned(process, lifeline)

    async def close(self) -> None:
        """Nothing: there is no warm parent."""

    def kill(self) -> None:
        """Nothing: there is no warm parent."""


class WarmParent:
    """Has workers forked by a process that has imported vLLM (`python -m handler zygote`).

    It starts with the first worker, and again if it has died. `socket_path` is where it listens,
    in a private folder: whoever can connect can have a worker started.
    """

    def __init__(self, command: Sequence[str], socket_path: Path) -> None:
        self._command = (*command, "zygote", "--socket", str(socket_path))
        self._socket_path = socket_path
        self._process: asyncio.subprocess.Process | None = None
        self._output: Output | None = None
        self._starting = asyncio.Lock()
        self._hung = False
        self._lifeline = -1

    async def launch(self, environ: Mapping[str, str], output: Output) -> Launched:
        """Have one forked, once the parent has imported what there is to import."""
        asked = {"environ": dict(environ), "at_s": time.monotonic(), "output": str(output.pipe)}
        try:
            async with self._starting:
                await self._start(environ)
            reader, writer = await self._connect()
            try:
                writer.write(json.dumps(asked).encode() + b"\n")
                answer = _answer(await reader.readline())
                return _Forked(int(answer["pid"]), reader, writer)
            except BaseException:
                writer.close()
                raise
        except KeyError as error:
            self._tell_why(output)
            raise ConnectionError("the warm parent ended before it had forked a worker") from error
        except ConnectionError:
            self._tell_why(output)
            raise
        except asyncio.CancelledError:
            self._hung = True  # it was given its time: the next worker needs one that answers
            self.kill()
            raise

    def _tell_why(self, output: Output) -> None:
        """What the parent has said is all there is of a worker that it has not forked."""
        if self._output is not None:
            output.add(self._output.tail)

    async def _start(self, environ: Mapping[str, str]) -> None:
        if self._process is not None and self._process.returncode is None:
            if not self._hung:
                return
            await self._process.wait()
        self._hung = False
        self._let_go()
        self._socket_path.unlink(missing_ok=True)
        self._output = Output(
            self._socket_path.with_suffix(".out"), self._socket_path.with_suffix(".log"), secrets_of(environ)
        )
        self._process, self._lifeline = await _spawn(self._command, environ, self._output)
        folder.remember(self._socket_path.with_suffix(".pid"), self._process.pid)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        assert self._process is not None, "started"
        while True:
            with suppress(FileNotFoundError, ConnectionRefusedError):
                return await asyncio.open_unix_connection(str(self._socket_path), limit=FORK_LINE_MAX_BYTES)
            if self._process.returncode is not None:
                raise ConnectionError(f"the warm parent exited with code {self._process.returncode}")
            await asyncio.sleep(0.02)  # it binds its socket before it imports anything

    async def close(self) -> None:
        """End the parent; by then its workers have ended, or do as their lifelines do."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), PARENT_GRACE_S)
        except TimeoutError:
            self.kill()
            await self._process.wait()
        self._let_go()

    def kill(self) -> None:
        """End the parent now."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _let_go(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if self._output is not None:
            self._output.close()


class _Spawned:
    def __init__(self, process: asyncio.subprocess.Process, lifeline: int) -> None:
        self.pid = process.pid
        self._process = process
        self._lifeline = lifeline

    async def wait(self) -> int:
        return await self._process.wait()

    def let_go(self) -> None:
        os.close(self._lifeline)


class _Forked:
    def __init__(self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.pid = pid
        self._reader = reader
        self._writer = writer

    async def wait(self) -> int:
        """The parent says how it ended; if the parent is gone, nobody knows, and it counts as killed."""
        code = -signal.SIGKILL
        told = asyncio.ensure_future(self._reader.readline())
        try:
            await self._ended(told)
            with suppress(OSError, TimeoutError):
                code = _answer(await asyncio.wait_for(told, NEWS_S)).get("exit", code)
        finally:
            told.cancel()
            self._writer.close()
        return code

    async def _ended(self, told: asyncio.Future[bytes]) -> None:
        """Return once it has ended, or the parent has said something."""
        try:
            ended = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        loop, gone = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(ended, gone.set)
        waiting = asyncio.ensure_future(gone.wait())
        try:
            # Not the parent's word alone: without it the connection may live on in what the worker started.
            either: set[asyncio.Future[Any]] = {told, waiting}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            loop.remove_reader(ended)
            os.close(ended)

    def let_go(self) -> None:
        self._writer.close()


def _answer(line: bytes) -> dict[str, int]:
    """What the parent says; nothing once it is gone, be it in the middle of a line."""
    return json.loads(line) if line.endswith(b"\n") else {}


async def _spawn(
    command: Sequence[str], environ: Mapping[str, str], output: Output
) -> tuple[asyncio.subprocess.Process, int]:
    """`command`, started with a lifeline, and our end of that."""
    said = os.open(output.pipe, os.O_WRONLY | os.O_CLOEXEC)
    theirs, ours = os.pipe()
    try:
        with before_us():
            process = await asyncio.create_subprocess_exec(
                *command,
                env={**environ, "LIFELINE_FD": str(theirs)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=(theirs,),
                start_new_session=True,  # a terminal's Ctrl-C is for the gateway to pass on
            )
    except OSError as error:
        os.close(ours)
        raise OSError(error.errno, f"{command[0]}: {error.strerror}") from error
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
        os.close(said)
    return process, ours
