"""The health check of a container: what it asks where, and what it needs to start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from handler import healthcheck
from handler.platforms import LISTENING, ORDER, chosen, listens

JOBS = {"RUNPOD_WEBHOOK_GET_JOB": "https://plane/job-take/$ID?gpu=x"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that were asked for `/ping`, in place of asking."""
    addresses: list[Any] = []

    def ping(address: Any) -> tuple[bool, str]:
        addresses.append(address)
        return True, "ready"

    monkeypatch.setattr(healthcheck, "ping", ping)
    return addresses


def worker(folder: Path, pid: int, *words: str, state: str = "S") -> None:
    """A process in `folder`, as `/proc` shows one."""
    (folder / str(pid)).mkdir(parents=True)
    (folder / str(pid) / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))
    (folder / str(pid) / "stat").write_text(f"{pid} (python (3) x) {state} 1 1 0")


@pytest.mark.parametrize(
    ("environ", "address"),
    [
        ({}, ("127.0.0.1", 8000)),
        ({"HOST": "", "PORT": " "}, ("127.0.0.1", 8000)),
        ({"HOST": "0.0.0.0", "PORT": "80"}, ("127.0.0.1", 80)),
        ({"HOST": "::", "PORT": "80"}, ("::1", 80)),
        ({"HOST": "10.1.2.3", "PORT": "80", "PORT_HEALTH": "81"}, ("10.1.2.3", 81)),
        ({"UDS": "/run/worker.sock", "PORT": "0"}, "/run/worker.sock"),
        ({"PLATFORM": "http", **JOBS}, ("127.0.0.1", 8000)),
    ],
)
def test_the_worker_is_asked_where_it_listens(
    environ: Mapping[str, str], address: Any, asked: list[Any]
) -> None:
    """On the port of the probes if it has one, and from inside where it listens on every address."""
    assert healthcheck.look(environ) == (True, "ready")
    assert asked == [address]


@pytest.mark.parametrize("environ", [JOBS, {"PLATFORM": "runpod"}, {"PORT": "0"}])
@pytest.mark.parametrize(
    ("words", "state", "seen"),
    [
        (("/opt/venv/bin/python", "-m", "handler"), "S", (True, "the worker runs, process 7")),
        (("python", "-u", "-m", "handler", "serve"), "R", (True, "the worker runs, process 7")),
        (("python", "-m", "handler"), "Z", (False, "no worker runs")),
        (("python", "-m", "handler.healthcheck"), "R", (False, "no worker runs")),
        (("sh", "-c", "python -m handler"), "S", (False, "no worker runs")),
        ((), "Z", (False, "no worker runs")),
    ],
)
def test_where_nobody_can_ask_the_worker_has_to_run(
    environ: Mapping[str, str],
    words: tuple[str, ...],
    state: str,
    seen: tuple[bool, str],
    tmp_path: Path,
    asked: list[Any],
) -> None:
    """The process itself, not a shell around it, not this check, not what is left of one that ended."""
    worker(tmp_path, 7, *words, state=state)
    (tmp_path / "8").mkdir()  # ended while it was looked at
    (tmp_path / "meminfo").touch()
    assert healthcheck.look(environ, tmp_path) == seen
    assert asked == []


@pytest.mark.parametrize("port", ["eighty", "99999999"])
def test_a_port_that_is_none_is_unhealthy(port: str) -> None:
    """The worker has refused it too, with a reason of its own."""
    well, said = healthcheck.look({"PORT": port})
    assert not well
    assert said.startswith("nobody answers: ")


def test_a_platform_is_one_with_an_address_or_one_of_jobs() -> None:
    """As the worker itself finds out which it is on."""
    assert {name for name, _ in ORDER} >= LISTENING
    for environ in ({}, JOBS, {"PLATFORM": "http", **JOBS}):
        assert listens(environ) == (chosen(environ) == "http")


def test_it_imports_little_and_nothing_of_others() -> None:
    """A check every ten seconds must not cost what a worker could use."""
    program = "import sys, handler.healthcheck; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.'); {program}"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = set(done.stdout.split()) - {
        "__main__",
        "sitecustomize",
        "distutils-precedence",
        "_distutils_hack",
    }
    assert imported - sys.stdlib_module_names == {"handler"}
    assert imported.isdisjoint({"asyncio", "http", "logging", "multiprocessing", "ssl"})
