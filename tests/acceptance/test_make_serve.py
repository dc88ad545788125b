"""`make serve` as a person runs it: on a terminal, until Ctrl-C."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from judge.servers import free_port
from tests.until import until

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "tinychat" / "model"
KEY = "sk-known-to-nobody-else"

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="no engine is installed"),
    pytest.mark.timeout(600),
]


class Terminal:
    """A terminal with `make serve` in its foreground, installed already: what runs the tests serves."""

    def __init__(self, home: Path) -> None:
        self.port = free_port()
        self.screen, inner = pty.openpty()
        self.seen = ""
        environ = os.environ | {
            "HOME": str(home),
            "XDG_DATA_HOME": "",
            "PORT": str(self.port),
            "API_KEY": KEY,
            "MODEL_NAME": str(MODEL),
        }
        self.make = subprocess.Popen(
            ["setsid", "--ctty", "make", "serve", f"PY={sys.executable}", "INSTALL=:"],
            cwd=ROOT,
            env=environ,
            stdin=inner,
            stdout=inner,
            stderr=inner,
        )
        os.close(inner)

    def read_until(self, pattern: str) -> re.Match[str]:
        """Read the screen until it shows `pattern`."""
        while not (found := re.search(pattern, self.seen)):
            self.seen += self._read() or pytest.fail(f"ended without {pattern!r}: {self.seen}")
        return found

    def read_to_the_end(self) -> str:
        """What the screen shows from now until every process has let go of it."""
        rest = ""
        while chunk := self._read():
            rest += chunk
        return rest

    def press(self, key: bytes) -> None:
        """Type `key`; the terminal makes the signals."""
        os.write(self.screen, key)

    def processes(self) -> dict[int, str]:
        """The command lines of all that runs in this terminal's session."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
                if session == self.make.pid:
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
        return found

    def _read(self) -> str:
        try:
            return os.read(self.screen, 65536).decode(errors="replace")
        except OSError:  # EIO: nobody has the other end any more
            return ""


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """The terminal of a user with an empty home; closing it ends what is left."""
    terminal = Terminal(tmp_path)
    yield terminal
    os.close(terminal.screen)
    terminal.make.wait(60)


def test_serves_until_ctrl_c(terminal: Terminal) -> None:
    """The ready line's URL answers, no command line holds the key, and Ctrl-C leaves no process."""
    ready = terminal.read_until(r"ready in .* (http://127\.0\.0\.1:\d+/v2/local/openai/v1) .*\n")
    assert ready[1] == f"http://127.0.0.1:{terminal.port}/v2/local/openai/v1"
    asked = urllib.request.Request(f"{ready[1]}/models", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        assert answer.status == 200
    assert [line for line in terminal.processes().values() if KEY in line] == []

    terminal.press(b"\x03")
    rest = terminal.read_to_the_end()
    assert terminal.make.wait(60) in {0, -2, 130}
    until(lambda: terminal.processes() == {})
    assert "Traceback" not in rest
    assert "Error" not in rest


def test_ctrl_c_while_it_starts(terminal: Terminal) -> None:
    """Nobody has to wait for an engine that nobody wants any more."""
    terminal.read_until("import vllm")
    terminal.press(b"\x03")
    rest = terminal.read_to_the_end()
    assert terminal.make.wait(60) in {0, -2, 130}
    until(lambda: terminal.processes() == {})
    assert "Traceback" not in rest
