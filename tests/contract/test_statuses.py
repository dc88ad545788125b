"""Every error that a client can make, through the gateway to vLLM and back: status, type, param, code.

The table is data. Beside each row stands what api.openai.com answers where that is known
and differs; `code` is ours where OpenAI's is not documented. Where vLLM names no
parameter, none is made up.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest

from tests.servers import MAX_MODEL_LEN, MODEL, Server, Stack

HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
JSON = "application/json"
LONG = "hello world " * 2000  # too long by its characters alone, which is how vLLM tells first
TOKENS = [5] * 2 * MAX_MODEL_LEN  # too long by its tokens

BAD = "invalid_request_error"


@dataclass(frozen=True)
class Case:
    """One request and what is answered: `expected` is status, type, param, code; of a success the status."""

    name: str
    expected: tuple[int, str | None, str | None, str | None]
    path: str = "chat/completions"
    method: str = "POST"
    body: Any = None
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": JSON})
    answered: dict[str, str] = field(default_factory=dict)
    """Headers of the answer that tell the client what to do."""


def chat(name: str, expected: tuple[int, str | None, str | None, str | None], /, **change: Any) -> Case:
    """A chat request that is right but for `change`; a field changed to ... is left out."""
    body = {"model": MODEL, "messages": HI, "max_tokens": 2, "temperature": 0, **change}
    return Case(name, expected, body={key: value for key, value in body.items() if value is not ...})


def text(name: str, expected: tuple[int, str | None, str | None, str | None], /, **change: Any) -> Case:
    """A text completion that is right but for `change`."""
    body = {"model": MODEL, "prompt": "Hi", "max_tokens": 2, "temperature": 0, **change}
    body = {key: value for key, value in body.items() if value is not ...}
    return Case(name, expected, path="completions", body=body)


def bad(param: str | None = None, code: str = "invalid_request") -> tuple[int, str, str | None, str]:
    """A 400."""
    return 400, BAD, param, code


OK = (200, None, None, None)
TOO_LONG = "context_length_exceeded"
NO_MODEL = (404, BAD, "model", "model_not_found")
NO_ROUTE = (404, BAD, None, "unknown_url")
WRONG_METHOD = (405, BAD, None, "method_not_allowed")
NO_KEY = (401, BAD, None, "invalid_api_key")
BEARER = {"www-authenticate": "Bearer"}

CASES = [
    # The key. OpenAI: 401, invalid_request_error, null, invalid_api_key (its documentation of errors).
    Case("no key", NO_KEY, headers={"authorization": ""}, answered=BEARER),
    Case("wrong key", NO_KEY, headers={"authorization": "Bearer sk-wrong"}, answered=BEARER),
    Case("Basic", NO_KEY, headers={"authorization": "Basic ZnQtdGVzdC1rZXk="}, answered=BEARER),
    Case("api-key", NO_KEY, headers={"authorization": "", "api-key": "ft-test-key"}, answered=BEARER),
    Case("no key, models", NO_KEY, "models", "GET", headers={"authorization": ""}, answered=BEARER),
    # Checked before anything is said of what exists.
    Case("no key, no route", NO_KEY, "files", "GET", headers={"authorization": ""}, answered=BEARER),
    Case("no key, OPTIONS", NO_KEY, "models", "OPTIONS", headers={"authorization": ""}, answered=BEARER),
    # Models. OpenAI: 404, invalid_request_error, param model (null in older answers), model_not_found.
    chat("unknown model", NO_MODEL, model="other"),
    chat("unknown model, streamed", NO_MODEL, model="other", stream=True),
    text("unknown model, text", NO_MODEL, model="other"),
    Case("retrieve unknown model", NO_MODEL, "models/other", "GET"),
    Case("retrieve unknown model with slashes", NO_MODEL, "models/org/other", "GET"),
    chat("model no string", bad("model"), model=5),
    # OpenAI: 400, you must provide a model parameter. A worker serves one model: vLLM takes it.
    chat("model missing", OK, model=...),
    chat("model null", OK, model=None),
    chat("model empty", OK, model=""),
    # Routes and methods. OpenAI: 404 unknown_url and 405 method_not_allowed, as here.
    Case("no route", NO_ROUTE, "fine_tuning/jobs", "GET"),
    Case("no route, POST", NO_ROUTE, "load_lora_adapter", body={}),
    Case("route of another task", NO_ROUTE, "embeddings", body={"model": MODEL, "input": "Hi"}),
    Case("route of another task, rerank", NO_ROUTE, "rerank", body={"query": "a", "documents": ["b"]}),
    Case("stored response", NO_ROUTE, "responses/resp_1", "GET"),
    Case("GET chat", WRONG_METHOD, method="GET", answered={"allow": "POST"}),
    Case("POST models", WRONG_METHOD, "models", body={}, answered={"allow": "GET"}),
    Case("DELETE model", WRONG_METHOD, "models/tinychat", "DELETE", answered={"allow": "GET"}),
    Case("OPTIONS without CORS", WRONG_METHOD, "models", "OPTIONS", answered={"allow": "GET"}),
    # Bodies. OpenAI: 400 with param null: "We could not parse the JSON body of your request".
    Case("no JSON", bad(), body=b"{"),
    Case("JSON cut", bad(), body=b'{"model": "tinychat", "messages": ['),
    Case("an array", bad(), body=b"[]"),
    Case("a string", bad(), body=b'"x"'),
    Case("null", bad(), body=b"null"),
    Case("empty", bad(), body=b""),
    Case(
        "not UTF-8", bad(), body=b'{"model": "tinychat", "messages": [{"role": "user", "content": "\xff"}]}'
    ),
    Case(
        "half a character",
        bad(),
        body=b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}',
    ),
    Case(
        "half a character in the prompt",
        bad(),
        body=b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ),
    Case("no content type", bad(), body=b"{}", headers={}),
    Case("wrong content type", bad(), body=b"{}", headers={"content-type": "text/plain"}),
    Case(
        "content type with charset",
        OK,
        body={"messages": HI, "max_tokens": 1},
        headers={"content-type": "application/json; charset=utf-8"},
    ),
    # OpenAI answers 413 too; its type and code are not documented.
    Case("too large", (413, BAD, None, "request_too_large"), body=b"x" * (33 << 20)),
    # Messages. OpenAI: 400, param messages or messages[0].role.
    chat("messages missing", bad("messages"), messages=...),
    chat("messages null", bad(), messages=None),  # OpenAI: param messages
    chat("messages no list", bad("messages"), messages="Hi"),
    chat("messages empty", bad(), messages=[]),  # OpenAI: param messages; vLLM's template refuses it
    chat("role missing", bad("messages[0].role"), messages=[{"content": "Hi"}]),
    chat("content of a wrong type", bad("messages[0].content"), messages=[{"role": "user", "content": 5}]),
    chat(
        "role unknown", OK, messages=[{"role": "wizard", "content": "x"}]
    ),  # OpenAI: 400; vLLM asks the template
    text("prompt missing", bad("prompt"), prompt=...),
    text("prompt empty", bad("prompt"), prompt=""),  # OpenAI takes it as its start token
    text("prompt an empty list", bad(), prompt=[]),
    text("token unknown", bad(), prompt=[99_999_999]),
    # Too long. OpenAI: 400, param messages, code context_length_exceeded.
    chat("too long", bad("messages", TOO_LONG), messages=[{"role": "user", "content": LONG}]),
    chat(
        "too long, streamed",
        bad("messages", TOO_LONG),
        messages=[{"role": "user", "content": LONG}],
        stream=True,
    ),
    text("too long, text", bad("prompt", TOO_LONG), prompt=LONG),
    text("too long, tokens", bad("prompt", TOO_LONG), prompt=TOKENS),
    # Lengths. OpenAI: 400, param max_tokens.
    chat("more tokens than the model has", bad("max_tokens"), max_tokens=5 * MAX_MODEL_LEN),
    chat("more tokens than are left", OK, max_tokens=MAX_MODEL_LEN - 4, stop=["e"]),  # cut to what fits
    chat("no tokens", bad("max_tokens"), max_tokens=0),
    chat("less than no tokens", bad("max_tokens"), max_tokens=-1),
    chat("no completion tokens", bad("max_tokens"), max_tokens=..., max_completion_tokens=0),
    chat("tokens no number", bad("max_tokens"), max_tokens="x"),
    # Sampling. OpenAI: 400, param as named; where vLLM's check names none, none is given here.
    chat("temperature below", bad("temperature"), temperature=-0.1),
    chat("temperature above", bad("temperature"), temperature=2.1),
    chat("temperature no number", bad("temperature"), temperature="warm"),
    chat("top_p 0", bad("top_p"), top_p=0),  # OpenAI takes it
    chat("top_p above", bad("top_p"), top_p=1.1),
    chat("presence_penalty above", bad(), presence_penalty=2.1),
    chat("frequency_penalty below", bad(), frequency_penalty=-2.1),
    chat("n 0", bad(), n=0),
    chat("n above", bad(), n=100_000, temperature=1),  # OpenAI: at most 128
    chat("n greedy", bad(), n=2),  # OpenAI takes it and says the same twice
    chat("seed no number", bad("seed"), seed="x"),
    chat("user no string", bad("user"), user=5),
    chat("logprobs no switch", bad("logprobs"), logprobs=5),
    chat("top_logprobs above", bad("logprobs"), logprobs=True, top_logprobs=21),  # OpenAI: param top_logprobs
    chat("top_logprobs alone", bad("top_logprobs"), top_logprobs=2),
    text("logprobs above", bad("logprobs"), logprobs=21),  # OpenAI: at most 5
    chat("logit_bias no token", bad("logit_bias"), logit_bias={"x": 1}),
    chat("logit_bias unknown token", bad("logit_bias"), logit_bias={"99999999": 1}),
    chat("logprob of an unknown token", bad("logprob_token_ids"), logprobs=True, logprob_token_ids=[10**9]),
    # vLLM finds this one when the stream has begun: the client gets the status all the same.
    chat(
        "logprob of an unknown token, streamed",
        bad("logprob_token_ids"),
        logprobs=True,
        logprob_token_ids=[10**9],
        stream=True,
    ),
    chat("five stops", bad("stop"), stop=["a", "b", "c", "d", "e"]),
    chat("stop empty", bad(), stop=""),  # OpenAI takes it
    # Streams. OpenAI: 400, param stream_options.
    chat("stream no switch", bad("stream"), stream="maybe"),
    chat("stream_options without stream", bad("stream_options"), stream_options={"include_usage": True}),
    # Tools. OpenAI: 400, param tools or tool_choice.
    chat("tools empty", bad("tools"), tools=[]),
    chat("tool without function", bad("tools[0].function"), tools=[{"type": "function"}]),
    chat("tool_choice without tools", bad("tool_choice"), tool_choice="auto"),
    chat("tool_choice required without tools", bad("tool_choice"), tool_choice="required"),
    chat(
        "tool_choice of an unknown tool",
        bad("tool_choice"),
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "g"}},
    ),
    # Structured output. OpenAI: 400, param response_format.
    chat("response_format unknown", bad("response_format.type"), response_format={"type": "x"}),
    chat("response_format without schema", bad("response_format"), response_format={"type": "json_schema"}),
    chat(
        "response_format of no schema",
        bad(),
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nope"}}},
    ),
    text("suffix", bad("suffix"), suffix="x"),  # OpenAI: of gpt-3.5-turbo-instruct only
    # OpenAI: 400 "Unrecognized request argument supplied". vLLM ignores what it does not know.
    chat("unknown parameter", OK, wizard=1),
    chat("metadata without store", OK, metadata={"a": "b"}),
    chat("best_of and other old fields", OK, functions=[], service_tier="auto", store=False),
    # Other routes.
    Case("responses without input", bad("input"), "responses", body={"model": MODEL}),
    Case("messages without anything", bad("messages"), "messages", body={"model": MODEL}),
    Case("tokenize", OK, "tokenize", body={"model": MODEL, "prompt": "Hi"}),
    Case("detokenize", OK, "detokenize", body={"model": MODEL, "tokens": [5, 6]}),
]


async def answered(server: Server, case: Case) -> tuple[int, dict[str, Any], Any]:
    """Status, body and headers of the answer to `case`."""
    content = case.body if isinstance(case.body, bytes | None) else json.dumps(case.body).encode()
    async with server.http() as http:
        reply = await http.request(case.method, case.path, content=content, headers=case.headers)
    return reply.status_code, reply.json() if reply.status_code >= 400 else {}, reply.headers


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_status_type_param_and_code(case: Case, stack: Stack) -> None:
    """Each error has OpenAI's shape, a message, a request id, and tells what to do if there is something."""
    status, body, headers = await answered(stack.gateway, case)
    error = body.get("error", {})
    assert (status, error.get("type"), error.get("param"), error.get("code")) == case.expected
    assert headers["x-request-id"]
    assert {name: headers.get(name) for name in case.answered} == case.answered
    if status >= 400:
        assert headers["content-type"] == JSON
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert error["message"]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.expected != NO_KEY], ids=lambda case: case.name
)
async def test_the_worker_alone_answers_the_same(case: Case, stack: Stack) -> None:
    """The gateway adds the key and nothing else."""
    assert (await answered(stack.worker, case))[:2] == (await answered(stack.gateway, case))[:2]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.expected != NO_KEY], ids=lambda case: case.name
)
async def test_a_job_is_answered_the_same(case: Case, stack: Stack, jobs_stack: Stack) -> None:
    """To the letter of vLLM's message: RunPod's way through two more processes changes nothing."""
    assert (await answered(jobs_stack.gateway, case))[:2] == (await answered(stack.gateway, case))[:2]


REFUSED_BY_THE_API = {"too large", "not UTF-8"}
"""A REST API takes 10 MB, and text that is UTF-8: what is not, it mends."""


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in REFUSED_BY_THE_API], ids=lambda case: case.name
)
async def test_a_function_answers_the_same(
    case: Case, stack: Stack, lambda_function: dict[str, Server]
) -> None:
    """Keys included, which the function checks itself."""
    assert (await answered(lambda_function["rest"], case))[:2] == (await answered(stack.gateway, case))[:2]


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("/v2/nobody/openai/v1/models", "endpoint_not_found"),
        ("/v2/LOCAL/openai/v1/models", "endpoint_not_found"),
        ("/v2/local/v1/models", "unknown_url"),
        ("/v2/local/openai/models", "unknown_url"),
        ("/v2/local/openai/v1", "unknown_url"),
        ("/v2/local/openai/metrics", "unknown_url"),
        ("/v2/local/openai/v1/../metrics", "unknown_url"),
        ("/v2/local/openai/v1/%2e%2e/metrics", "unknown_url"),
        ("/v2/local/openai/v1/..%2f..%2f..%2f..%2fmetrics", "unknown_url"),
        ("/v2/local/openai//v1/models", "unknown_url"),
        ("/v1/models", "unknown_url"),
        ("/v2", "endpoint_not_found"),
        ("/docs", "unknown_url"),
        ("/invocations", "unknown_url"),
    ],
)
async def test_other_urls_are_404_in_openais_shape(url: str, code: str, stack: Stack) -> None:
    """A wrong endpoint id, a wrong prefix, a way out of the prefix: none is a redirect or a page."""
    async with stack.gateway.http() as http:
        root = http.base_url.copy_with(raw_path=url.encode())
        reply = await http.get(root)
    assert (reply.status_code, reply.json()["error"]["type"]) == (404, BAD)
    assert reply.json()["error"]["code"] == code


@pytest.mark.parametrize(
    ("name", "raised"),
    [
        ("wrong key", openai.AuthenticationError),
        ("unknown model", openai.NotFoundError),
        ("no route", openai.NotFoundError),
        ("temperature above", openai.BadRequestError),
        ("too large", openai.APIStatusError),
        ("GET chat", openai.APIStatusError),
    ],
)
async def test_the_official_client_raises_its_own_error(
    name: str, raised: type[openai.APIStatusError], stack: Stack
) -> None:
    """With the fields of the table on it, so that a program can tell errors apart; none is tried again."""
    case = next(case for case in CASES if case.name == name)
    async with stack.gateway.client().with_options(max_retries=2) as client:
        content = case.body if isinstance(case.body, bytes) else json.dumps(case.body or {}).encode()
        options: Any = {"headers": case.headers}
        asking = (
            client.get("/" + case.path, cast_to=object, options=options)
            if case.method == "GET"
            else client.post("/" + case.path, cast_to=object, content=content, options=options)
        )
        with pytest.raises(raised) as error:
            await asking
    assert type(error.value) is raised
    assert (error.value.status_code, error.value.type, error.value.param, error.value.code) == case.expected
    assert error.value.request_id
    assert error.value.request.headers["x-stainless-retry-count"] == "0"
