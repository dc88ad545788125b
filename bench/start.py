"""One cold start, from just before exec to the first text that a client reads."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.memory import Memory, pss_bytes
from bench.servers import busy_s, groups, tree_cpu_s
from handler import explain
from handler.errors import UsageError
from judge.servers import as_settings, free_port

MODEL_ID = "bench"
PROMPT = "Tell me about the sea."
MAX_TOKENS = 16
POLL_S = 0.02
"""How often a server that does not listen yet is tried."""
START_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 10.0
IDLE_S = 0.3
"""A warm parent that took no CPU for so long has nothing left to do."""


class NotStarted(Exception):
    """A server gave no first token; the message says why and names its log."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to start a server for the model: what it is called, and what it alone is given."""

    name: str
    label: str
    kind: str
    """`vllm`: vLLM's own server; `worker`: ours, from exec; `fork`: ours, from a warm parent."""
    flags: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("vllm", "vLLM's own server", "vllm"),
        Variant("vllm-eager", "the same, eager", "vllm", ("--enforce-eager",)),
        Variant("worker", "worker", "worker"),
        Variant("fork", "worker, warm parent", "fork"),
    )
}
"""What is compared; the first is the peer."""


@dataclass(frozen=True, slots=True)
class Case:
    """What every start of a run has in common."""

    model: str
    """A folder."""
    flags: Sequence[str]
    environ: Mapping[str, str]
    kv_cache_bytes: int | None = None
    """What vLLM's servers get; ours plan it themselves."""


@dataclass(frozen=True, slots=True)
class Start:
    """One start: seconds and CPU seconds to the first text, memory in bytes, and what was said."""

    first_s: float
    cpu_s: float
    """Of every process of the server, those that have ended too."""
    peak_bytes: int
    pss_bytes: int
    text: str
    other_cores: float = 0.0
    """How many cores were busy on average with what is neither server nor benchmark."""
    report: explain.Report | None = field(default=None, repr=False)
    """What our worker says of its own cold start."""


@dataclass(frozen=True, slots=True)
class Meter:
    """What the CPU has done when a start began: of the server with all below `pid`, and of all."""

    began_s: float
    busy_s: float
    own_s: float
    server_s: float

    @classmethod
    def begin(cls, pid: int | None = None) -> Meter:
        """From now on; without `pid` there is no process of the server yet."""
        server_s = 0.0 if pid is None else tree_cpu_s(pid)
        busy, own_s = busy_s(), time.process_time()
        return cls(time.monotonic(), busy, own_s, server_s)

    def read(self, pid: int) -> tuple[float, float, float]:
        """Seconds since, CPU seconds of `pid` and all below it since, and how many cores others took."""
        wall_s = time.monotonic() - self.began_s
        cpu_s = tree_cpu_s(pid) - self.server_s
        others_s = busy_s() - self.busy_s - cpu_s - (time.process_time() - self.own_s)
        return wall_s, cpu_s, max(0.0, others_s / wall_s)


def command(variant: Variant, case: Case, port: int) -> tuple[list[str], dict[str, str]]:
    """The command line and the settings of `variant`, listening on `port` of loopback."""
    flags = ["--served-model-name", MODEL_ID, *case.flags, *variant.flags]
    if variant.kind != "vllm":
        own = {"MODEL_NAME": case.model, "HOST": "127.0.0.1", "PORT": str(port), "PLATFORM": "http"}
        return [sys.executable, "-m", "handler"], {**as_settings(flags), **own, **variant.settings}
    # Ours writes no line per request, so theirs doesn't either.
    words = [
        "--model",
        case.model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--disable-uvicorn-access-log",
    ]
    if case.kv_cache_bytes:
        words += ["--kv-cache-memory-bytes", str(case.kv_cache_bytes)]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, *flags], {**variant.settings}


def start(
    variant: Variant, case: Case, environ: Mapping[str, str], log: Path, linger_s: float = 0.0
) -> Start:
    """Start `variant` from nothing, read its first answer, end it. Raises `NotStarted`.

    `environ` is added to that of `case`. The server is left alone for `linger_s` before its end.
    """
    port = free_port()
    words, settings = command(variant, case, port)
    with log.open("wb") as output:
        meter = Meter.begin()
        process = subprocess.Popen(
            words,
            env={**case.environ, **environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        made = _measured(port, meter, process.pid, lambda: _ended(process), log)
        time.sleep(linger_s)
    finally:
        end(process)
    return made


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL for all it has started; returns once they are gone and their memory is free."""
    process.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    finally:  # also where the wait was interrupted
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while any(group == process.pid for group in groups()) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)


class Parent:
    """A warm parent of our workers (`python -m handler zygote`); ended as the block is left."""

    def __init__(self, case: Case, environ: Mapping[str, str], folder: Path) -> None:
        self._log = folder / "parent.log"
        self._path = folder / "parent.sock"
        words, settings = command(VARIANTS["fork"], case, 0)
        self._environ = {**case.environ, **environ, **settings}
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [*words, "zygote", "--socket", str(self._path)],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def start(self) -> Start:
        """Have a worker forked, read its first answer, end it. Raises `NotStarted`.

        The clock starts before the connection to the parent, once that is idle; its memory is
        counted. The first worker waits until the parent is warm.
        """
        self._wait_idle()
        port, at = free_port(), self._log.stat().st_size
        meter = Meter.begin(self._process.pid)
        with self._connected() as client, client.makefile("rb") as answers:
            asked = {"environ": {**self._environ, "PORT": str(port)}, "at_s": meter.began_s}
            client.sendall(json.dumps(asked).encode() + b"\n")
            try:
                pid = _answer(answers.readline()).get("pid")
            except TimeoutError:
                pid = None
            if not isinstance(pid, int):
                raise NotStarted(f"the warm parent forked no worker, see {self._log}")
            try:
                return _measured(port, meter, self._process.pid, lambda: _said(client), self._log, at)
            finally:
                client.shutdown(socket.SHUT_WR)  # its lifeline
                client.settimeout(STOP_TIMEOUT_S)
                try:
                    answers.readline()
                except TimeoutError:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)

    def close(self) -> None:
        """End it."""
        end(self._process)

    def _wait_idle(self) -> None:
        deadline_s, taken_s = time.monotonic() + START_TIMEOUT_S, -1.0
        while taken_s != (taken_s := tree_cpu_s(self._process.pid)):
            if _ended(self._process) or time.monotonic() > deadline_s:
                raise NotStarted(f"the warm parent gets never ready, see {self._log}")
            time.sleep(IDLE_S)

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        while not self._path.exists():  # the parent listens from its first lines on
            if why := _ended(self._process):
                raise NotStarted(f"the warm parent: {why}, see {self._log}")
            time.sleep(POLL_S)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(START_TIMEOUT_S)
            try:
                client.connect(str(self._path))
            except OSError as error:
                raise NotStarted(f"the warm parent does not answer, see {self._log}") from error
            yield client


def _measured(
    port: int, meter: Meter, pid: int, ended: Callable[[], str | None], log: Path, at: int = 0
) -> Start:
    """The start of what will listen on `port`: the tree below `pid`, whose log begins at the byte `at`."""
    with Memory(pid) as memory:
        (first_s, cpu_s, other_cores), text = _ask(port, meter, pid, ended, log)
    return Start(first_s, cpu_s, memory.peak_bytes, pss_bytes(pid), text, other_cores, report(log, at))


def _ask(
    port: int, meter: Meter, pid: int, ended: Callable[[], str | None], log: Path
) -> tuple[tuple[float, float, float], str]:
    """What `meter` reads at the first text, and the whole text."""
    while True:
        try:
            return first_text(port, lambda: meter.read(pid))
        except (ConnectionError, http.client.HTTPException):  # it does not listen yet
            if why := ended():
                raise NotStarted(f"{why}, see {log}") from None
        except (NotStarted, TimeoutError) as error:
            raise NotStarted(f"{error}, see {log}") from None
        if time.monotonic() - meter.began_s > START_TIMEOUT_S:
            raise NotStarted(f"no first token within {START_TIMEOUT_S:g} s, see {log}")
        time.sleep(POLL_S)


def first_text(
    port: int, at_first: Callable[[], tuple[float, float, float]]
) -> tuple[tuple[float, float, float], str]:
    """What `at_first` returned as the first text was read, and the whole text.

    Raises `OSError` or `HTTPException` from what does not listen or answer yet, and `NotStarted` for
    an answer that is none.
    """
    body = {
        "model": MODEL_ID,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": MAX_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    headers = {"Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_TIMEOUT_S)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status == 503:
            raise ConnectionError("it listens, and is not ready")
        if answer.status != 200:
            raise NotStarted(f"it answers {answer.status}: {answer.read()[:500].decode(errors='replace')}")
        first: tuple[float, float, float] | None = None
        text, whole = "", False
        with contextlib.suppress(OSError):  # then it is not whole
            for line in answer:
                whole = whole or line.startswith(b"data: [DONE]")
                if piece := content(line):
                    first = first or at_first()
                    text += piece
    if not whole:
        raise NotStarted(f"its answer broke off after {text!r}")
    if first is None:
        raise NotStarted("it answered without text")
    return first, text


def content(line: bytes) -> str:
    """The text in one line of a streamed chat; none in a line that has no choice."""
    data = line.removeprefix(b"data: ").strip()
    if not line.startswith(b"data: ") or data == b"[DONE]":
        return ""
    choices: list[dict[str, Any]] = json.loads(data).get("choices") or []
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def report(log: Path, at: int = 0) -> explain.Report | None:
    """What our worker has logged of its start, from the byte `at` on; None if it has not."""
    with log.open("rb") as file:
        file.seek(at)
        try:
            return explain.find(file.read().decode(errors="replace").splitlines())
        except UsageError:
            return None


def drop_page_cache() -> str | None:
    """Have the kernel forget what it has read of files; returns why it can't be, or None."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        return f"/proc/sys/vm/drop_caches can't be written: {error.strerror}"
    return None


def _ended(process: subprocess.Popen[bytes]) -> str | None:
    code = process.poll()
    return None if code is None else f"it ended with {code}"


def _said(client: socket.socket) -> str | None:
    """Why there is no worker behind `client` any more, or None."""
    client.setblocking(False)
    try:
        said = client.recv(4096)
    except BlockingIOError:
        return None
    finally:
        client.settimeout(START_TIMEOUT_S)
    return f"it ended with {_answer(said).get('exit')}"


def _answer(line: bytes) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(line or b"{}")
    return answer
