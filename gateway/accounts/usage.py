"""What was used: tokens, requests and their cost, by day, key, endpoint and model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Date,
    Integer,
    String,
    Table,
    bindparam,
    insert,
    update,
)

from gateway.store import metadata

USAGE = Table(
    "usage",
    metadata,
    Column("day", Date, primary_key=True),
    Column("key_id", String(32), primary_key=True),
    Column("endpoint", String(64), primary_key=True),
    Column("model", String(256), primary_key=True),
    Column("requests", Integer, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("cost_nano", BigInteger, nullable=False),
)
_ACCOUNT = ("day", "key_id", "endpoint", "model")
_COUNTS = ("requests", "prompt_tokens", "completion_tokens", "cost_nano")
_MORE = (  # built once: to build one takes as long as to run it
    update(USAGE)
    .where(*(USAGE.c[name] == bindparam(f"of_{name}") for name in _ACCOUNT))
    .values({name: USAGE.c[name] + bindparam(f"more_{name}") for name in _COUNTS})
)


@dataclass(frozen=True, slots=True)
class Prices:
    """What a million tokens cost, in billionths of the unit of money: whole numbers, so sums are exact."""

    input_nano: int = 0
    output_nano: int = 0

    def cost_nano(self, prompt_tokens: int, completion_tokens: int) -> int:
        """What that many tokens cost, rounded to a billionth."""
        millionths = prompt_tokens * self.input_nano + completion_tokens * self.output_nano
        return (millionths + 500_000) // 1_000_000


@dataclass(frozen=True, slots=True)
class Entry:
    """What one answer has used, or several of a key. Its cost is at the prices of that moment."""

    key_id: str
    endpoint_id: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    cost_nano: int = 0
    requests: int = 1

    def plus(self, other: Entry) -> Entry:
        """The sum of both, for the key, endpoint and model of this one."""
        return replace(
            self,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cost_nano=self.cost_nano + other.cost_nano,
            requests=self.requests + other.requests,
        )


def kept_name(model: str) -> str:
    """`model` as far as every database keeps it: workers of others say what they like."""
    return model.encode(errors="replace").decode().replace("\0", "\ufffd")[:256]


def add(connection: Connection, entry: Entry, day: date | None = None) -> None:
    """Count `entry`, on today's account (UTC) or that of `day`, in the caller's own transaction."""
    account = (day or datetime.now(UTC).date(), entry.key_id, entry.endpoint_id, kept_name(entry.model))
    counts = (entry.requests, entry.prompt_tokens, entry.completion_tokens, entry.cost_nano)
    more = {
        **{f"of_{name}": value for name, value in zip(_ACCOUNT, account, strict=True)},
        **{f"more_{name}": number for name, number in zip(_COUNTS, counts, strict=True)},
    }
    if not connection.execute(_MORE, more).rowcount:
        new = zip((*_ACCOUNT, *_COUNTS), (*account, *counts), strict=True)
        connection.execute(insert(USAGE), dict(new))


def sums(entries: Iterable[Entry]) -> list[Entry]:
    """One entry for each account, with all that `entries` put on it."""
    found: dict[tuple[str, str, str], Entry] = {}
    for entry in entries:
        account = (entry.key_id, entry.endpoint_id, entry.model)
        before = found.get(account)
        found[account] = entry if before is None else before.plus(entry)
    return list(found.values())
