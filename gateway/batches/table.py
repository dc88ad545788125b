"""The batches in the database: a row for each, however many lines it has.

How far a batch is, is in its row: the line that is next, how much of its two files counts, what they say. So
a commit moves all of it on at once, and what a killed gateway had written behind it counts for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
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

from gateway.instances import dead
from gateway.store import holds, metadata
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
    Column("instance", String(32)),  # the gateway that runs it
    Index("batches_by_key", "key_id", "endpoint_id", "id"),
    Index("batches_by_input", "input_file_id"),
)


class Taken(Exception):
    """The batch is another gateway's by now: what this one has done since counts for nothing."""


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
    instance: str | None = None


def put(connection: Connection, row: Row) -> None:
    """Write a new one."""
    connection.execute(insert(BATCHES).values(**{**asdict(row), "progress": row.progress or {}}))


def find(connection: Connection, batch_id: str, key_id: str | None, endpoint_id: str) -> Batch | None:
    """What clients see of a batch of the endpoint and of the key `key_id`, or of any for None."""
    if not holds(batch_id):
        return None
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


def left(connection: Connection) -> Sequence[Row]:
    """Those that are not over and that no living gateway runs."""
    wanted = select(BATCHES).where(BATCHES.c.over.is_(False), dead(BATCHES.c.instance))
    return [Row(**row) for row in connection.execute(wanted.order_by(BATCHES.c.id)).mappings()]


def adopt(connection: Connection, ids: Collection[str], instance: str | None) -> Sequence[Row]:
    """Those of `ids` that are still `left`; from now on `instance` runs them."""
    adopted = [row for row in left(connection) if row.id in ids]
    mine = BATCHES.c.id.in_([row.id for row in adopted])
    connection.execute(update(BATCHES).where(mine).values(instance=instance))
    return [replace(row, instance=instance) for row in adopted]


def move(connection: Connection, row: Row) -> None:
    """Write down the file ids that `row` has. Raises `Taken` if another gateway has the batch."""
    owned = (BATCHES.c.id == row.id, BATCHES.c.instance == row.instance)
    files = {"output_file_id": row.output_file_id, "error_file_id": row.error_file_id}
    if not connection.execute(update(BATCHES).where(*owned).values(**files)).rowcount:
        raise Taken


def standing(connection: Connection, ids: Collection[str]) -> dict[str, tuple[str | None, Batch]]:
    """Who runs each of the batches `ids`, and what clients see of it."""
    wanted = select(BATCHES.c.id, BATCHES.c.instance, BATCHES.c.object).where(BATCHES.c.id.in_(ids))
    return {row.id: (row.instance, row.object) for row in connection.execute(wanted)}


def one(connection: Connection, batch_id: str) -> Row:
    """The row of the batch, which has to be there."""
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


def change(
    connection: Connection,
    batch_id: str,
    how: Callable[[Batch], Batch],
    owner: str | None = None,
    **columns: Any,
) -> Batch:
    """Replace the object that clients see by `how` of it, and set `columns`; returns the new object.

    Raises `Taken` if the batch is not the gateway `owner`'s (None: whoever has it).
    """
    now = select(BATCHES.c.object, BATCHES.c.instance).where(BATCHES.c.id == batch_id)
    found = connection.execute(now).one()
    if owner not in {None, found.instance}:
        raise Taken
    changed = how(found.object)
    values = {**columns, "object": changed, "over": batch_object.is_over(changed)}
    connection.execute(update(BATCHES).where(BATCHES.c.id == batch_id).values(**values))
    return changed
