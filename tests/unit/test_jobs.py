"""`handler.jobs`: a job's input and output, there and back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler import jobs
from handler.errors import BadEvent, BadRequest, NotAdmitted, RequestError
from handler.messages import Headers, Reply, Request

JSON: Headers = (("content-type", "application/json"),)
EVENTS: Headers = (("content-type", "text/event-stream; charset=utf-8"),)
TOLD = {"message": "m", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}


def reply(status: int, headers: Headers, *chunks: bytes) -> Reply:
    """A reply whose body comes in `chunks`."""

    async def frames() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    return Reply(status, headers, frames())


async def rendered(what: Reply, *, streamed: bool = False) -> list[Any]:
    """The outputs as they are on the wire."""
    sent = json.dumps([output async for output in jobs.render(what, streamed=streamed)])
    got: list[Any] = json.loads(sent)
    return got


async def raw(what: Reply | None) -> tuple[int, Headers, bytes]:
    """All of a reply."""
    assert what is not None
    return what.status, what.headers, b"".join([chunk async for chunk in what.frames])


# --- inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job_input", "method", "path", "body"),
    [
        ({"openai_route": "/v1/models"}, "GET", "/v1/models", None),
        ({"openai_route": "models", "openai_input": None}, "GET", "/v1/models", None),
        ({"openai_route": "/v1/models/a/b", "openai_input": {}}, "GET", "/v1/models/a/b", None),
        ({"openai_route": "/v1/completions", "openai_input": {}}, "POST", "/v1/completions", {}),
        ({"openai_input": {"n": 1}}, "POST", "/v1/chat/completions", {"n": 1}),
        ({"openai_route": "/v1/score", "openai_input": [1]}, "POST", "/v1/score", [1]),
        ({"route": "/v1/models"}, "GET", "/v1/models", None),
        ({"route": "completions", "body": {"n": 1}}, "POST", "/v1/completions", {"n": 1}),
        ({"route": "/v1/models", "method": "delete"}, "DELETE", "/v1/models", None),
        ({"prompt": "Hi"}, "POST", "/v1/completions", {"prompt": "Hi"}),
        (
            {"prompt": ["a", "b"], "sampling_params": {"max_tokens": 5}, "stream": True, "batch_size": 3},
            "POST",
            "/v1/completions",
            {"max_tokens": 5, "prompt": ["a", "b"], "stream": True},
        ),
        (
            {"messages": [], "sampling_params": {"top_k": 1}, "tools": [], "use_openai_format": True},
            "POST",
            "/v1/chat/completions",
            {"top_k": 1, "messages": [], "tools": []},
        ),
        (
            {"prompt": "Hi", "apply_chat_template": True},
            "POST",
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Hi"}]},
        ),
    ],
)
def test_every_shape_of_input_is_a_request(job_input: Any, method: str, path: str, body: Any) -> None:
    """RunPod's own, worker-vllm's two; a GET where there is nothing to send."""
    request = jobs.parse(job_input)
    assert (request.method, request.path) == (method, path)
    assert (json.loads(request.body) if request.body else None) == body
    assert request.headers == (() if body is None else JSON)


@pytest.mark.parametrize(
    ("job_input", "says"),
    [
        (None, "JSON object"),
        ("Hi", "JSON object"),
        ({}, "keys of this one: none"),
        ({"text": "Hi", "a": 1}, "'a', 'text'"),
        ({"openai_route": 5}, '"openai_route"'),
        ({"route": None}, '"route"'),
        ({"route": "/v1/models", "method": 5}, '"method"'),
        ({"prompt": "Hi", "sampling_params": "hot"}, '"sampling_params"'),
    ],
)
def test_any_other_input_is_told_what_there_is(job_input: Any, says: str) -> None:
    """With what was found."""
    with pytest.raises(BadEvent) as raised:
        jobs.parse(job_input)
    assert says in raised.value.message
    assert raised.value.status == 400


@given(st.dictionaries(st.text(), st.text() | st.booleans() | st.integers() | st.none()))
def test_what_is_dumped_is_parsed_again(body: dict[str, Any]) -> None:
    """The gateway's half and the worker's, whatever JSON holds, half characters too."""
    sent = Request("POST", "/v1/chat/completions", JSON, json.dumps(body).encode())
    got = jobs.parse(json.loads(json.dumps(jobs.dump(sent))))
    assert (got.method, got.path, json.loads(got.body)) == ("POST", "/v1/chat/completions", body)


def test_a_get_is_dumped_without_input() -> None:
    """As RunPod's URL does it."""
    assert jobs.dump(Request("GET", "/v1/models")) == {"openai_route": "/v1/models"}
    assert jobs.parse({"openai_route": "/v1/models"}) == Request("GET", "/v1/models")


@pytest.mark.parametrize(
    "request_",
    [
        Request("POST", "/v1/chat/completions", JSON, b"{"),
        Request("POST", "/v1/chat/completions", JSON, b"[]"),
        Request("POST", "/v1/chat/completions", (), b"{}"),
        Request("POST", "/v1/audio/transcriptions", (("content-type", "multipart/form-data"),), b"--x"),
    ],
    ids=["no JSON", "no object", "no content type", "files"],
)
def test_what_no_job_can_hold_is_refused(request_: Request) -> None:
    """By the side that would have to hold it."""
    with pytest.raises(BadRequest):
        jobs.dump(request_)


# --- outputs ------------------------------------------------------------------------------------


async def test_a_plain_answer_there_and_back() -> None:
    """Status 200 and the same JSON, also where it has a member called error."""
    for body in ({"id": "a", "text": "é"}, {"error": {"code": "server_error"}, "status": "failed"}, [1, 2]):
        outputs = await rendered(reply(200, JSON, json.dumps(body).encode()))
        assert outputs == [body]
        status, _, got = await raw(jobs.load(outputs[0], streamed=False))
        assert (status, json.loads(got)) == (200, body)


async def test_an_answer_that_runpod_would_refuse_is_an_error() -> None:
    """The result would be lost, and the job would hang until its deadline."""
    whole = reply(200, JSON, b'"', b"x" * jobs.ANSWER_MAX_BYTES, b'"')
    with pytest.raises(RequestError, match=f"takes {jobs.ANSWER_MAX_BYTES + 4} bytes") as raised:
        await rendered(whole)
    assert (raised.value.status, raised.value.code) == (500, "answer_too_large")


async def test_a_result_is_counted_as_the_sdk_posts_it() -> None:
    """With spaces after each comma: many short numbers take half as much again."""
    body = b"[" + b",".join([b"1"] * 7_000_000) + b"]"
    assert len(body) < jobs.ANSWER_MAX_BYTES
    with pytest.raises(RequestError, match="takes 21000002 bytes"):
        await rendered(reply(200, JSON, body))


async def test_the_job_of_a_stream_that_is_too_long_has_failed() -> None:
    """Its client has all of it; the result would be refused, and the job would never end."""
    chunk = b"data: " + b"x" * 10_000_000 + b"\n\n"
    *frames, failed = await rendered(reply(200, EVENTS, chunk, chunk, b"data: [DONE]\n\n"), streamed=True)
    assert [len(frame) for frame in frames] == [len(chunk), len(chunk), 14]
    assert json.loads(failed["error"])["code"] == "answer_too_large"


@pytest.mark.parametrize("status", ["x", None, 200, True, 99999])
async def test_a_status_that_is_none_is_a_502(status: Any) -> None:
    """Whatever another handler says; nothing of it gets into a header."""
    failure = json.dumps({"message": "m", "status": status, "retry_after": "1\r\nx: y"})
    got = jobs.load_failure(failure)
    assert (got.status, got.header("retry-after")) == (502, None)


async def test_a_text_there_and_back() -> None:
    """What is no JSON, as a transcription may be."""
    outputs = await rendered(reply(200, (("content-type", "text/plain"),), "é".encode()))
    assert outputs == ["é"]
    assert await raw(jobs.load("é", streamed=False)) == (
        200,
        (("content-type", "text/plain; charset=utf-8"),),
        "é".encode(),
    )


async def test_a_stream_is_its_chunks() -> None:
    """As they come; the first does not stand for the whole answer."""
    outputs = await rendered(reply(200, EVENTS, b"data: 1\n\n", "data: é\n\n".encode()), streamed=True)
    assert outputs == ["data: 1\n\n", "data: é\n\n"]
    assert jobs.load(outputs[0], streamed=True) is None


def test_the_sdk_does_not_find_the_error_of_an_output() -> None:
    """It asks `.get("error")` of a dict, and would turn it into text; JSON has it all the same."""
    (output,) = jobs.render_error({**TOLD, "status": 404}, streamed=False)
    assert output.get("error") is None
    assert output.get("nothing", 1) == 1
    assert json.loads(json.dumps(output)) == {"error": {**TOLD, "status": 404}}


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_requests_own_fault_there_and_back(streamed: bool) -> None:
    """Same status, same object, nothing besides."""
    outputs = await rendered(reply(404, JSON, json.dumps({"error": TOLD}).encode()), streamed=streamed)
    assert len(outputs) == 1
    status, headers, got = await raw(jobs.load(outputs[0], streamed=streamed))
    assert (status, json.loads(got)) == (404, {"error": TOLD})
    assert dict(headers)["content-type"] == "application/json"


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_workers_fault_there_and_back(streamed: bool) -> None:
    """The job fails with the object as JSON; when to come again is in it."""
    busy = NotAdmitted("busy", retry_after_s=7).reply()
    *frames, failed = await rendered(busy, streamed=streamed)
    found = [jobs.load(frame, streamed=True) for frame in frames] + [jobs.load_failure(failed["error"])]
    assert len(found) == (2 if streamed else 1)
    for one in found:
        status, headers, got = await raw(one)
        assert (status, json.loads(got)["error"]["code"]) == (503, "not_admitted")
        assert dict(headers)["retry-after"] == "7"


async def test_a_stream_with_an_error_frame_fails_its_job() -> None:
    """And the frame went out before, without a status: the stream had one."""
    error = b'data: {"error":{"message":"m","type":"server_error","param":null,"code":"engine_dead"}}\n\n'
    *frames, failed = await rendered(reply(200, EVENTS, b"data: 1\n\n", error), streamed=True)
    assert frames == ["data: 1\n\n", error.decode()]
    assert json.loads(failed["error"])["code"] == "engine_dead"
    assert jobs.load(error.decode(), streamed=True) is None


def test_an_error_in_mid_stream_is_a_frame_without_status() -> None:
    """Of the worker's own making: a drain's deadline."""
    error = jobs.error_of(NotAdmitted("The worker is stopping.", retry_after_s=1))
    frame, failed = jobs.render_error(error, streamed=True, begun=True)
    assert "status" not in json.loads(frame.removeprefix("data: "))["error"]
    assert json.loads(failed["error"])["status"] == 503


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("handler: boom \ntraceback: File x", "The job failed: handler: boom"),
        (None, "The job failed: no reason was given"),
        ("", "The job failed: no reason was given"),
        ("[1]", "The job failed: [1]"),
    ],
)
async def test_a_failure_in_other_words_is_a_502(error: Any, says: str) -> None:
    """The SDK's own, or another handler's; its traceback is not for the client."""
    status, _, got = await raw(jobs.load_failure(error))
    told = json.loads(got)["error"]
    assert (status, told["code"]) == (502, "upstream_failed")
    assert told["message"] == says


async def test_an_error_without_a_shape_is_told_in_ours() -> None:
    """Nothing that reaches the edge is without one; should it be, the client still gets an object."""
    (failed,) = await rendered(reply(500, (), b"oops"))
    assert json.loads(failed["error"]) == {**jobs.error_of(RequestError("", code="internal_error"))} | {
        "message": "The server had an internal error."
    }
