"""`handler.phases`: where the time of a cold start went."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import pytest

from handler.phases import Phases, Span, process_started_s


def at(*seconds: float) -> Callable[[], float]:
    """A clock that shows `seconds`, one after the other."""
    return iter(seconds).__next__


def spans(phases: Phases) -> Iterable[Span]:
    """What was measured, as a list that compares."""
    return list(phases.spans)


def test_spans_count_from_the_start_of_the_process() -> None:
    """Zero is when the process started, and the order is that of the ends."""
    phases = Phases(100.0, clock=at(101.0, 103.5, 104.0, 106.0))
    with phases.span("import"):
        pass
    with phases.span("engine"):
        pass
    assert spans(phases) == [Span("import", 1.0, 3.5), Span("engine", 4.0, 6.0)]


def test_spans_nest() -> None:
    """The inner one ends first."""
    phases = Phases(0.0, clock=at(1.0, 2.0, 3.0, 4.0))
    with phases.span("outer"), phases.span("inner"):
        pass
    assert spans(phases) == [Span("inner", 2.0, 3.0), Span("outer", 1.0, 4.0)]


def test_a_span_that_raises_is_measured() -> None:
    """A start that fails has a waterfall too."""
    phases = Phases(0.0, clock=at(1.0, 2.0))
    with pytest.raises(OSError, match="no"), phases.span("import"):
        raise OSError("no")
    assert spans(phases) == [Span("import", 1.0, 2.0)]


def test_a_listener_hears_each_phase_before_it_runs() -> None:
    """Who watches sees what is being done, not what was."""
    heard: list[str] = []
    phases = Phases(0.0, clock=at(1.0, 2.0), listen=heard.append)
    with phases.span("import"):
        assert heard == ["import"]


def test_until_now_begins_at_zero() -> None:
    """What ran before the first line of ours is a phase of its own."""
    phases = Phases(10.0, clock=at(10.25))
    phases.until_now("interpreter")
    assert spans(phases) == [Span("interpreter", 0.0, 0.25)]


def test_report_rounds_to_milliseconds() -> None:
    """One line of JSON that a person can read."""
    meter = iter([(1.0, 3), (2.5, 10)]).__next__
    phases = Phases(0.0, clock=at(0.1234567, 0.9999999, 2.00049), meter=meter)
    with phases.span("import"):
        pass
    assert phases.report() == {
        "total_s": None,
        "facts": {},
        "phases": [{"name": "import", "begin_s": 0.123, "end_s": 1.0, "cpu_s": 1.5, "major_faults": 7}],
    }
    phases.done()
    assert phases.report()["total_s"] == 2.0


def test_an_outer_phase_stands_before_those_inside_it() -> None:
    """The report is in the order of beginnings, whatever ended first."""
    phases = Phases(0.0, clock=at(1.0, 1.0, 2.0, 4.0))
    with phases.span("outer"), phases.span("inner"):
        pass
    assert [phase["name"] for phase in phases.report()["phases"]] == ["outer", "inner"]


def test_the_process_started_before_now_and_after_the_machine() -> None:
    """The kernel's clock is put on the monotonic one."""
    assert 0 < time.monotonic() - process_started_s() < time.clock_gettime(time.CLOCK_BOOTTIME)


def test_a_fork_inherits_what_it_has_waited_for() -> None:
    """What its parent did before it was asked for is not its own; what was under way is, in part."""
    parent = Phases(100.0, clock=at(101.0, 103.0, 104.0, 108.0))
    for name in ("early", "late"):
        with parent.span(name):
            pass
    fork = Phases(106.0)
    fork.inherit(parent)
    assert spans(fork) == [Span("late", 0.0, 2.0)]


def test_a_phase_can_be_asked_how_long_it_took() -> None:
    """None for one that was not there."""
    phases = Phases(0.0, clock=at(1.0, 2.5))
    with phases.span("weights"):
        pass
    assert phases.wall_s("weights") == 1.5
    assert phases.wall_s("compile") is None
