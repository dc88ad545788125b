"""The three servers that are measured, all loaded at once; whoever is not measured is frozen.

How a server is started and stopped is the judges' business too, so it is theirs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from judge.servers import Server, as_settings, free_port, ours, start, vllm

NOT_OURS_TO_GIVE = (
    "API_KEY",
    "AUTH",
    "CORS_ORIGINS",
    "HOST",
    "MODEL_REVISION",
    "PORT",
    "SERVED_MODEL_NAME",
    "UDS",
)
"""Settings that a user's shell may hold and that would make one server differ from another."""

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Subject:
    """One server: `name` says which path to the model it is."""

    name: str
    server: Server

    @property
    def address(self) -> tuple[str, int, str]:
        """Host, port, and the path of chat completions."""
        url = urlsplit(self.server.root)
        assert url.port, "every server here has one"
        return "127.0.0.1", url.port, f"{url.path}/v1/chat/completions"

    def freeze(self) -> None:
        """Stop the server and all it started, so that its idling disturbs nobody."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def cpu_s(self) -> float:
        """What the server and all it started have taken of the CPU so far."""
        return tree_cpu_s(self.server.process.pid)

    def threads(self) -> str | None:
        """The OpenMP threads that the server gave the process of its model, None if it set none."""
        for pid in reversed(tree(self.server.process.pid)):
            for variable in Path(f"/proc/{pid}/environ").read_text().split("\0"):
                if variable.startswith("OMP_NUM_THREADS="):
                    return variable.partition("=")[2]
        return None

    def _signal(self, signum: signal.Signals) -> None:
        for pid in tree(self.server.process.pid):
            os.kill(pid, signum)


@contextmanager
def subjects(
    model: str, flags: Sequence[str], environ: Mapping[str, str], logs: Path
) -> Iterator[Sequence[Subject]]:
    """vLLM's own server, our worker alone, and our gateway with its worker: started, and frozen.

    `flags` are vLLM's; ours get the same as settings. Raises `RuntimeError`, which names the
    log, when one does not start.
    """
    environ = {name: value for name, value in environ.items() if name not in NOT_OURS_TO_GIVE}
    # Ours writes no line per request, so theirs doesn't either.
    quiet = [*flags, "--disable-uvicorn-access-log"]
    with ExitStack() as stack:
        running: list[Subject] = []
        for name, begin, given in (
            ("vllm", vllm, quiet),
            ("worker", worker, flags),
            ("gateway", ours, flags),
        ):
            print(f"starting {name}", file=sys.stderr, flush=True)
            subject = Subject(name, stack.enter_context(begin(model, given, environ, logs / f"{name}.log")))
            stack.callback(subject.thaw)  # else it could not end
            subject.freeze()
            running.append(subject)
        yield running


def worker(model: str, flags: Sequence[str], environ: Mapping[str, str], log: Path) -> Server:
    """Our worker without a gateway, over TCP and without a key, ready."""
    port = free_port()
    settings = {"MODEL_NAME": model, "HOST": "127.0.0.1", "PORT": str(port), "PLATFORM": "http"}
    command = [sys.executable, "-m", "handler"]
    root = f"http://127.0.0.1:{port}"
    return start(command, {**environ, **as_settings(flags), **settings}, root, "/ready", "none", log)


def tree(pid: int) -> list[int]:
    """`pid` and every process below it, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (stat := _stat(int(entry.name))):
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def groups() -> Iterator[int]:
    """The process group of each process that has not ended; a zombie holds nothing."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (stat := _stat(int(entry.name))) and stat[0] not in "ZX":
            yield int(stat[2])


def busy_s() -> float:
    """What all cores together have been busy since the machine started, in seconds."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split()[1:11]
    )
    return (user + nice + system + irq + softirq) / _TICKS_PER_S


def tree_cpu_s(pid: int) -> float:
    """What `pid`, every process below it and those of them that have ended have taken of the CPU."""
    return sum(sum(map(int, _stat(process)[11:15])) for process in tree(pid)) / _TICKS_PER_S


def cpu_s(pid: int) -> float:
    """What `pid` itself has taken of the CPU."""
    return sum(map(int, _stat(pid)[11:13])) / _TICKS_PER_S


def _stat(pid: int) -> list[str]:
    """The fields of proc_pid_stat(5) from `state` on, or none if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
