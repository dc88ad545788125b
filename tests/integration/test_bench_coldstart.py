"""`bench`: cold starts of real processes, scripted ones and our own worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.start import VARIANTS, Case, NotStarted, start
from handler import machine
from tests.servers import ROOT

SERVER = """
import http.server, os, subprocess, sys

refused = []

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        if not refused or "NEVER" in os.environ:  # it listens before it is ready
            refused.append(1)
            self.send_response(503)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        self.send_response(int(os.environ.get("STATUS", "200")))
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for delta in '{"role": "assistant", "content": ""}', '{"content": "the "}', '{"content": "sea"}':
            self.frame(f'data: {{"choices": [{{"delta": {delta}}}]}}')
        if "BREAK" in os.environ:
            self.close_connection = True
            return
        self.frame("data: [DONE]")
        self.wfile.write(b"0\\r\\n\\r\\n")

    def frame(self, text):
        data = text.encode() + b"\\n\\n"
        self.wfile.write(b"%x\\r\\n%b\\r\\n" % (len(data), data))

if "EXIT" in os.environ:
    sys.exit(int(os.environ["EXIT"]))
left = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
with open(os.environ["LEFT"], "w") as file:
    file.write(str(left.pid))
held = bytearray(64 << 20)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
"""Stands for vLLM's server: what it starts and leaves behind is in the file $LEFT."""


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A peer that is found before vLLM is, since `python -m` looks along PYTHONPATH first."""
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(SERVER)
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "LEFT": str(tmp_path / "left")}
    for folder in (package, *package.parents[:2]):
        (folder / "__init__.py").touch()
    return Case("/model", ["--max-model-len", "8"], environ)


def test_a_start_is_measured_and_ended_whole(case: Case, tmp_path: Path) -> None:
    """From exec to the text, through a 503; memory and CPU of the tree; nothing is left behind."""
    made = start(VARIANTS["vllm"], case, {}, tmp_path / "log")
    assert made.text == "the sea"
    assert made.first_s > 0.02
    assert made.cpu_s > 0
    assert made.peak_bytes > 64 << 20
    assert made.report is None
    assert has_ended((tmp_path / "left").read_text())


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({"EXIT": "3"}, "it ended with 3, see .*log"),
        ({"STATUS": "404"}, 'it answers 404: data: {"choices".*, see .*log'),
        ({"BREAK": "1"}, "its answer broke off after 'the sea', see .*log"),
    ],
)
def test_what_gives_no_answer_is_no_figure(
    case: Case, tmp_path: Path, environ: dict[str, str], why: str
) -> None:
    """A server that ends, refuses, or breaks off: the error says which, and where its log is."""
    with pytest.raises(NotStarted, match=f"(?s)^{why}$"):
        start(VARIANTS["vllm"], case, environ, tmp_path / "log")


def has_ended(pid: str) -> bool:
    """Whether there is no process `pid`; one that nobody waits for has ended too."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or " Z " in stat.read_text()


INTERRUPTED = """
import signal, sys
from pathlib import Path
from bench.start import VARIANTS, Case, start

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
folder = Path(sys.argv[1])
environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), "LEFT": str(folder / "left"), "NEVER": "1"}
try:
    start(VARIANTS["vllm"], Case("/model", [], environ), {}, folder / "log")
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_interrupted_start_leaves_nothing_behind(case: Case, tmp_path: Path) -> None:
    """Ctrl-C while a server still starts ends it and what it has started."""
    os.mkfifo(tmp_path / "left")
    running = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(tmp_path)], cwd=ROOT)
    try:
        left = (tmp_path / "left").read_text()
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
    finally:
        running.kill()
        running.wait()
    assert has_ended(left)


def bench(*options: str, module: str = "coldstart_gpu") -> subprocess.CompletedProcess[str]:
    """`python -m bench.MODULE`, run to its end."""
    command = [sys.executable, "-m", f"bench.{module}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_benchmark_for_a_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    """Weights, starts of our worker from nothing and from a warm parent, the table, the line of JSON."""
    done = bench("--cpu", "--variants", "worker", "fork", "--folder", str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["failures"] == []
    starts = result["results"]["tiny"]["modes"]["warm"]
    assert list(starts) == ["worker", "fork"]
    assert starts["worker"]["texts"] == starts["fork"]["texts"]
    assert starts["fork"]["cpu_s"] < starts["worker"]["cpu_s"]  # of the CPU: no wall time is sure to be less
    assert {"import vllm", "engine", "weights"} <= starts["worker"]["phases"].keys()
    assert "import vllm" not in starts["fork"]["phases"]
    assert starts["worker"]["facts"]["weights_bytes"] > 0
    assert "tiny, caches warm" in done.stdout


def test_a_start_from_a_bake_is_measured_beside_one_without(tiny_model: Path) -> None:
    """Both with no caches of their own; phases side by side, the ratio, the line of JSON."""
    options = ("--model", str(tiny_model), "--rounds", "1", "--variants", "unbaked", "baked")
    done = bench(*options, module="bake")
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["failures"] == []
    starts = result["results"]
    assert starts["baked"]["texts"] == starts["unbaked"]["texts"]
    assert result["baked_of_unbaked"] == pytest.approx(
        starts["baked"]["first_median_s"] / starts["unbaked"]["first_median_s"], abs=0.01
    )
    assert "expected_s" in starts["baked"]["facts"]
    assert "expected_s" not in starts["unbaked"]["facts"]
    assert result["baked_of_vllm"] is None
    phases = next(line for line in done.stdout.splitlines() if line.strip().startswith("import vllm"))
    assert phases.count(" s") == 2


@pytest.mark.skipif(machine.has_accelerator(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    """And the exit code is that of a machine that lacks something."""
    done = bench()
    assert done.returncode == 75
    assert (
        done.stderr
        == "no GPU here, neither /dev/nvidiactl nor /dev/kfd; --cpu runs a tiny shape on the CPU\n"
    )
    assert done.stdout == ""
