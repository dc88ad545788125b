"""One run of pytest in a session of its own, ended with everything it started."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from handler.settings import TABLE
from judge.verdict import UNFINISHED, Run, read

PROGRESS_S = 60
REPOSITORY = Path(__file__).parent.parent


def run(words: Sequence[str], *, tree: Path, environ: Mapping[str, str], logs: Path) -> Run:
    """Run pytest with `words` in the folder `tree`.

    What it says goes to `pytest.txt` in the folder `logs`, the report of `judge.report`
    to `report.jsonl`. Raises `RuntimeError` if not one test was found.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends it as Ctrl-C does
    report, echo = logs / "report.jsonl", logs / "pytest.txt"
    report.touch()
    command = [sys.executable, "-m", "pytest", "-p", "judge.report", "--judge-report", str(report)]
    command += ["-p", "no:cacheprovider", "--tb", "short", "-q", "-rA", *words]
    # `-m pytest` puts the tree first on the path, so `tests` is theirs and `judge` is ours.
    environ = {**environ, "PYTHONPATH": str(REPOSITORY)}
    with echo.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=tree,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(PROGRESS_S)
            print(f"  {progress(report)}", flush=True)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    finally:
        end(process.pid)
    found = read(report.read_text().splitlines())
    if not found.outcomes:
        raise RuntimeError(f"pytest ended with {process.returncode} before any test, see {echo}")
    return found


def progress(report: Path) -> str:
    """How far pytest is, in words."""
    found = read(report.read_text().splitlines())
    ended = sum(why != UNFINISHED for why in found.why.values())
    return f"{ended} of {len(found.outcomes)} tests, {found.passed} passed"


def end(session: int) -> None:
    """Kill what is left in `session` (see setsid(2))."""
    for entry in Path("/proc").iterdir():
        with suppress(ProcessLookupError):
            if entry.name.isdigit() and os.getsid(int(entry.name)) == session:
                os.kill(int(entry.name), signal.SIGKILL)


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What both servers get of `environ`: all but our settings, and no network.

    The CPU engine takes one core less than there are, so that the clients have one too,
    and 1 GiB for its cache.
    """
    ours = {name for row in TABLE for name in row.names}
    kept = {name: value for name, value in environ.items() if name not in ours}
    kept.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) - 1)))
    kept.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return {**kept, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def fresh(folder: Path) -> Path:
    """`folder`, made and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def cache(environ: Mapping[str, str]) -> Path:
    """The folder that holds the unpacked tests: in the user's cache, outside of the repository."""
    home = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home, "firsttoken", "judge")
