"""What a pool makes of workers that fail, by a clock of its own."""

from __future__ import annotations

import math

from gateway.upstreams.failures import TRIES, Failures, back_off_s
from gateway.upstreams.process import Exit

ENDED = Exit(70, "it ended")


def test_back_off_doubles_up_to_a_minute() -> None:
    """Not a crash loop."""
    assert [back_off_s(n) for n in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_failed_start_is_told_until_its_rest_is_over() -> None:
    """Then nobody is refused with it any more, and the next one may be started."""
    failures = Failures()
    failed = failures.start_failed("worker-1", ENDED, 100.0)
    assert (failed.reason, failed.again_in_s, failed.permanent) == ("it ended", 1.0, False)
    assert (failures.last, failures.rest_s(100.5), failures.look_in_s(100.5)) == (failed, 0.5, 0.5)
    assert not failures.forget(100.5)
    assert failures.forget(101.0)
    assert (failures.last, failures.look_in_s(101.0)) == (None, math.inf)
    assert not failures.forget(102.0), "there is nothing to forget twice"


def test_rests_grow_until_a_worker_opens() -> None:
    """Only failures in a row count."""
    failures = Failures()
    assert [failures.start_failed("w", ENDED, 0.0).again_in_s for _ in range(3)] == [1.0, 2.0, 4.0]
    failures.opened()
    assert failures.last is None
    assert failures.start_failed("w", ENDED, 0.0).again_in_s == 1.0


def test_after_enough_failures_only_a_request_has_one_started() -> None:
    """And after one that the next start would only repeat: a setting is wrong."""
    failures = Failures()
    for _ in range(TRIES):
        assert not failures.given_up
        failures.start_failed("w", ENDED, 0.0)
    assert failures.given_up
    failures = Failures()
    assert failures.start_failed("w", Exit(78, "bad settings"), 0.0).permanent
    assert failures.given_up
    failures.opened()
    assert not failures.given_up


def test_workers_that_die_before_they_have_answered_anything_are_replaced_ever_later() -> None:
    """The first at once, and after enough of them those who wait are told."""
    failures = Failures()
    rests = []
    for _ in range(TRIES - 1):
        assert failures.died("w", "killed", 0.0, answered=False) is None
        rests.append(max(0.0, failures.rest_s(0.0)))
    assert rests == [0.0, 1.0, 2.0, 4.0]
    told = failures.died("w", "killed", 0.0, answered=False)
    assert told is not None
    assert told.reason == f"{TRIES} in a row ended before they had answered anything: killed"
    assert (failures.last, failures.given_up, told.again_in_s) == (told, True, 8.0)


def test_a_worker_that_has_answered_ends_the_row() -> None:
    """It was of use."""
    failures = Failures()
    for answered in (False, False, True, False):
        assert failures.died("w", "killed", 0.0, answered=answered) is None
    assert not failures.given_up
