"""Jobs in line: order, bounds, deadlines, and who may still speak of them."""

from __future__ import annotations

import time

import pytest

from gateway.metrics import Metrics
from gateway.upstreams import WorkerLost
from gateway.upstreams.job import Job
from gateway.upstreams.line import Line
from handler.errors import DeadlineExceeded, NotAdmitted, UpstreamFailed
from handler.messages import Visit, read
from tests.asgi_client import turns

NEVER = 3600.0


class Stage:
    """A line, and whom it wants stopped."""

    def __init__(
        self, *, limit: int = 9, queue_timeout_s: float = NEVER, execution_timeout_s: float = NEVER
    ) -> None:
        self.metrics = Metrics()
        self.own = self.metrics.endpoint("local")
        self.line = Line(
            self.own,
            limit=limit,
            queue_timeout_s=queue_timeout_s,
            execution_timeout_s=execution_timeout_s,
        )
        self.stopped: list[Job] = []
        self.line.stop = self.stopped.append

    def add(self, count: int = 1) -> list[Job]:
        """So many new jobs at the end."""
        jobs = [Job({}, streamed=True) for _ in range(count)]
        for job in jobs:
            self.line.add(job)
        return jobs

    def counted(self, what: str) -> float:
        """How often `what` has happened to a job."""
        return float(self.metrics.runpod_jobs.labels("local", what)._value.get())


async def test_jobs_are_handed_out_in_order_of_arrival_and_once() -> None:
    """As many as are asked for, at most."""
    on = Stage()
    first, second, third = on.add(3)
    assert on.line.hand_out("w", 2) == [first, second]
    assert on.line.hand_out("w", 2) == [third]
    assert (on.line.hand_out("w", 2), on.line.queued, on.line.in_progress) == ([], 0, 3)
    assert on.counted("handed_out") == 3


async def test_arrivals_wake_whoever_waits_for_one() -> None:
    """Each of them."""
    on = Stage()
    arrival = on.line.arrival
    (job,) = on.add()
    assert arrival.done()
    assert not on.line.arrival.done()
    arrival = on.line.arrival
    on.line.give_back(on.line.hand_out("w", 1))
    assert arrival.done()
    assert on.line.hand_out("w", 1) == [job]


async def test_full_line_turns_away() -> None:
    """With a hint when to come again; what a worker asks for right now does not count."""
    on = Stage(limit=1)
    on.add()
    with pytest.raises(NotAdmitted) as refused:
        on.add()
    assert refused.value.headers == (("retry-after", "5"),)
    on.line.wanted = 2
    on.add(2)
    with pytest.raises(NotAdmitted):
        on.add()


async def test_who_was_admitted_before_is_not_turned_away() -> None:
    """Whether it waited for a worker elsewhere, or was with one that was lost; places go by arrival."""
    on = Stage(limit=2)
    came_s = [time.monotonic() - ago_s for ago_s in (9, 8, 7, 6, 5)]
    retried, also_retried, second, waited, last = (
        Job({}, streamed=False, visit=Visit(at_s, admitted=number not in {2, 4}))
        for number, at_s in enumerate(came_s)
    )
    for job in (second, last, retried, waited, also_retried):
        on.line.add(job)
    with pytest.raises(NotAdmitted):
        on.add()
    assert on.line.hand_out("w", 9) == [retried, also_retried, second, waited, last]


async def test_the_wait_counts_from_the_arrival() -> None:
    """What it has waited for a worker to start is over; what a lost worker had of it does not count."""
    on = Stage(queue_timeout_s=300)
    long_ago_s = time.monotonic() - 400
    late = Job({}, streamed=False, visit=Visit(long_ago_s))
    retried = Job({}, streamed=False, visit=Visit(long_ago_s, admitted=True, worked_s=200))
    on.line.add(late)
    on.line.add(retried)
    with pytest.raises(DeadlineExceeded, match="No worker took the request within 300 s"):
        await late.reply()
    assert on.line.hand_out("w", 9) == [retried]


@pytest.mark.parametrize(
    ("waited_s", "kept_alive", "streamed", "execution_timeout_s", "ends"),
    [
        (600, False, False, 590, True),
        (600, False, True, 590, True),
        (600, False, True, 30, True),
        (600, True, False, 590, True),
        (600, True, True, 590, False),
        (600, False, False, 3600, False),
        (0, False, False, 590, False),
    ],
)
async def test_an_answer_begins_while_its_client_waits(
    waited_s: float, kept_alive: bool, streamed: bool, execution_timeout_s: float, ends: bool
) -> None:
    """Of a request that has waited, less is left to run, unless its client hears comments."""
    on = Stage(execution_timeout_s=execution_timeout_s)
    visit = Visit(time.monotonic() - waited_s, kept_alive=kept_alive, worked_s=NEVER)
    job = Job({}, streamed=streamed, visit=visit)
    on.line.add(job)
    on.line.hand_out("w", 1)
    await turns()
    assert (on.stopped == [job]) is ends


async def test_an_answer_that_has_begun_has_its_time() -> None:
    """The client hears of it."""
    on = Stage(execution_timeout_s=590)
    job = Job({}, streamed=True, visit=Visit(time.monotonic() - 600))
    on.line.add(job)
    on.line.hand_out("w", 1)
    on.line.put(job, "data: 1\n\n", 9)
    await turns()
    assert on.line.find("w", job.id) is job


async def test_a_job_waits_no_longer_than_its_deadline() -> None:
    """Its client hears of it."""
    on = Stage(queue_timeout_s=0)
    (job,) = on.add()
    with pytest.raises(DeadlineExceeded, match="No worker took the request within 0 s"):
        await job.reply()
    assert on.line.queued == 0


async def test_a_job_runs_no_longer_than_its_deadline() -> None:
    """The worker is told to stop; with frames on their way the stream ends with the error."""
    on = Stage(execution_timeout_s=0)
    (job,) = on.add()
    on.line.hand_out("w", 1)
    with pytest.raises(DeadlineExceeded, match="The answer took longer than 0 s"):
        await job.reply()
    assert (on.stopped, on.line.in_progress, on.line.find("w", job.id)) == ([job], 0, None)


async def test_what_was_given_back_is_first_in_line_again() -> None:
    """In its old order, before what came later; who has left meanwhile is not."""
    on = Stage()
    first, second, gone = on.add(3)
    taken = on.line.hand_out("w", 3)
    (later,) = on.add()
    on.line.leave(gone)
    on.line.give_back(taken)
    assert on.line.find("w", first.id) is None
    assert on.line.hand_out("v", 9) == [first, second, later]


async def test_only_the_holder_of_an_attempt_is_heard() -> None:
    """A worker that was replaced, or another one, speaks of nothing."""
    on = Stage()
    (job,) = on.add()
    assert on.line.find("w", job.id) is None
    on.line.hand_out("w", 1)
    assert on.line.find("w", job.id) is job
    assert on.line.find("v", job.id) is None
    on.line.close(job)
    assert on.line.find("w", job.id) is None


async def test_leaving_the_line_frees_its_place() -> None:
    """No worker hears of it."""
    on = Stage(limit=1)
    (job,) = on.add()
    on.line.leave(job)
    assert (on.line.queued, on.stopped) == (0, [])
    on.add()


async def test_leaving_a_running_job_stops_it() -> None:
    """What the worker had on its way is too late."""
    on = Stage()
    (job,) = on.add()
    on.line.hand_out("w", 1)
    on.line.leave(job)
    assert (on.stopped, on.line.find("w", job.id)) == ([job], None)


async def test_leaving_a_job_whose_answer_is_complete_only_waits_for_its_end() -> None:
    """Nothing is left to stop."""
    on = Stage()
    (job,) = on.add()
    on.line.hand_out("w", 1)
    job.put("data: [DONE]\n\n", 14)
    on.line.leave(job)
    assert (on.stopped, on.line.find("w", job.id)) == ([], job)
    on.line.close(job)
    assert on.line.in_progress == 0


async def test_a_lost_worker_fails_what_has_begun_and_the_rest_is_asked_again() -> None:
    """Of those in line none is touched, nor those of another worker."""
    on = Stage()
    begun, fresh, others, queued = on.add(4)
    on.line.hand_out("w", 2)
    on.line.hand_out("v", 1)
    begun.put("data: 1\n\n", 9)
    on.line.lose("w", "went away")
    with pytest.raises(WorkerLost, match="The worker went away before it answered") as lost:
        await fresh.reply()
    with pytest.raises(UpstreamFailed, match="The worker went away while it answered") as failed:
        await read(await begun.reply())
    assert not isinstance(failed.value, WorkerLost)
    assert on.line.find("v", others.id) is others
    assert on.line.hand_out("u", 9) == [queued]
    assert on.counted("retried") == 1
    assert lost.value.worked_s > 0


async def test_those_in_line_are_refused_when_no_worker_comes() -> None:
    """Those that run are not."""
    on = Stage()
    running, queued = on.add(2)
    on.line.hand_out("w", 1)
    on.line.refuse(NotAdmitted("no", retry_after_s=1))
    with pytest.raises(NotAdmitted):
        await queued.reply()
    assert on.line.find("w", running.id) is running


async def test_depth_is_measured() -> None:
    """By Prometheus."""
    on = Stage()
    on.add(3)
    on.line.hand_out("w", 1)
    text = (await on.metrics.exposition()).decode()
    assert 'firsttoken_gateway_runpod_jobs_queued{endpoint="local"} 2.0' in text
    assert 'firsttoken_gateway_runpod_jobs_in_progress{endpoint="local"} 1.0' in text
