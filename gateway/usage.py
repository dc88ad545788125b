"""What was used: tokens, requests and their cost, by day, key, endpoint and model."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Date,
    Integer,
    String,
    Table,
    and_,
    insert,
    update,
)
from sqlalchemy.exc import IntegrityError

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
_KEY = (USAGE.c.day, USAGE.c.key_id, USAGE.c.endpoint, USAGE.c.model)
_COUNTS = (USAGE.c.requests, USAGE.c.prompt_tokens, USAGE.c.completion_tokens, USAGE.c.cost_nano)


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


def add(connection: Connection, entry: Entry, day: date | None = None) -> None:
    """Count `entry`, on today's account (UTC) or that of `day`, in the caller's own transaction."""
    key = {
        "day": day or datetime.now(UTC).date(),
        "key_id": entry.key_id,
        "endpoint": entry.endpoint_id,
        "model": entry.model[:256],
    }
    counts = {
        "requests": entry.requests,
        "prompt_tokens": entry.prompt_tokens,
        "completion_tokens": entry.completion_tokens,
        "cost_nano": entry.cost_nano,
    }
    there = and_(*(column == key[column.name] for column in _KEY))
    more = update(USAGE).where(there).values({column: column + counts[column.name] for column in _COUNTS})
    if connection.execute(more).rowcount:
        return
    try:
        with connection.begin_nested():
            connection.execute(insert(USAGE).values(**key, **counts))
    except IntegrityError:  # another gateway has begun the same account meanwhile
        connection.execute(more)
