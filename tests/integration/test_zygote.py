"""`handler.zygote` as a process, with workers that do what their environment says."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from handler.zygote import Asked

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0

PARENT = """
import os, signal, sys
from pathlib import Path
from handler.listener import listen_unix
from handler.zygote import Zygote

def work(asked, tell):
    play, lifeline = asked.environ.get("PLAY", ""), int(asked.environ.get("LIFELINE_FD", "-1"))
    if play.startswith("exit"):
        return int(play.split()[1])
    if play == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if play == "raises":
        raise RuntimeError("no")
    if play == "teach":
        tell(b"json")
    if play == "dies once":
        seen = Path(sys.argv[1]).with_suffix(".seen")
        if not seen.exists():
            seen.write_text(str(os.getpid()))
            return 70
        return 3
    if play == "writes":
        os.write(1, b"out\\n")
        os.write(2, b"err\\n")
        return 0
    if play == "until told":
        print("up", flush=True)
        signal.pause()
    os.read(lifeline, 1)  # until the client closes
    return 5

def learn(told):
    print("learned", told.decode(), flush=True)

def instead(asked, lifeline):
    print("instead", lifeline, flush=True)
    return os.posix_spawn("/bin/true", ["true"], {}, setsid=True)

unsafe = (lambda: "a reason") if "unsafe" in sys.argv else (lambda: None)
zygote = Zygote(work=work, unsafe=unsafe, instead=instead, learn=learn)
if "keep" in sys.argv:
    sys.exit(zygote.keep({"PLAY": sys.argv[3]}))
sys.exit(zygote.serve(listen_unix(Path(sys.argv[1])), int(os.environ["LIFELINE_FD"])))
"""


class Running:
    """A parent, and connections to it."""

    def __init__(self, process: subprocess.Popen[str], path: Path, lifeline: int) -> None:
        self.process = process
        self.path = path
        self.lifeline: int | None = lifeline
        self._clients: list[Client] = []

    def let_go(self) -> None:
        """Close the parent's lifeline."""
        if self.lifeline is not None:
            os.close(self.lifeline)
            self.lifeline = None

    def close(self) -> None:
        """End the parent, and be gone from its workers."""
        self.process.kill()
        self.process.communicate()
        self.let_go()
        for client in self._clients:
            client.close()

    def send(self, line: str) -> Client:
        """A new connection that has said `line`."""
        deadline_s = time.monotonic() + WAIT_S
        while True:
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(WAIT_S)
            try:
                client.connect(str(self.path))
                break
            except OSError:
                client.close()
                assert self.process.poll() is None
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
        client.sendall(line.encode())
        self._clients.append(Client(client))
        return self._clients[-1]

    def ask(self, **environ: str) -> Client:
        """A connection that has asked for a worker with `environ`."""
        return self.send(json.dumps({"environ": environ}) + "\n")

    def said(self) -> str:
        """The next line of the parent's stdout."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


class Client:
    """One connection: one worker."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client
        self._lines = client.makefile("r")

    def hears(self) -> dict[str, object]:
        """The next thing that the parent says; nothing once it has closed."""
        line = self._lines.readline()
        return json.loads(line) if line else {}

    def close_after_asking(self) -> None:
        """Say no more, and go on listening: half of what a client that goes away does."""
        self._client.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Go away."""
        self._lines.close()
        self._client.close()


@contextmanager
def parent(tmp_path: Path, *words: str) -> Iterator[Running]:
    """A parent at work; ended with its workers."""
    theirs, ours = os.pipe()
    path = tmp_path / "parent.sock"
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(path), *words],
        cwd=ROOT,
        env={**os.environ, "LIFELINE_FD": str(theirs)},
        pass_fds=(theirs,),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(theirs)
    running = Running(process, path, ours)
    try:
        yield running
    finally:
        running.close()


@pytest.mark.parametrize(
    ("play", "code"), [("exit 0", 0), ("exit 78", 78), ("killed", -signal.SIGKILL), ("raises", 70)]
)
def test_a_client_hears_of_the_beginning_and_of_the_end(tmp_path: Path, play: str, code: int) -> None:
    """As `subprocess` tells it; a worker that raises has failed, and the parent has not."""
    with parent(tmp_path) as running:
        client = running.ask(PLAY=play)
        assert isinstance(client.hears()["pid"], int)
        assert client.hears() == {"exit": code}
        assert client.hears() == {}
        assert running.ask(PLAY="exit 1").hears().keys() == {"pid"}


def test_each_connection_is_one_worker_and_its_lifeline(tmp_path: Path) -> None:
    """One goes and its worker ends; the other's goes on."""
    with parent(tmp_path) as running:
        first, second = running.ask(PLAY="live"), running.ask(PLAY="live")
        assert first.hears()["pid"] != second.hears()["pid"]
        first.close_after_asking()
        assert first.hears() == {"exit": 5}
        second.close_after_asking()
        assert second.hears() == {"exit": 5}


def test_a_worker_writes_where_it_is_asked_to(tmp_path: Path) -> None:
    """Both of its standard outputs; to a place that is not there it is no reason to fail."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with parent(tmp_path) as running, os.fdopen(os.open(pipe, os.O_RDWR), "rb") as reading:
        for output in (str(pipe), str(tmp_path / "nothing" / "here")):
            client = running.send(json.dumps({"environ": {"PLAY": "writes"}, "output": output}) + "\n")
            assert client.hears().keys() == {"pid"}
            assert client.hears() == {"exit": 0}
        assert [reading.readline(), reading.readline()] == [b"out\n", b"err\n"]
        assert running.said() == "out"


@pytest.mark.parametrize("line", ["{", "[]", '{"environ": {"A": 1}}', "{}"])
def test_what_is_no_request_is_told_so(tmp_path: Path, line: str) -> None:
    """And costs nobody else anything."""
    with parent(tmp_path) as running:
        client = running.send(line + "\n")
        assert client.hears().keys() == {"error"}
        assert client.hears() == {}
        assert running.ask(PLAY="exit 0").hears().keys() == {"pid"}


def test_a_parent_that_must_not_fork_starts_a_worker_from_the_beginning(tmp_path: Path) -> None:
    """The client sees no difference."""
    with parent(tmp_path, "unsafe") as running:
        client = running.ask(PLAY="exit 9")
        assert client.hears().keys() == {"pid"}
        assert client.hears() == {"exit": 0}
        assert running.said().startswith("instead")


def test_a_worker_teaches_its_parent(tmp_path: Path) -> None:
    """Also one that lives on."""
    with parent(tmp_path) as running:
        client = running.ask(PLAY="teach")
        assert running.said() == "learned json"
        client.close_after_asking()
        assert client.hears().keys() == {"pid"}
        assert client.hears() == {"exit": 5}


@pytest.mark.parametrize("how", ["signal", "lifeline"])
def test_a_parent_that_ends_ends_its_workers(tmp_path: Path, how: str) -> None:
    """With SIGTERM, which lets them drain, and waits for them."""
    with parent(tmp_path) as running:
        client = running.ask(PLAY="until told")
        client.hears()
        assert running.said() == "up"
        if how == "signal":
            running.process.terminate()
        else:
            running.let_go()
        assert client.hears() == {"exit": -signal.SIGTERM}
        assert running.process.wait(WAIT_S) == 0


def test_a_kept_worker_is_replaced_when_its_engine_has_died(tmp_path: Path) -> None:
    """And when it exits otherwise its code is the parent's."""
    with parent(tmp_path, "keep", "dies once") as running:
        assert running.process.wait(WAIT_S) == 3
        assert (tmp_path / "parent.seen").exists()


def test_a_kept_worker_that_is_ended_by_a_signal_ends_the_parent(tmp_path: Path) -> None:
    """As a shell tells it."""
    with parent(tmp_path, "keep", "killed") as running:
        assert running.process.wait(WAIT_S) == 128 + signal.SIGKILL


def test_a_request_may_say_since_when_it_waits() -> None:
    """Its cold start counts from then; without, from now."""
    assert Asked.parse(b'{"environ": {}, "at_s": 12.5}') == Asked({}, 12.5)
    before_s = time.monotonic()
    assert before_s <= Asked.parse(b'{"environ": {"A": "b"}}').at_s <= time.monotonic()
