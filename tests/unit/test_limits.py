"""`gateway.accounts.limits`: what a key may ask in a minute, on a clock that the test sets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.accounts.keys import Key
from gateway.accounts.limits import Bucket, Limits, duration
from handler.errors import RateLimited


class Clock:
    """Time, as the test says."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        """Now."""
        return self.now_s


def key(requests: int | None = None, tokens: int | None = None, key_id: str = "key_a") -> Key:
    """A key with these limits."""
    return Key(key_id, "a", b"", requests_per_minute=requests, tokens_per_minute=tokens)


def test_a_minutes_requests_at_once_and_then_evenly() -> None:
    """The one too many is told when to come again, and finds its place then."""
    clock = Clock()
    limits, one = Limits(clock), key(requests=3)
    for _ in range(3):
        limits.take(one)
    with pytest.raises(RateLimited) as refused:
        limits.take(one)
    assert refused.value.message == (
        "Rate limit reached for key `a` on requests per min (RPM): Limit 3, Used 3. Please try again in 20s."
    )
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    assert refused.value.headers == (("retry-after", "20"),)
    clock.now_s += 20
    limits.take(one)
    with pytest.raises(RateLimited):
        limits.take(one)


def test_tokens_are_taken_as_they_are_used_and_debts_are_waited_for() -> None:
    """Nobody knows before how long an answer will be: one that is let in is never cut."""
    clock = Clock()
    limits, one = Limits(clock), key(tokens=60)
    limits.take(one)
    limits.spend(one, 90)
    with pytest.raises(RateLimited) as refused:
        limits.take(one)
    assert refused.value.message.endswith("(TPM): Limit 60, Used 90. Please try again in 31s.")
    clock.now_s += 31
    limits.take(one)


def test_retry_after_is_one_that_clients_heed() -> None:
    """openai-python does not retry at all above 120 s."""
    limits, one = Limits(Clock()), key(tokens=1)
    limits.spend(one, 1000)
    with pytest.raises(RateLimited) as refused:
        limits.take(one)
    assert refused.value.headers == (("retry-after", "120"),)


def test_headers_have_openais_names() -> None:
    """Of each limit that there is: what it is, what is left, and when it is as new."""
    clock = Clock()
    limits, one = Limits(clock), key(requests=60, tokens=600)
    limits.take(one)
    limits.spend(one, 30)
    assert limits.headers(one) == (
        ("x-ratelimit-limit-requests", "60"),
        ("x-ratelimit-remaining-requests", "59"),
        ("x-ratelimit-reset-requests", "1s"),
        ("x-ratelimit-limit-tokens", "600"),
        ("x-ratelimit-remaining-tokens", "570"),
        ("x-ratelimit-reset-tokens", "3s"),
    )
    limits.spend(one, 1000)
    assert ("x-ratelimit-remaining-tokens", "0") in limits.headers(one)
    assert limits.headers(key()) == ()


def test_keys_have_buckets_of_their_own() -> None:
    """And what has no limit is let in however often."""
    limits = Limits(Clock())
    limits.take(key(requests=1))
    limits.take(key(requests=1, key_id="key_b"))
    for _ in range(1000):
        limits.take(key(key_id="key_c"))
    with pytest.raises(RateLimited):
        limits.take(key(requests=1))


def test_a_refusal_takes_nothing() -> None:
    """Who is out of tokens does not lose a request by asking."""
    clock = Clock()
    limits, one = Limits(clock), key(requests=1, tokens=60)
    limits.spend(one, 60)
    with pytest.raises(RateLimited):
        limits.take(one)
    clock.now_s += 1
    limits.take(one)


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 200), st.integers(0, 3000)), max_size=40),
)
def test_no_more_is_let_in_than_a_minutes_worth_beside_what_flows_in(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    """Whatever is taken when, the level is what flowed in less what was taken, and never above a minute's."""
    bucket, now_s, level = Bucket(per_minute, 0.0), 0.0, float(per_minute)
    for pause_s, number in steps:
        now_s += pause_s
        level = min(per_minute, level + pause_s * per_minute / 60)
        assert bucket.level(now_s) == pytest.approx(level, abs=1e-6)
        wait_s = bucket.wait_s(1, now_s)
        assert (wait_s == 0) == (bucket.level(now_s) >= 1)
        assert bucket.level(now_s) + wait_s * per_minute / 60 >= 1 - 1e-6
        bucket.take(number, now_s)
        level -= number


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0171, "18ms"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59.9999, "1m0s"),
        (90.5, "1m30.5s"),
        (360, "6m0s"),
    ],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    """Never shorter than they are."""
    assert duration(seconds) == text
