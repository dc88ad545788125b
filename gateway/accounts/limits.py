"""Requests and tokens per minute, by key: token buckets on a clock that is given.

A bucket holds a minute's worth and fills evenly. A request takes one from the first. Of tokens nothing is
reserved, because nobody knows before how many an answer will have: a request is let in while there is one
left, what its answer uses is taken as it is made, and the bucket may go below zero, which is waited for.

Gateways that share a database (`gateway.accounts.levels`) each have all buckets, tell what was taken from
theirs and hear what was taken elsewhere. A bucket is as full as that of a single gateway would be, but for
what it has not heard yet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gateway.accounts.keys import Key
from handler.errors import RateLimited
from handler.messages import Headers

MINUTE_S = 60.0
TELL_S = 1.0
"""What flows in within this time need not be told before it is over."""

BucketId = tuple[str, str]
"""A key's id, and what is taken: `requests` or `tokens`."""


@dataclass(frozen=True, slots=True)
class Level:
    """What all gateways have told of a bucket: `taken` since `since_s`, which tells this count from others.

    `full_s` is when it is full again, if nothing more is taken.
    """

    since_s: float
    taken: int
    full_s: float


class Bucket:
    """Holds up to `per_minute`; empty or below, it is waited for.

    `untold` was taken here, and other gateways can't know of it. `heard` is what is known of them.
    """

    __slots__ = ("_full_s", "heard", "per_minute", "untold")

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self.untold = 0
        self.heard: Level | None = None
        self._full_s = now_s

    def level(self, now_s: float) -> float:
        """What is in it."""
        return self.per_minute - max(0.0, self._full_s - now_s) * self.per_minute / MINUTE_S

    def take(self, number: int, now_s: float) -> None:
        """Take `number`, whether it is there or not."""
        self._full_s = max(self._full_s, now_s) + self._flow_s(number)
        self.untold += number

    def wait_s(self, level: float, now_s: float) -> float:
        """How long until `level` is in it; 0 if it is."""
        return max(0.0, level - self.level(now_s)) * MINUTE_S / self.per_minute

    def hear(self, level: Level | None, now_s: float, told: int = 0) -> None:
        """Take what others have taken. `told` was untold, and is in `level` now; None is a full bucket.

        What was taken while the bucket was full here, and is heard of later, would be taken from nothing
        that flowed in meanwhile. So both accounts are made, this one's less what others have taken and the
        others' less what is untold. Neither is above the truth; the fuller one is nearer to it.
        """
        self.untold -= told
        others, there_s = 0, now_s
        if level is not None:
            same = self.heard is not None and self.heard.since_s == level.since_s
            others = level.taken - told - (self.heard.taken if self.heard and same else 0)
            there_s = max(level.full_s, now_s)
        here_s = max(self._full_s, now_s) + self._flow_s(others)
        self._full_s = min(here_s, there_s + self._flow_s(self.untold))
        self.heard = level

    def tell(self, level: Level | None, now_s: float, since_s: float) -> Level:
        """`level` with what is untold; `since_s` is that of a new one."""
        self.hear(level, now_s)
        if level is None:
            return Level(since_s, self.untold, self._full_s)
        return Level(level.since_s, level.taken + self.untold, self._full_s)

    def copy(self) -> Bucket:
        """As it is now, for another thread."""
        made = Bucket(self.per_minute, self._full_s)
        made.untold, made.heard = self.untold, self.heard
        return made

    def _flow_s(self, number: int) -> float:
        return number * MINUTE_S / self.per_minute


class Limits:
    """The buckets of all keys. What jobs use of a key comes out of the same.

    `hurry` is called where other gateways should hear of what was taken before `TELL_S` are over.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.hurry: Callable[[], object] = lambda: None
        self._buckets: dict[BucketId, Bucket] = {}
        self._levels: Mapping[BucketId, Level] | None = None

    def take(self, key: Key) -> None:
        """Let one request of `key` in. Raises `RateLimited`, and has then taken nothing."""
        now_s = self.clock()
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
            self._take(requests, 1, now_s)

    def spend(self, key: Key, tokens: int) -> None:
        """Count `tokens` that an answer to `key` has used."""
        now_s = self.clock()
        _, bucket = self._of(key, now_s)
        if bucket is not None:
            self._take(bucket, tokens, now_s)

    def headers(self, key: Key) -> Headers:
        """What every answer to `key` says of its limits, by OpenAI's names."""
        now_s = self.clock()
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

    def untold(self) -> dict[BucketId, Bucket]:
        """Copies of the buckets of which there is something to be told."""
        return {name: bucket.copy() for name, bucket in self._buckets.items() if bucket.untold}

    def hear(self, levels: Mapping[BucketId, Level], told: Mapping[BucketId, int]) -> None:
        """Know all `levels`, in which what was `told` is. What is in none is full."""
        now_s = self.clock()
        self._levels = levels
        for name, number in told.items():
            self._buckets[name].hear(levels.get(name), now_s, number)
        idle = [
            name
            for name, bucket in self._buckets.items()
            if name not in levels and not bucket.untold and bucket.level(now_s) == bucket.per_minute
        ]
        for name in idle:
            del self._buckets[name]

    def _take(self, bucket: Bucket, number: int, now_s: float) -> None:
        bucket.take(number, now_s)
        if bucket.untold * MINUTE_S > bucket.per_minute * TELL_S:
            self.hurry()

    def _of(self, key: Key, now_s: float) -> tuple[Bucket | None, Bucket | None]:
        requests = self._bucket(key.id, "requests", key.requests_per_minute, now_s)
        return requests, self._bucket(key.id, "tokens", key.tokens_per_minute, now_s)

    def _bucket(self, key_id: str, what: str, per_minute: int | None, now_s: float) -> Bucket | None:
        if per_minute is None:
            return None
        name = (key_id, what)
        if (bucket := self._buckets.get(name)) is None:
            bucket = self._buckets[name] = Bucket(per_minute, now_s)
        bucket.per_minute = per_minute
        if self._levels is not None and (level := self._levels.get(name)) is not bucket.heard:
            bucket.hear(level, now_s)
        return bucket


def duration(seconds: float) -> str:
    """As OpenAI writes it, to the next millisecond: `350ms`, `1.5s`, `6m0s`."""
    ms = math.ceil(seconds * 1000 - 1e-6)
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest_ms = divmod(ms, 60_000)
    return f"{minutes}m{rest_ms / 1000:g}s" if minutes else f"{rest_ms / 1000:g}s"
