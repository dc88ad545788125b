"""`make test-criu`: a frozen worker is captured with CRIU, and copies of it are restored and asked.

Needs root and a CRIU that works with the kernel (`CRIU=/path/to/criu` chooses one; Debian 12's
3.17 does not know the vDSO of newer kernels). Says why if it can't run. Each copy runs in a PID
namespace of its own, because it keeps its process id.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.servers import MODEL, ROOT, START_TIMEOUT_S, STOP_TIMEOUT_S, Server, engine_environ

COPIES = 3
RESTORE_TIMEOUT_S = 60.0
LOOK_S = 0.005


@dataclass(frozen=True, slots=True)
class Copy:
    """A restored worker: what it said of its resume, its first token, and a sample of its own."""

    resumed_s: float
    first_token_s: float
    said: dict[str, Any]
    greedy: str
    sampled: str


def lacks() -> str | None:
    """Why CRIU can't be used here, or None."""
    if os.geteuid() != 0:
        return "only root can dump and restore a process"
    if shutil.which(criu()) is None:
        return f"{criu()} is not installed; CRIU=/path/to/criu chooses one"
    checked = subprocess.run([criu(), "check"], capture_output=True, text=True, check=False)
    if checked.returncode:
        lines = (checked.stdout + checked.stderr).strip().splitlines()
        return f"`{criu()} check` fails: {lines[-1] if lines else checked.returncode}"
    return None


def criu() -> str:
    """The program."""
    return os.environ.get("CRIU") or "criu"


def appears(path: Path, process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> dict[str, Any]:
    """The JSON in `path`, once it is there; fails with the end of `log`."""
    deadline_s = time.monotonic() + timeout_s
    while not path.exists():
        assert process.poll() is None, f"ended with {process.returncode}: {log.read_text()[-4000:]}"
        assert time.monotonic() < deadline_s, f"no {path.name}: {log.read_text()[-4000:]}"
        time.sleep(LOOK_S)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def run(log: Path, *command: str) -> subprocess.Popen[bytes]:
    """`command`, in a session of its own, with nothing open but `log`."""
    environ = {"VLLM_CACHE_ROOT": f"{log.parent}/cache", **engine_environ(ROOT / "tests/tinychat/model")}
    with log.open("ab") as opened:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=opened,
            stderr=opened,
            start_new_session=True,
        )


def checked(command: list[str], log: Path) -> float:
    """Seconds that `command` took; fails with the errors in `log` if it does."""
    began_s = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    took_s = time.monotonic() - began_s
    if done.returncode:
        lines = log.read_text().splitlines() if log.exists() else []
        raise AssertionError("\n".join([done.stderr, *(line for line in lines if "Error" in line)]))
    return took_s


def capture(folder: Path) -> tuple[dict[str, Any], float, int]:
    """What a worker said when it was frozen, the seconds of its dump, and the bytes of its image."""
    log, barrier, images = folder / "worker.log", folder / "barrier", folder / "images"
    images.mkdir()
    process = run(log, sys.executable, "-m", "handler", "freeze", "--barrier", str(barrier))
    try:
        frozen = appears(barrier / "frozen.json", process, log, START_TIMEOUT_S)
        dump = [criu(), "dump", "-t", str(process.pid), "-D", str(images), "-o", "dump.log", "-v2"]
        took_s = checked(dump, images / "dump.log")
        assert process.wait(STOP_TIMEOUT_S) == -signal.SIGKILL  # how CRIU ends what it has dumped
    finally:
        process.kill()
        process.wait()
    return frozen, took_s, sum(image.stat().st_size for image in images.iterdir())


@contextmanager
def restored(folder: Path, number: int) -> Iterator[Copy]:
    """A copy, restored, resumed and asked; ended in order when the block is left."""
    barrier, uds, log = folder / "barrier", folder / f"{number}.sock", folder / f"restore-{number}.log"
    (barrier / "resumed.json").unlink(missing_ok=True)
    (barrier / "resume").write_text(json.dumps({"environ": {"UDS": str(uds)}}))
    # Not detached: the restorer is the first process of the namespace, which ends with it.
    command = [criu(), "restore", "-D", str(folder / "images"), "-o", str(log), "-v2"]
    began_s = time.monotonic()
    process = run(
        folder / "restorer.log", "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *command
    )
    try:
        said = appears(barrier / "resumed.json", process, log, RESTORE_TIMEOUT_S)
        resumed_s = time.monotonic() - began_s
        while not uds.exists():
            assert process.poll() is None, log.read_text()[-4000:]
            time.sleep(LOOK_S)
        with Server("http://worker/v1", uds=uds).sync_client() as client:
            parts: list[str] = []
            first_token_s = 0.0
            for chunk in client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Hello"}],
                max_tokens=20,
                temperature=0,
                stream=True,
            ):
                if text := chunk.choices[0].delta.content:
                    first_token_s = first_token_s or time.monotonic() - began_s
                    parts.append(text)
            sampled = client.completions.create(
                model=MODEL, prompt="Once", max_tokens=40, temperature=1.5
            ).choices[0]
        yield Copy(resumed_s, first_token_s, said, "".join(parts), sampled.text)
        os.kill(worker_of(process.pid), signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT_S) == 0, (folder / "worker.log").read_text()[-4000:]
    finally:
        process.kill()  # its child goes with it, and all that is in the namespace with that
        process.wait()


def worker_of(pid: int) -> int:
    """The last descendant of `pid`: unshare, criu, the worker."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return worker_of(int(children[0])) if children else pid


def main() -> int:
    """Run it; returns an exit code."""
    if reason := lacks():
        print(f"test-criu did not run: {reason}")
        return 0
    with tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as name, ExitStack() as running:
        folder = Path(name)
        frozen, dump_s, image_bytes = capture(folder)
        copies = [running.enter_context(restored(folder, number)) for number in range(1, COPIES + 1)]
        for copy in copies:
            assert copy.said["canary"] == frozen["canary"], copy.said
            assert copy.greedy.startswith(frozen["canary"]["text"]), copy.greedy
        assert len({copy.greedy for copy in copies}) == 1, "copies answer differently at temperature 0"
        assert len({copy.sampled for copy in copies}) == COPIES, "copies draw the same samples"
    figures = {
        "start_s": round(frozen["total_s"], 2),
        "dump_s": round(dump_s, 2),
        "image_mb": round(image_bytes / 1e6),
        "resident_mb": round(frozen["resident_bytes"] / 1e6),
        "threads": frozen["threads"],
        "resumed_s": [round(copy.resumed_s, 3) for copy in copies],
        "first_token_s": [round(copy.first_token_s, 3) for copy in copies],
    }
    print(f"{COPIES} copies of one worker, all running at once, each with its own samples")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
