r"""A warm parent: imports once, forks workers.

A fork has every module that its parent has imported and shares the memory until it writes to
it, so a worker starts without importing: the next one of a model, and the one after an engine
that died. The parent runs one thread, holds no model and never touches CUDA.

Clients speak over a unix socket. Each connection is one worker:

    client  {"environ": {"MODEL_NAME": "...", ...}, "at_s": 12.5, "output": "/run/1.out"}\n
    parent  {"pid": 4711}\n    once it was forked
    parent  {"exit": 70}\n     once it has ended; -9 for a signal

`environ` is the worker's whole environment; `at_s`, which may be left out, is from when its cold
start counts (CLOCK_MONOTONIC); `output`, a file or a named pipe that is read, is where its standard
output and error go, to the parent's own if it is left out. A client that closes the connection
ends its worker, which drains first: the connection is its lifeline. Each worker leads a session of
its own.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Self

log = logging.getLogger(__name__)

REQUEST_MAX_BYTES = 4 << 20
"""An environment is at most some hundred KiB (execve(2)), twice that as JSON."""
READ_BYTES = 64 << 10
ENGINE_DIED = 70
BACK_OFF_MAX_S = 60.0
STEADY_S = 60.0
"""A worker that lived this long and died is replaced at once."""

Environ = dict[str, str]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: the worker's environment, when it was asked for (monotonic clock), and where it writes."""

    environ: Environ
    at_s: float
    output: str | None = None

    @classmethod
    def parse(cls, line: bytes) -> Self:
        """The request in `line`. Raises `ValueError` for anything else."""
        try:
            asked = json.loads(line)
        except ValueError as error:
            raise ValueError(f"not one line of JSON: {error}") from error
        environ = asked.get("environ") if isinstance(asked, dict) else None
        if not isinstance(environ, dict) or not all(isinstance(value, str) for value in environ.values()):
            raise ValueError('a request is {"environ": {NAME: value}}')
        at_s, output = asked.get("at_s"), asked.get("output")
        return cls(
            environ,
            float(at_s) if isinstance(at_s, int | float) else time.monotonic(),
            output if isinstance(output, str) else None,
        )


Tell = Callable[[bytes], None]
"""With it a worker tells its parent which modules it has imported, once, when it is ready."""


@dataclass(slots=True)
class Child:
    """One worker: who asked for it, and a descriptor that is readable when it has ended."""

    pid: int
    pidfd: int
    asked: Asked
    client: socket.socket | None
    began_s: float = field(default_factory=time.monotonic)


@dataclass(slots=True)
class Zygote:
    """Forks workers until SIGTERM, or until the descriptor `lifeline` closes.

    `work` is called in the fork and returns its exit code. `unsafe` says why this process must
    not fork, or None; then `instead` starts the worker from the beginning and returns its id.
    `learn` is given what a worker told.
    """

    work: Callable[[Asked, Tell], int]
    unsafe: Callable[[], str | None]
    instead: Callable[[Asked, int | None], int]
    learn: Callable[[bytes], None]
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _children: dict[int, Child] = field(default_factory=dict)
    _requests: dict[socket.socket, bytearray] = field(default_factory=dict)
    _again: tuple[float, Asked] | None = None
    _failures: int = 0
    _stopping: bool = False
    _code: int = 0

    def serve(self, listener: socket.socket, lifeline: int | None = None) -> int:
        """Answer the clients of `listener`; returns 0 once every worker has ended."""
        self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))
        if lifeline is not None:
            self._selector.register(lifeline, selectors.EVENT_READ, self._stop)
        return self._run()

    def keep(self, environ: Environ) -> int:
        """Keep one worker: a new one when its engine has died. Returns how the last one exited."""
        self._begin(None, Asked(environ, time.monotonic()))
        return self._run()

    def _run(self) -> int:
        heard, told = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        wakeup = signal.set_wakeup_fd(told)
        before = {
            signum: signal.signal(signum, lambda *_: None) for signum in (signal.SIGTERM, signal.SIGINT)
        }
        self._selector.register(heard, selectors.EVENT_READ, self._stop)
        try:
            while self._children or self._again or (self._selector.get_map() and not self._stopping):
                wait_s = None if self._again is None else max(0.0, self._again[0] - time.monotonic())
                for key, _ in self._selector.select(wait_s):
                    key.data()
                if self._again is not None and time.monotonic() >= self._again[0]:
                    (_, asked), self._again = self._again, None
                    self._begin(None, asked)
        finally:
            signal.set_wakeup_fd(wakeup)
            for signum, handler in before.items():
                signal.signal(signum, handler)
            self._selector.close()
            os.close(heard)
            os.close(told)
        return self._code

    def _stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        self._again = None
        for client in list(self._requests):
            self._drop(client)
        ends = {child.pidfd for child in self._children.values()}
        for key in list(self._selector.get_map().values()):
            if key.fd not in ends:
                self._selector.unregister(key.fileobj)
        for pid in self._children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _accept(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        client.setblocking(False)
        self._requests[client] = bytearray()
        self._selector.register(client, selectors.EVENT_READ, partial(self._read, client))

    def _read(self, client: socket.socket) -> None:
        request = self._requests[client]
        try:
            got = client.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            got = b""
        request += got
        if not got or len(request) > REQUEST_MAX_BYTES:
            self._drop(client)
        elif request.endswith(b"\n"):
            try:
                asked = Asked.parse(bytes(request))
            except ValueError as error:
                _say(client, {"error": str(error)})
                self._drop(client)
                return
            del self._requests[client]
            self._selector.unregister(client)
            client.setblocking(True)
            self._begin(client, asked)

    def _drop(self, client: socket.socket) -> None:
        del self._requests[client]
        self._selector.unregister(client)
        client.close()

    def _begin(self, client: socket.socket | None, asked: Asked) -> None:
        fd = None if client is None else client.fileno()
        given = asked if fd is None else replace(asked, environ={**asked.environ, "LIFELINE_FD": str(fd)})
        if reason := self.unsafe():
            log.warning("a worker starts without the warm parent", extra={"reason": reason})
            pid = self.instead(given, fd)
        else:
            pid = self._fork(client, given)
        child = Child(pid, os.pidfd_open(pid), asked, client)
        self._children[pid] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ, partial(self._ended, child))
        if client is not None:
            _say(client, {"pid": pid})

    def _fork(self, client: socket.socket | None, asked: Asked) -> int:
        heard, told = os.pipe2(os.O_CLOEXEC)
        if pid := os.fork():
            os.close(told)
            self._selector.register(heard, selectors.EVENT_READ, partial(self._hear, heard, bytearray()))
            return pid
        code = ENGINE_DIED
        try:
            os.close(heard)
            self._forget(client)
            if asked.output is not None:
                speak_to(asked.output)
            code = self.work(asked, partial(_tell, told))
        except BaseException:  # the boundary of a process
            log.exception("a worker failed")
        finally:  # whatever happens, a fork must not go on as its parent
            os._exit(code)

    def _forget(self, client: socket.socket | None) -> None:
        """In the fork: hold nothing of the parent's or of another worker's."""
        os.setsid()
        signal.set_wakeup_fd(-1)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_DFL)
        for key in self._selector.get_map().values():
            os.close(key.fd)  # and not unregister: the selector is the parent's as well
        self._selector.close()
        for child in self._children.values():
            if child.client is not None:
                child.client.close()
        if client is not None:
            client.detach()  # from here on it is a lifeline, and the worker knows its number

    def _hear(self, heard: int, told: bytearray) -> None:
        got = os.read(heard, READ_BYTES)
        told += got
        if not got:
            self._selector.unregister(heard)
            os.close(heard)
            if told:
                self.learn(bytes(told))

    def _ended(self, child: Child) -> None:
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        _, status = os.waitpid(child.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # what it started and left behind
        del self._children[child.pid]
        if child.client is not None:
            _say(child.client, {"exit": code})
            child.client.close()
        elif code == ENGINE_DIED and not self._stopping:
            self._replace(child)
        else:
            self._code = code if code >= 0 else 128 - code
            self._stop()

    def _replace(self, child: Child) -> None:
        now_s = time.monotonic()
        self._failures = 0 if now_s - child.began_s > STEADY_S else self._failures + 1
        wait_s = min(BACK_OFF_MAX_S, 2.0**self._failures - 1)
        log.error("the engine died; a new worker is forked", extra={"in_s": wait_s})
        self._again = (now_s + wait_s, Asked(child.asked.environ, now_s + wait_s))


def speak_to(output: str) -> None:
    """Have what this process writes go to `output`; it stays where it went if nobody reads that."""
    with suppress(OSError):
        fd = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(fd, True)
        for standard in (1, 2):
            os.dup2(fd, standard)
        os.close(fd)


def threads() -> list[str]:
    """The names of this process's threads, the main one included."""
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def _tell(fd: int, modules: bytes) -> None:
    with suppress(OSError):  # the parent is gone: there is nothing to learn for
        os.write(fd, modules)
    os.close(fd)


def _say(client: socket.socket, answer: dict[str, object]) -> None:
    with suppress(OSError):  # it has gone; its worker notices by itself
        client.send(json.dumps(answer).encode() + b"\n")
