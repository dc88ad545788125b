"""What a worker writes: kept by lines, bounded, without secrets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.upstreams import output
from gateway.upstreams.output import Output, secrets_of


def written(made: Output, *parts: bytes) -> None:
    """Write `parts` as a worker would, and end."""
    fd = os.open(made.pipe, os.O_WRONLY)
    for part in parts:
        os.write(fd, part)
    os.close(fd)
    made.close()


async def test_lines_are_shown_kept_and_the_last_remembered(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A progress bar is its last state; what ends without a line break is a line too."""
    made = Output(tmp_path / "pipe", tmp_path / "log", ())
    written(made, b"load", b"ing\n\n 0%\r50%\r100%\r\nOut", " of memöry".encode())
    assert made.tail == ("loading", "100%", "Out of memöry")
    assert (tmp_path / "log").read_text() == "loading\n100%\nOut of memöry\n"
    assert capfd.readouterr().err == "loading\n\n 0%\r50%\r100%\r\nOut of memöry"
    assert not made.pipe.exists()


async def test_secrets_are_in_neither(tmp_path: Path) -> None:
    """Those that the environment's names say are secret; short ones would hide half the alphabet."""
    environ = {
        "HF_TOKEN": "hf_abcdef",
        "API_KEY": "abc",
        "TOKENIZER": "org/tokenizer",
        "DB_PASSWORD": " pass-word ",
    }
    assert secrets_of(environ) == ("hf_abcdef", "pass-word")
    made = Output(tmp_path / "pipe", tmp_path / "log", secrets_of(environ))
    written(made, b"401 for hf_abcdef, org/tokenizer, pass-word\n")
    assert made.tail == ("401 for [hidden], org/tokenizer, [hidden]",)
    assert (tmp_path / "log").read_text() == "401 for [hidden], org/tokenizer, [hidden]\n"


async def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was before the newest part is in one other file, and nothing beyond."""
    monkeypatch.setattr(output, "LOG_MAX_BYTES", 100)
    made = Output(tmp_path / "pipe", tmp_path / "log", ())
    for number in range(100):
        os.write(made._fd, b"line %03d\n" % number)
        made._read()
    made.close()
    before, newest = (tmp_path / "log.1").read_text(), (tmp_path / "log").read_text()
    assert len(before) <= 100
    assert len(newest) <= 100
    assert (before + newest).splitlines()[-1] == "line 099"
    assert made.tail == tuple(f"line {number:03d}" for number in range(100 - output.TAIL_LINES, 100))


async def test_a_line_without_end_is_cut(tmp_path: Path) -> None:
    """Nothing grows without bound."""
    made = Output(tmp_path / "pipe", tmp_path / "log", ())
    for _ in range(100):
        os.write(made._fd, b"x" * 4096)
        made._read()
    assert len(made._begun) <= output.READ_BYTES
    made.close()
    assert {len(line) for line in made.tail} == {output.LINE_MAX_CHARS}
