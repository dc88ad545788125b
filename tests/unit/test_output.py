"""What a worker writes: kept by lines, bounded, without secrets."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path

import pytest

from gateway.upstreams import output
from gateway.upstreams.output import Output, is_held, secrets_of


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
    assert capfd.readouterr().err == "loading\n100%\nOut of memöry\n"
    assert not made.pipe.exists()


async def test_no_terminal_obeys_what_a_worker_has_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A client's text may be in it: neither where it is shown nor where it is kept is anything but text.

    Colours leave no trace: no secret is cut in two by them.
    """
    made = Output(tmp_path / "pipe", tmp_path / "log", ("hf_abcdef",))
    written(made, b"said \x1b]0;title\x07\tand \xc2\x9b2J\b\nhf_\x1b[0;36mabc\x1b[mdef\n")
    lines = "said \ufffd]0;title\ufffd\tand \ufffd2J\ufffd\n[hidden]\n"
    assert capfd.readouterr().err == lines
    assert (tmp_path / "log").read_text() == lines
    assert made.tail == tuple(lines.splitlines())


async def test_secrets_are_nowhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
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
    assert capfd.readouterr().err == "401 for [hidden], org/tokenizer, [hidden]\n"


async def test_a_file_is_held_until_its_worker_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what is left of others can be told from it."""
    monkeypatch.setattr(output, "LOG_MAX_BYTES", 10)
    made = Output(tmp_path / "pipe", tmp_path / "log", ())
    assert is_held(tmp_path / "log")
    os.write(made._fd, b"a line\n" * 2)
    made._read()
    os.write(made._fd, b"a line\n")
    made._read()
    assert (is_held(tmp_path / "log"), is_held(tmp_path / "log.1")) == (True, False)
    made.close()
    assert not is_held(tmp_path / "log")


async def test_a_file_that_can_t_be_made_is_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written meanwhile goes nowhere else."""
    monkeypatch.setattr(output, "LOG_MAX_BYTES", 10)
    made = Output(tmp_path / "pipe", tmp_path / "log", ())
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []

    def write(line: bytes) -> None:
        os.write(made._fd, line)
        made._read()

    write(b"1 line\n")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (made._file + 9, before[1]))
        with suppress(OSError):
            while True:
                taken.append(os.dup(made._fd))
        write(b"2 line\n")
        assert os.fstat(made._file).st_ino == (tmp_path / "log.1").stat().st_ino
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for fd in taken:
            os.close(fd)
    write(b"3 line\n")
    made.close()
    assert ((tmp_path / "log.1").read_text(), (tmp_path / "log").read_text()) == ("1 line\n", "3 line\n")


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
