"""vLLM's own server and ours, as processes on loopback, with the same flags."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

START_TIMEOUT_S = 480
STOP_TIMEOUT_S = 30
GIVEN = Path("/proc/sys/net/ipv4/ip_local_port_range")
PORTS_FROM = 10_000
"""Below are those of services that one knows by their number."""
KEY = "token-abc123"
"""The key that vLLM's tests send, also to a server that asks for none."""


@dataclass
class Server:
    """A started server; leaving the `with` ends it and everything it started."""

    process: subprocess.Popen[bytes]
    root: str
    """The URL below which `/v1/...` lies."""
    key: str
    log: Path
    started_s: float = field(default=0.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait(self, path: str) -> None:
        """Return when `path` answers 200; raise `RuntimeError` if the process ends or takes too long."""
        began = time.monotonic()
        headers = {"Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(self.root + path, headers=headers)  # noqa: S310 - http, see `root`
        while True:
            try:
                with urllib.request.urlopen(request, timeout=START_TIMEOUT_S):  # noqa: S310 - as above
                    self.started_s = time.monotonic() - began
                    return
            except OSError:
                if self.process.poll() is not None:
                    raise RuntimeError(
                        f"the server ended with {self.process.returncode}, see {self.log}"
                    ) from None
                if time.monotonic() - began > START_TIMEOUT_S:
                    raise RuntimeError(
                        f"the server did not start in {START_TIMEOUT_S} s, see {self.log}"
                    ) from None
                time.sleep(0.25)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for the whole process group."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def vllm(model: str, flags: Sequence[str], environ: Mapping[str, str], log: Path) -> Server:
    """vLLM's own server for `model`, ready."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += [*without(flags, "host", "port"), "--host", "127.0.0.1", "--port", str(port)]
    return start(command, environ, f"http://127.0.0.1:{port}", "/health", KEY, log)


def ours(model: str, flags: Sequence[str], environ: Mapping[str, str], log: Path) -> Server:
    """Our gateway and its one worker for `model`, ready; the flags go through our settings."""
    port = free_port()
    settings = as_settings(without(flags, "host", "port", "root-path"))
    key = settings.pop("API_KEY", environ.get("VLLM_API_KEY", KEY))
    environ = {name: value for name, value in environ.items() if name != "VLLM_API_KEY"}
    settings |= {"MODEL_NAME": model, "HOST": "127.0.0.1", "PORT": str(port), "API_KEY": key}
    settings |= {"DATA_DIR": str(log.with_suffix(".data"))}
    root = f"http://127.0.0.1:{port}/v2/local/openai"
    return start([sys.executable, "-m", "gateway"], {**environ, **settings}, root, "/v1/models", key, log)


def start(
    command: list[str], environ: Mapping[str, str], root: str, ready: str, key: str, log: Path
) -> Server:
    """Start `command` in a process group of its own and return once `ready` answers 200.

    Raises `RuntimeError`, which names the log, if that does not come.
    """
    with log.open("wb") as out:
        out.write((shlex.join(command) + "\n").encode())
        process = subprocess.Popen(
            command, env=dict(environ), stdin=subprocess.DEVNULL, stdout=out, stderr=out, process_group=0
        )
    server = Server(process, root, key, log)
    try:
        server.wait(ready)
    except BaseException:
        server.stop()
        raise
    return server


def free_port() -> int:
    """A loopback port that nobody has just now.

    Nor does the kernel give it to anybody who wants any port, or connects: until it is used many do.
    """
    with contextlib.suppress(FileNotFoundError):  # no Linux
        given_from = int(GIVEN.read_text().split()[0])
        while given_from > PORTS_FROM:
            port = PORTS_FROM + secrets.randbelow(given_from - PORTS_FROM)
            with contextlib.suppress(OSError), socket.socket() as probe:  # somebody has it
                probe.bind(("127.0.0.1", port))
                return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


Flags = list[tuple[str, list[str]]]
ABBREVIATED = {"lora-module": "lora-modules"}
"""What the tests abbreviate: argparse takes the beginning of a flag for the flag, settings do not."""


def parse(flags: Sequence[str]) -> Flags:
    """Command-line flags as (name in kebab case without dashes, values)."""
    found: Flags = []
    for word in flags:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("_", "-")
            found.append((ABBREVIATED.get(name, name), [value] if equals else []))
        elif not found:
            raise ValueError(f"{word!r} belongs to no flag")
        else:
            found[-1][1].append(word)
    return found


def without(flags: Sequence[str], *names: str) -> list[str]:
    """`flags` without those called `names` and their values."""
    return [word for name, values in parse(flags) if name not in names for word in (f"--{name}", *values)]


def as_settings(flags: Sequence[str]) -> dict[str, str]:
    """vLLM's flags as our environment variables.

    `--max-model-len 8` is `MAX_MODEL_LEN=8`; `--enforce-eager` is `ENFORCE_EAGER=true`,
    `--no-enable-x` is `ENABLE_X=false`, `--a.b c` is `A={"b": "c"}`, several values are a
    JSON list.
    """
    settings: dict[str, str] = {}
    for name, values in parse(flags):
        flag, dot, inner = name.partition(".")
        if dot:
            known = json.loads(settings.get(_upper(flag), "{}"))
            settings[_upper(flag)] = json.dumps({**known, inner.replace("-", "_"): values[0]})
        elif values:
            settings[_upper(flag)] = values[0] if len(values) == 1 else json.dumps(values)
        elif flag.startswith("no-"):
            settings[_upper(flag[3:])] = "false"
        else:
            settings[_upper(flag)] = "true"
    return settings


def _upper(flag: str) -> str:
    return flag.replace("-", "_").upper()
