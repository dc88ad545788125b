"""Requests and tokens per minute, by key: token buckets on a clock that is given.

A bucket holds a minute's worth and fills evenly. A request takes one from the first. Of tokens nothing is
reserved, because nobody knows before how many an answer will have: a request is let in while there is one
left, what its answer uses is taken as it is made, and the bucket may go below zero, which is waited for. A
gateway that starts has full buckets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from gateway.accounts.keys import Key
from handler.errors import RateLimited
from handler.messages import Headers

MINUTE_S = 60.0


class Bucket:
    """Holds up to `per_minute`; empty or below, it is waited for."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = now_s

    def level(self, now_s: float) -> float:
        """What is in it."""
        more = (now_s - self._at_s) * self.per_minute / MINUTE_S
        self._level = min(self._level + more, self.per_minute)
        self._at_s = now_s
        return self._level

    def take(self, number: int, now_s: float) -> None:
        """Take `number`, whether it is there or not."""
        self._level = self.level(now_s) - number

    def wait_s(self, level: float, now_s: float) -> float:
        """How long until `level` is in it; 0 if it is."""
        return max(0.0, level - self.level(now_s)) * MINUTE_S / self.per_minute


class Limits:
    """The buckets of all keys. What jobs use of a key comes out of the same."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def take(self, key: Key) -> None:
        """Let one request of `key` in. Raises `RateLimited`, and has then taken nothing."""
        now_s = self._clock()
        requests, tokens = self._of(key, now_s)
        for bucket, what, short in ((requests, "requests", "RPM"), (tokens, "tokens", "TPM")):
            if bucket is None or (wait_s := bucket.wait_s(1, now_s)) == 0:
                continue
            used = bucket.per_minute - math.floor(bucket.level(now_s))
            raise RateLimited(  # the text is OpenAI's
                f"Rate limit reached for key `{key.name}` on {what} per min ({short}): "
                f"Limit {bucket.per_minute}, Used {used}. Please try again in {duration(wait_s)}.",
                retry_after_s=math.ceil(wait_s),
            )
        if requests is not None:
            requests.take(1, now_s)

    def spend(self, key: Key, tokens: int) -> None:
        """Count `tokens` that an answer to `key` has used."""
        now_s = self._clock()
        _, bucket = self._of(key, now_s)
        if bucket is not None:
            bucket.take(tokens, now_s)

    def headers(self, key: Key) -> Headers:
        """What every answer to `key` says of its limits, by OpenAI's names."""
        now_s = self._clock()
        found: Headers = ()
        for bucket, what in zip(self._of(key, now_s), ("requests", "tokens"), strict=True):
            if bucket is not None:
                left = max(0, math.floor(bucket.level(now_s)))
                found += (
                    (f"x-ratelimit-limit-{what}", str(bucket.per_minute)),
                    (f"x-ratelimit-remaining-{what}", str(left)),
                    (f"x-ratelimit-reset-{what}", duration(bucket.wait_s(bucket.per_minute, now_s))),
                )
        return found

    def _of(self, key: Key, now_s: float) -> tuple[Bucket | None, Bucket | None]:
        requests = self._bucket(key.id, "requests", key.requests_per_minute, now_s)
        return requests, self._bucket(key.id, "tokens", key.tokens_per_minute, now_s)

    def _bucket(self, key_id: str, what: str, per_minute: int | None, now_s: float) -> Bucket | None:
        if per_minute is None:
            return None
        return self._buckets.setdefault((key_id, what), Bucket(per_minute, now_s))


def duration(seconds: float) -> str:
    """As OpenAI writes it, to the next millisecond: `350ms`, `1.5s`, `6m0s`."""
    ms = math.ceil(seconds * 1000 - 1e-6)
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest_ms = divmod(ms, 60_000)
    return f"{minutes}m{rest_ms / 1000:g}s" if minutes else f"{rest_ms / 1000:g}s"
