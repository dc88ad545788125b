"""Jobs as rows, and what is asked of them and changed in them, as functions of a connection.

A job is IN_QUEUE, then CLAIMED by the runner that asks a worker for it (to clients it still waits), then
IN_PROGRESS, then ended. What runners do with jobs is in `claims`. Every change names the states that it
changes. Times are Unix seconds, and arguments.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    UniqueConstraint,
    case,
    delete,
    func,
    insert,
    select,
    update,
)

from gateway.store import holds, metadata

RUN_KEPT_S = 30 * 60.0
RUNSYNC_KEPT_S = 60.0
"""How long RunPod keeps what came of a job."""


class State(StrEnum):
    """What becomes of a job."""

    IN_QUEUE = "IN_QUEUE"
    CLAIMED = "CLAIMED"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"

    @property
    def shown(self) -> str:
        """What RunPod calls it."""
        return State.IN_QUEUE.value if self is State.CLAIMED else self.value


WAITING = (State.IN_QUEUE, State.CLAIMED)
OPEN = (*WAITING, State.IN_PROGRESS)
"""The states that a job leaves again by itself."""

JOBS = Table(
    "jobs",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("endpoint_id", String(64), nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("background", Boolean, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("retries", Integer, nullable=False),
    Column("size_bytes", Integer, nullable=False),
    Column("execution_timeout_s", Float, nullable=False),
    Column("ttl_s", Float, nullable=False),
    Column("submitted_at", Float, nullable=False),
    Column("begun_at", Float),
    Column("ended_at", Float),
    Column("expires_at", Float, nullable=False),
    Column("error", Text),
    Column("webhook", Text),
    Column("idempotency_key", String(255)),
    Column("digest", LargeBinary),
    Column("instance", String(32)),  # the gateway that has claimed it
    UniqueConstraint("key_id", "endpoint_id", "idempotency_key"),
    Index("jobs_turns", "endpoint_id", "state", "background", "key_id", "seq"),
    Index("jobs_room", "endpoint_id", "state", "size_bytes"),
    Index("jobs_expiry", "expires_at"),
    sqlite_autoincrement=True,  # else the number of a job that is forgotten is the next one's
)
# What clients send and get may take 20 MB, and every change of a row writes it anew: so they are apart.
INPUTS = Table(
    "job_inputs",
    metadata,
    Column("seq", ForeignKey(JOBS.c.seq, ondelete="CASCADE"), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)
OUTPUTS = Table(
    "job_outputs",
    metadata,
    Column("seq", ForeignKey(JOBS.c.seq, ondelete="CASCADE"), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Job:
    """A job's row. `kind` is `run` or `runsync`, `error` why it FAILED, or was CANCELLED by nobody."""

    seq: int
    id: str
    endpoint_id: str
    key_id: str
    kind: str
    background: bool
    state: State
    attempt: int
    retries: int
    execution_timeout_s: float
    ttl_s: float
    submitted_at: float
    begun_at: float | None
    ended_at: float | None
    expires_at: float
    error: str | None
    webhook: str | None
    digest: bytes | None

    @property
    def ended(self) -> bool:
        """Whether nothing more becomes of it by itself."""
        return self.state not in OPEN


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a job begins with: `body` is its `input` as JSON, `key_id` whose it is."""

    endpoint_id: str
    key_id: str
    body: bytes
    kind: str = "run"
    background: bool = False
    execution_timeout_s: float = 600.0
    ttl_s: float = 24 * 3600.0
    webhook: str | None = None
    idempotency_key: str | None = None
    digest: bytes | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """What came of an attempt: `output` is JSON, `error` the text of a job that FAILED."""

    state: State
    output: bytes | None = None
    error: str | None = None


ROW = [JOBS.c[field.name] for field in fields(Job)]
"""The columns that a `Job` is made of."""


def job_of(row: Mapping[Any, Any]) -> Job:
    """The job of a row of `ROW`."""
    return Job(**{**row, "state": State(row["state"])})


def add(connection: Connection, new: NewJob, now: float) -> Job:
    """Line `new` up. Raises `sqlalchemy.exc.IntegrityError` if its idempotency key is taken."""
    values: dict[str, Any] = {
        "id": f"sync-{uuid.uuid4()}" if new.kind == "runsync" else f"{uuid.uuid4()}-u1",
        "state": State.IN_QUEUE,
        "attempt": 0,
        "retries": 0,
        "size_bytes": len(new.body),
        "submitted_at": now,
        "expires_at": now + new.ttl_s,
        **{field.name: getattr(new, field.name) for field in fields(NewJob) if field.name != "body"},
    }
    row = connection.execute(insert(JOBS).values(values).returning(*ROW)).mappings().one()
    connection.execute(insert(INPUTS).values(seq=row["seq"], body=new.body))
    return job_of(row)


def find(connection: Connection, job_id: str, now: float) -> Job | None:
    """The job `job_id`, unless its time is over."""
    return _one(connection, JOBS.c.id == job_id, unexpired(now)) if holds(job_id) else None


def find_repeated(connection: Connection, new: NewJob, now: float) -> Job | None:
    """The job that was submitted with the idempotency key of `new`. One whose time is over gives it up."""
    same = (
        JOBS.c.key_id == new.key_id,
        JOBS.c.endpoint_id == new.endpoint_id,
        JOBS.c.idempotency_key == new.idempotency_key,
    )
    connection.execute(
        update(JOBS).where(*same, JOBS.c.expires_at <= now).values(idempotency_key=None, digest=None)
    )
    return _one(connection, *same)


def input_of(connection: Connection, job: Job) -> bytes:
    """The input of `job`, as JSON."""
    body: bytes = connection.scalars(select(INPUTS.c.body).where(INPUTS.c.seq == job.seq)).one()
    return body


def output_of(connection: Connection, job: Job) -> bytes | None:
    """The output of `job`, as JSON; None if there is none."""
    return connection.scalars(select(OUTPUTS.c.body).where(OUTPUTS.c.seq == job.seq)).one_or_none()


def queued(connection: Connection, endpoint_id: str) -> tuple[int, int]:
    """How many jobs wait at the endpoint, and how many bytes their inputs take."""
    row = connection.execute(
        select(func.count(), func.coalesce(func.sum(JOBS.c.size_bytes), 0)).where(
            JOBS.c.endpoint_id == endpoint_id, JOBS.c.state.in_(WAITING)
        )
    ).one()
    return int(row[0]), int(row[1])


def counts(connection: Connection, endpoint_id: str) -> Mapping[str, int]:
    """How many jobs of the endpoint that are kept are in which state, as RunPod calls it."""
    rows = connection.execute(
        select(JOBS.c.state, func.count()).where(JOBS.c.endpoint_id == endpoint_id).group_by(JOBS.c.state)
    )
    found = dict.fromkeys((state.shown for state in State), 0)
    for state, count in rows:
        found[State(state).shown] += count
    return found


def retried(connection: Connection, endpoint_id: str) -> int:
    """How often jobs of the endpoint that are kept were given to another worker."""
    return int(
        connection.scalar(
            select(func.coalesce(func.sum(JOBS.c.retries), 0)).where(JOBS.c.endpoint_id == endpoint_id)
        )
        or 0
    )


def cancel(
    connection: Connection,
    where: ColumnElement[bool],
    states: Sequence[State],
    most: int,
    now: float,
    why: str | None = None,
) -> list[Job]:
    """End up to `most` jobs for which `where` holds and that are in one of `states`; those that were."""
    some = select(JOBS.c.seq).where(where, JOBS.c.state.in_(states)).limit(most)
    rows = connection.execute(
        update(JOBS)
        .where(JOBS.c.seq.in_(some), JOBS.c.state.in_(states))
        .values(state=State.CANCELLED, error=why, ended_at=now, expires_at=kept_until(now))
        .returning(*ROW)
    )
    return [job_of(row) for row in rows.mappings()]


def retry(connection: Connection, job: Job, now: float) -> Job | None:
    """Line `job` up again without its output. None if it neither FAILED nor TIMED_OUT."""
    again = change(
        connection,
        job,
        (State.FAILED, State.TIMED_OUT),
        state=State.IN_QUEUE,
        retries=0,
        begun_at=None,
        ended_at=None,
        error=None,
        submitted_at=now,
        expires_at=now + job.ttl_s,
    )
    if again is not None:
        connection.execute(delete(OUTPUTS).where(OUTPUTS.c.seq == job.seq))
    return again


def keep_until(connection: Connection, job: Job, expires_at: float) -> None:
    """Forget `job` then, if that is sooner."""
    connection.execute(
        update(JOBS)
        .where(JOBS.c.seq == job.seq, JOBS.c.expires_at > expires_at)
        .values(expires_at=expires_at)
    )


def next_expiry(connection: Connection) -> float | None:
    """When the next job's time is over."""
    due: float | None = connection.scalar(select(func.min(JOBS.c.expires_at)))
    return due


def expire(connection: Connection, now: float, most: int) -> list[Job]:
    """Forget up to `most` jobs whose time is over; those that were."""
    over = select(JOBS.c.seq).where(JOBS.c.expires_at <= now).order_by(JOBS.c.expires_at).limit(most)
    rows = connection.execute(delete(JOBS).where(JOBS.c.seq.in_(over)).returning(*ROW))
    return [job_of(row) for row in rows.mappings()]


def endpoints_in_demand(connection: Connection) -> list[str]:
    """The ids of the endpoints at which jobs wait."""
    waiting = select(JOBS.c.endpoint_id).where(JOBS.c.state == State.IN_QUEUE).distinct()
    return list(connection.scalars(waiting))


def any_open(connection: Connection, key_ids: Sequence[str]) -> bool:
    """Whether a job of one of these keys waits or runs."""
    wanted = select(JOBS.c.seq).where(JOBS.c.key_id.in_(key_ids), JOBS.c.state.in_(OPEN)).limit(1)
    return connection.scalar(wanted) is not None


def change(connection: Connection, job: Job, states: Sequence[State], **values: Any) -> Job | None:
    """Set `values` if `job` is still in one of `states` and in the same attempt; None if it is not."""
    row = (
        connection.execute(
            update(JOBS)
            .where(JOBS.c.seq == job.seq, JOBS.c.attempt == job.attempt, JOBS.c.state.in_(states))
            .values(values)
            .returning(*ROW)
        )
        .mappings()
        .one_or_none()
    )
    return None if row is None else job_of(row)


def _one(connection: Connection, *where: ColumnElement[bool]) -> Job | None:
    row = connection.execute(select(*ROW).where(*where)).mappings().one_or_none()
    return None if row is None else job_of(row)


def unexpired(now: float) -> ColumnElement[bool]:
    """Whether a job's time is not over."""
    return JOBS.c.expires_at > now


def kept_until(now: float) -> ColumnElement[float]:
    """When a job that has ended now is forgotten."""
    return case((JOBS.c.kind == "runsync", now + RUNSYNC_KEPT_S), else_=now + RUN_KEPT_S)
