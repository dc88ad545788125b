"""What whoever waits is shown: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import re
from concurrent.futures import ThreadPoolExecutor
from threading import Event

from builder.console import Console
from builder.progress import progress

NEVER_S = 3600.0


class Stream(io.StringIO):
    """A stream that knows whether it is a terminal, and sets an event when a line is written."""

    def __init__(self, *, terminal: bool = False) -> None:
        super().__init__()
        self.terminal = terminal
        self.written = Event()

    def isatty(self) -> bool:
        """Whether a bar can be drawn."""
        return self.terminal

    def write(self, text: str) -> int:
        """Write, and say so."""
        count = super().write(text)
        self.written.set()
        return count


def two_lines(stream: Stream) -> str:
    """The second line from now on: the first may have been worked out before."""
    for _ in range(2):
        stream.written.clear()
        assert stream.written.wait(60)
    return stream.getvalue().splitlines()[-1]


def test_lines_say_how_much_is_done() -> None:
    """With how fast it went since the last one."""
    stream = Stream()
    with progress(Console(stream, "seal"), "hashing", 16_000_000, report_s=0.001) as advance:
        advance(4_000_000)
        assert re.fullmatch(r"seal: hashing: 4 MB of 16 MB, \d+ [a-zA-Z]+/s", two_lines(stream))


def test_what_is_over_soon_says_nothing() -> None:
    """A log is not for what nobody waits for."""
    stream = Stream()
    with progress(Console(stream), "hashing", 10, report_s=NEVER_S) as advance:
        advance(10)
    assert stream.getvalue() == ""


def test_terminal_has_a_bar() -> None:
    """It is drawn over itself, and gone when the work is done."""
    stream = Stream(terminal=True)
    with progress(Console(stream, "seal"), "hashing", 16_000_000) as advance:
        advance(16_000_000)
    drawn = stream.getvalue()
    assert "\n" not in drawn
    assert re.search(r"seal: hashing: +0%.*0\.00/16\.0M", drawn)
    assert drawn.split("\r")[-1].strip() == ""


def test_nothing_to_do_shows_nothing() -> None:
    """A bar of nothing would only flicker."""
    stream = Stream(terminal=True)
    with progress(Console(stream), "hashing", 0) as advance:
        advance(1)
    assert stream.getvalue() == ""


def test_many_threads_lose_no_byte() -> None:
    """The sum is what all of them have done."""
    stream = Stream()
    with progress(Console(stream), "hashing", 8000, report_s=0.001) as advance:
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(lambda: [advance(1) for _ in range(1000)]) for _ in range(8)]:
                done.result()
        assert ": hashing: 8 kB of 8 kB, " in two_lines(stream)
