"""What the person who started the gateway sees."""

from __future__ import annotations

import io
import logging

import pytest

from gateway.console import Address, Console
from gateway.upstreams.events import Ended, KeyRefused, KeyTaken, Progress, Ready, StartFailed, Starting
from handler.logs import FieldsFormatter

ADDRESS = Address("http://127.0.0.1:8000/v2/local/openai/v1", "org/m", "ft-made")
FIRST_LINE = "http://127.0.0.1:8000/v2/local/openai/v1  model org/m  key ft-made"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """It is."""
        return True


async def test_terminal_shows_one_line_that_keeps_up_to_date() -> None:
    """Each step takes the place of the one before, and nothing of it is left when it is done."""
    err = Terminal()
    console = Console({"local": ADDRESS}, io.StringIO(), err)
    console("local", Starting("a", 1))
    console("local", Progress("a", "loading weights"))
    console("local", Ready("a", 2.0, {}))
    clear = "\x1b[2K"
    assert err.getvalue() == f"{clear}starting the worker (0 s)\r{clear}loading weights (0 s)\r{clear}"


async def test_a_terminal_obeys_no_phase() -> None:
    """The worker says it, and names what it was given."""
    err = Terminal()
    console = Console({"local": ADDRESS}, io.StringIO(), err)
    console("local", Starting("a", 1))
    console("local", Progress("a", "loading \x1b[2J"))
    console.close()
    clear = "\x1b[2K"
    assert err.getvalue() == f"{clear}starting the worker (0 s)\r{clear}loading \ufffd[2J (0 s)\r{clear}"


async def test_address_is_shown_once() -> None:
    """A worker that replaces another is a line in the log, not another snippet."""
    out = io.StringIO()
    console = Console({"local": ADDRESS}, out, io.StringIO())
    console("local", Ready("a", 2.0, {"total_s": 1.25}))
    console("local", Ready("a", 3.0, {"total_s": 2.25}))
    assert out.getvalue() == f"ready in 1.2 s  {FIRST_LINE}\n\n{ADDRESS.snippet()}"


async def test_first_request_mode_shows_the_address_before_any_worker() -> None:
    """It is of use at once."""
    out = io.StringIO()
    Console({"local": ADDRESS}, out, io.StringIO()).waits_for_request()
    assert out.getvalue().splitlines()[0] == f"the worker starts with the first request  {FIRST_LINE}"


def test_snippet_quotes_what_it_is_given() -> None:
    """Whatever the model is called, the program is the same program."""
    snippet = Address("http://h/v1", 'a"b\n', "k").snippet()
    assert 'model="a\\"b\\n",' in snippet
    compile(snippet, "snippet", "exec")


async def test_trouble_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    """Failed starts and unexpected ends are errors; ends that were asked for are not."""
    console = Console({"local": ADDRESS}, io.StringIO(), io.StringIO())
    with caplog.at_level(logging.INFO):
        console("local", StartFailed("a", "no model", 66, permanent=True, again_in_s=1.0))
        console("local", Ended("a", "it was ended by SIGKILL", expected=False))
        console("local", Ended("a", "it exited with code 0", expected=True))
    assert [(r.levelname, r.message, vars(r)["reason"]) for r in caplog.records] == [
        ("ERROR", "worker could not start", "no model"),
        ("ERROR", "worker ended", "it was ended by SIGKILL"),
        ("INFO", "worker ended", "it exited with code 0"),
    ]


async def test_a_refused_upstream_key_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Only the operator can mend it, and its end is worth knowing too."""
    console = Console({"local": ADDRESS}, io.StringIO(), io.StringIO())
    with caplog.at_level(logging.INFO):
        console("local", KeyRefused("upstream", "it answers with status 401"))
        console("local", KeyTaken("upstream"))
    assert [(r.levelname, r.message, vars(r).get("reason")) for r in caplog.records] == [
        ("ERROR", "UPSTREAM_KEY is refused", "it answers with status 401"),
        ("INFO", "UPSTREAM_KEY is taken again", None),
    ]


def test_log_lines_hold_the_fields() -> None:
    """A constant message, then name and value of each field."""
    record = logging.makeLogRecord(
        {"name": "gateway", "levelname": "INFO", "msg": "worker ready", "cold_start_s": 1.5}
    )
    assert FieldsFormatter().format(record).endswith(" INFO gateway: worker ready cold_start_s=1.5")


def test_no_terminal_obeys_a_log_line() -> None:
    """A client's words may be in what has failed; the lines of a traceback stay lines."""
    try:
        raise ValueError("said \x1b[2J")
    except ValueError as error:
        fault = (type(error), error, error.__traceback__)
    text = FieldsFormatter().format(logging.makeLogRecord({"msg": "request failed", "exc_info": fault}))
    assert text.endswith("\nValueError: said \ufffd[2J")
    assert "\x1b" not in text
