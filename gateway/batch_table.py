"""The batches in the database: a row for each, however many lines it has.

How far a batch is, is in its row: the line that is next, how much of its two files counts, what they say. So
a commit moves all of it on at once, and what a killed gateway had written behind it counts for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Index,
    Integer,
    String,
    Table,
    func,
    insert,
    select,
    update,
)

from gateway.store import metadata
from handler import batch_object
from handler.batch_object import Batch
from handler.errors import Conflict

BATCHES = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),  # later ones are greater
    Column("key_id", String(64), nullable=False),
    Column("endpoint_id", String(64), nullable=False),
    Column("input_file_id", String(64), nullable=False),
    Column("output_file_id", String(64), nullable=False),
    Column("error_file_id", String(64), nullable=False),
    Column("expires_in_s", Integer),
    Column("object", JSON, nullable=False),
    Column("over", Boolean, nullable=False),
    Column("progress", JSON, nullable=False),
    Column("output_bytes", BigInteger, nullable=False),
    Column("error_bytes", BigInteger, nullable=False),
    Index("batches_by_key", "key_id", "endpoint_id", "id"),
    Index("batches_by_input", "input_file_id"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A batch. `object` is what its clients see (`handler.batch_object`), `over`: that will not change.

    Its output and its errors have their ids from the beginning, and are files once it is over; then they are
    kept for `expires_in_s`. `progress` is a `batch_lines.Progress`, `..._bytes` what belongs to it.
    """

    id: str
    key_id: str
    endpoint_id: str
    input_file_id: str
    output_file_id: str
    error_file_id: str
    expires_in_s: int | None
    object: Batch
    over: bool = False
    progress: dict[str, str] | None = None
    output_bytes: int = 0
    error_bytes: int = 0


def put(connection: Connection, row: Row) -> None:
    """Write a new one."""
    connection.execute(insert(BATCHES).values(**{**asdict(row), "progress": row.progress or {}}))


def find(connection: Connection, batch_id: str, key_id: str | None, endpoint_id: str) -> Batch | None:
    """What clients see of a batch of the endpoint and of the key `key_id`, or of any for None."""
    wanted = select(BATCHES.c.object).where(BATCHES.c.id == batch_id, BATCHES.c.endpoint_id == endpoint_id)
    if key_id is not None:
        wanted = wanted.where(BATCHES.c.key_id == key_id)
    return connection.execute(wanted).scalar_one_or_none()


def listed(
    connection: Connection, key_id: str | None, endpoint_id: str, *, after: str | None, limit: int
) -> Sequence[Batch]:
    """What clients see of the endpoint's, the newest first, behind the one called `after`."""
    wanted = select(BATCHES.c.object).where(BATCHES.c.endpoint_id == endpoint_id)
    if key_id is not None:
        wanted = wanted.where(BATCHES.c.key_id == key_id)
    if after is not None:
        wanted = wanted.where(BATCHES.c.id < after)
    return list(connection.scalars(wanted.order_by(BATCHES.c.id.desc()).limit(limit)))


def unfinished(connection: Connection) -> Sequence[Row]:
    """All that are not over, the oldest first."""
    wanted = select(BATCHES).where(BATCHES.c.over.is_(False)).order_by(BATCHES.c.id)
    return [Row(**row) for row in connection.execute(wanted).mappings()]


def one(connection: Connection, batch_id: str) -> Row:
    """The batch of that id, which is there."""
    return Row(**connection.execute(select(BATCHES).where(BATCHES.c.id == batch_id)).mappings().one())


def unfinished_of(connection: Connection, key_id: str) -> int:
    """How many batches of the key are not over."""
    wanted = select(func.count()).where(BATCHES.c.key_id == key_id, BATCHES.c.over.is_(False))
    return connection.execute(wanted).scalar_one()


def inputs(connection: Connection) -> set[str]:
    """The files that are still to be read."""
    return set(connection.scalars(select(BATCHES.c.input_file_id).where(BATCHES.c.over.is_(False))))


def check_delete(file_id: str, connection: Connection) -> None:
    """Raise `Conflict` if the file is still to be read."""
    using = select(BATCHES.c.id).where(BATCHES.c.input_file_id == file_id, BATCHES.c.over.is_(False))
    if batch_id := connection.execute(using.limit(1)).scalar_one_or_none():
        raise Conflict(f"{file_id} is the input of {batch_id}, which is not over. Cancel that first.")


def change(connection: Connection, batch_id: str, how: Callable[[Batch], Batch], **columns: Any) -> Batch:
    """Have what clients see be what `how` makes of it, and `columns` be so; returns it."""
    now = select(BATCHES.c.object).where(BATCHES.c.id == batch_id).with_for_update()
    changed = how(connection.execute(now).scalar_one())
    values = {**columns, "object": changed, "over": batch_object.is_over(changed)}
    connection.execute(update(BATCHES).where(BATCHES.c.id == batch_id).values(**values))
    return changed
