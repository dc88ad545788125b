"""What runners do with jobs: claim, begin, end, give back and lose them, as functions of a connection.

Each claim is an attempt with a number of its own. What a runner says of a job names its attempt: who comes
too late changes nothing, and is told so. Times are Unix seconds, and arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, func, insert, select, update

from gateway.instances import INSTANCES, dead
from gateway.jobs.table import (
    JOBS,
    OPEN,
    OUTPUTS,
    ROW,
    Ending,
    Job,
    State,
    change,
    input_of,
    job_of,
    kept_until,
    unexpired,
)

ATTEMPTS_MAX = 3
"""How many workers a job is given to at most. One that kills workers or gateways is FAILED after that."""


def claim(
    connection: Connection,
    endpoint_id: str,
    most: int,
    *,
    background: bool,
    after: str,
    now: float,
    instance: str | None = None,
) -> list[tuple[Job, bytes]]:
    """The next jobs of the endpoint with their inputs, at most `most`, each the oldest of its key.

    Keys take turns, in the order of their ids, beginning behind `after`, which had the last one. A gateway
    `instance` that is taken for dead gets none.
    """
    listed = select(INSTANCES.c.id).where(INSTANCES.c.id == instance)
    if instance is not None and connection.scalar(listed) is None:
        return []
    line = (
        JOBS.c.endpoint_id == endpoint_id,
        JOBS.c.state == State.IN_QUEUE,
        JOBS.c.background == background,
        unexpired(now),
    )
    claimed: list[tuple[Job, bytes]] = []
    while len(claimed) < most:
        oldest = select(func.min(JOBS.c.key_id)).where(*line)
        key_id = connection.scalar(oldest.where(JOBS.c.key_id > after)) or connection.scalar(oldest)
        if key_id is None:
            break
        first = select(JOBS.c.seq).where(*line, JOBS.c.key_id == key_id).order_by(JOBS.c.seq).limit(1)
        row = (
            connection.execute(
                update(JOBS)
                .where(JOBS.c.seq == first.scalar_subquery(), JOBS.c.state == State.IN_QUEUE)
                .values(state=State.CLAIMED, attempt=JOBS.c.attempt + 1, instance=instance)
                .returning(*ROW)
            )
            .mappings()
            .one_or_none()
        )
        assert row is not None, "whoever writes is alone"
        job = job_of(row)
        claimed.append((job, input_of(connection, job)))
        after = key_id
    return claimed


def begin(connection: Connection, job: Job, now: float) -> bool:
    """Mark `job`, as it was claimed, IN_PROGRESS: a worker has it. False if the attempt is outdated."""
    return change(connection, job, (State.CLAIMED,), state=State.IN_PROGRESS, begun_at=now) is not None


def end(connection: Connection, job: Job, ending: Ending, now: float) -> Job | None:
    """End the attempt that `job` was claimed for with `ending`. None if the attempt is outdated."""
    ended = change(
        connection,
        job,
        (State.CLAIMED, State.IN_PROGRESS),
        state=ending.state,
        error=ending.error,
        ended_at=now,
        expires_at=kept_until(now),
    )
    if ended is not None and ending.output is not None:
        connection.execute(insert(OUTPUTS).values(seq=job.seq, body=ending.output))
    return ended


def give_back(connection: Connection, job: Job) -> bool:
    """Put `job` back at its old place: no worker worked on it. False if the attempt is outdated."""
    states = (State.CLAIMED, State.IN_PROGRESS)
    return change(connection, job, states, state=State.IN_QUEUE, begun_at=None) is not None


def lose(connection: Connection, job: Job, why: str, now: float) -> Job | None:
    """The attempt's worker is lost: line `job` up again, or after `ATTEMPTS_MAX` workers FAIL it with `why`.

    None if the attempt is outdated.
    """
    if job.retries + 1 >= ATTEMPTS_MAX:
        return end(connection, job, Ending(State.FAILED, error=why), now)
    states = (State.CLAIMED, State.IN_PROGRESS)
    return change(connection, job, states, state=State.IN_QUEUE, begun_at=None, retries=JOBS.c.retries + 1)


def adopt(connection: Connection, now: float) -> list[Job]:
    """Line up again what gateways that are gone had claimed. Returns the jobs that FAILED instead.

    A job that a worker had counts as lost (`lose`).
    """
    left = dead(JOBS.c.instance)
    connection.execute(
        update(JOBS).where(JOBS.c.state == State.CLAIMED, left).values(state=State.IN_QUEUE, begun_at=None)
    )
    wanted = select(*ROW).where(JOBS.c.state == State.IN_PROGRESS, left)
    held = connection.execute(wanted).mappings().all()
    why = f"The gateway ended while a worker had the job, {ATTEMPTS_MAX} times."
    lost = [lose(connection, job_of(row), why, now) for row in held]
    return [job for job in lost if job is not None and job.ended]


def outdated(connection: Connection, running: Sequence[Job]) -> list[Job]:
    """Those of `running`, as they were claimed, whose attempt is not their job's any more."""
    seqs = [job.seq for job in running]
    rows = connection.execute(
        select(JOBS.c.seq, JOBS.c.attempt).where(JOBS.c.seq.in_(seqs), JOBS.c.state.in_(OPEN))
    )
    current = {row.seq: row.attempt for row in rows}
    return [job for job in running if current.get(job.seq) != job.attempt]
