"""A request as a job: what is made of what a worker posts, in order, lost, twice or too late."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gateway.upstreams import WorkerLost
from gateway.upstreams.job import HIGH_WATER_BYTES, Job
from handler.errors import DeadlineExceeded, UpstreamFailed
from handler.messages import Reply, read

FAULT = {"message": "no", "type": "server_error", "param": None, "code": "engine_dead"}
DONE = "data: [DONE]\n\n"


def frame(n: int) -> str:
    """The nth frame of a stream."""
    return f'data: {{"n":{n}}}\n\n'


def job(*outputs: Any, streamed: bool = True) -> Job:
    """A job of which `outputs` have come."""
    made = Job({}, streamed=streamed)
    for output in outputs:
        made.put(output, len(str(output)))
    return made


async def body(reply: Reply) -> str:
    """The whole body of `reply`."""
    return (await read(reply)).decode()


async def ended(made: Job) -> tuple[int, str]:
    """Status and body of the answer."""
    reply = await made.reply()
    return reply.status, await body(reply)


async def test_a_stream_has_the_headers_that_the_edge_gives_it() -> None:
    """A job carries none."""
    reply = await job(frame(1)).reply()
    assert (reply.status, reply.headers) == (
        200,
        (
            ("content-type", "text/event-stream; charset=utf-8"),
            ("cache-control", "no-cache"),
            ("x-accel-buffering", "no"),
        ),
    )


async def test_frames_are_passed_on_as_they_come_and_the_end_when_the_job_is_done() -> None:
    """Only then it is known that nothing was lost."""
    made = job(frame(1))
    reply = await made.reply()
    assert await anext(reply.frames) == frame(1).encode()
    made.put(frame(2) + DONE, 1)
    assert await anext(reply.frames) == frame(2).encode()
    end = asyncio.ensure_future(anext(reply.frames))
    await asyncio.sleep(0)
    assert not end.done()
    made.finish([frame(1), frame(2) + DONE])
    assert await end == DONE.encode()
    with pytest.raises(StopAsyncIteration):
        await anext(reply.frames)


@pytest.mark.parametrize("came", range(4))
async def test_what_is_missing_at_the_end_is_taken_from_the_result(came: int) -> None:
    """A lost post of the last outputs, or of all, costs nothing but time."""
    outputs = [frame(1), frame(2), frame(3) + DONE]
    made = job(*outputs[:came])
    made.finish(outputs)
    assert await ended(made) == (200, "".join(outputs))


@pytest.mark.parametrize(
    "came", [[frame(1), frame(3)], [frame(2)], [frame(1), frame(1)], [frame(1), frame(2), frame(3), frame(3)]]
)
async def test_a_hole_or_a_duplicate_ends_the_stream_with_an_error(came: list[str]) -> None:
    """What the client has can't be mended: it is told, in place of the end."""
    made = job(*came)
    made.finish([frame(1), frame(2), frame(3) + DONE])
    reply = await made.reply()
    with pytest.raises(UpstreamFailed, match="lost on its way"):
        await body(reply)


async def test_a_worker_that_keeps_no_aggregate_is_believed() -> None:
    """Without `return_aggregate_stream` the SDK posts an empty list."""
    made = job(frame(1), DONE)
    made.finish([])
    assert await ended(made) == (200, frame(1) + DONE)


async def test_the_first_output_of_a_plain_job_is_the_answer() -> None:
    """It need not wait for the result."""
    assert await ended(job({"id": "a"}, streamed=False)) == (200, '{"id":"a"}')


async def test_a_plain_job_whose_output_was_lost_is_answered_with_its_result() -> None:
    """The result has it too."""
    made = job(streamed=False)
    made.finish([{"id": "a"}])
    assert await ended(made) == (200, '{"id":"a"}')


@pytest.mark.parametrize("streamed", [True, False])
async def test_an_error_object_has_its_status_back(streamed: bool) -> None:
    """So the client raises what it raises for vLLM's own server."""
    error = {"error": {**FAULT, "code": "model_not_found", "status": 404}}
    made = job(f"data: {json.dumps(error)}\n\n" if streamed else error, streamed=streamed)
    status, text = await ended(made)
    assert (status, json.loads(text)) == (404, {"error": {**FAULT, "code": "model_not_found"}})
    assert made.complete


async def test_a_failed_job_is_the_error_that_it_failed_with() -> None:
    """Before any output it has the error's own status."""
    made = job(streamed=False)
    made.report_failure(json.dumps({**FAULT, "status": 503, "retry_after": 7}))
    reply = await made.reply()
    assert (reply.status, reply.header("retry-after")) == (503, "7")
    assert json.loads(await body(reply)) == {"error": FAULT}


async def test_a_stream_whose_job_fails_ends_with_the_error_and_without_done() -> None:
    """The SDK says why in a word of its own."""
    made = job(frame(1), DONE)
    made.report_failure(json.dumps(FAULT))
    status, text = await ended(made)
    first, error, rest = text.split("\n\n")
    assert (status, first, rest) == (200, frame(1).strip(), "")
    assert json.loads(error.removeprefix("data: ")) == {"error": FAULT}


async def test_an_error_that_the_stream_has_told_is_not_told_twice() -> None:
    """Our worker sends it as the last frame and then as the job's failure."""
    told = f'data: {{"error": {json.dumps(FAULT)}}}\n\n'
    made = job(frame(1), told)
    made.report_failure(json.dumps(FAULT))
    assert await ended(made) == (200, frame(1) + told)


async def test_a_job_that_ends_without_a_word_is_an_error() -> None:
    """And not an empty answer."""
    made = job()
    made.finish([])
    with pytest.raises(UpstreamFailed, match="without an answer"):
        await made.reply()


async def test_an_answer_that_makes_no_sense_is_the_workers_fault() -> None:
    """Not a crash of the gateway."""
    made = job({"error": {"status": "many"}}, streamed=False)
    assert (await made.reply()).status == 502


async def test_a_stream_that_was_told_whole_is_whole() -> None:
    """Its job FAILED all the same: the result that repeats it was too large."""
    made = job(frame(1))
    made.put("data: [DONE]\n\n", 1)
    made.report_failure('{"message": "large", "status": 500, "code": "answer_too_large"}')
    reply = await made.reply()
    assert b"".join([chunk async for chunk in reply.frames]) == frame(1).encode() + b"data: [DONE]\n\n"


async def test_a_job_that_is_failed_from_here_ends_after_what_has_come() -> None:
    """Frames that were posted before the deadline are the client's."""
    made = job(frame(1))
    made.fail(DeadlineExceeded("late"))
    made.fail(WorkerLost("later"))
    reply = await made.reply()
    assert await anext(reply.frames) == frame(1).encode()
    with pytest.raises(DeadlineExceeded):
        await anext(reply.frames)


async def test_half_a_character_is_escaped_again() -> None:
    """JSON can name it, UTF-8 can't hold it."""
    made = job('data: "\ud800"\n\n')
    assert await anext((await made.reply()).frames) == b'data: "\\ud800"\n\n'


async def test_the_worker_waits_for_a_client_that_reads_slowly() -> None:
    """At most so much is unread; reading makes room."""
    made = job(frame(1))
    reply = await made.reply()
    made.put(frame(2), HIGH_WATER_BYTES + 1)
    waiting = asyncio.ensure_future(made.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    assert [await anext(reply.frames), await anext(reply.frames)] == [frame(1).encode(), frame(2).encode()]
    await waiting


async def test_the_worker_does_not_wait_for_a_client_that_has_gone() -> None:
    """What it still posts is thrown away."""
    made = job(frame(1))
    made.put(DONE, HIGH_WATER_BYTES + 1)
    waiting = asyncio.ensure_future(made.room())
    await asyncio.sleep(0)
    made.release()
    await waiting
    made.put(frame(2), HIGH_WATER_BYTES + 1)
    await made.room()
