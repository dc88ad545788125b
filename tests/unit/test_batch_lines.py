"""`handler.batch_lines` and `batch_source`: the bytes of a file as requests, answers as lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler import batch_lines, batch_source
from handler.batch_lines import Item, Line, Progress, Splitter, answered, parse, refused
from handler.batch_source import Plan, Source
from handler.errors import NotFound

URL = "/v1/chat/completions"
GOOD: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": URL, "body": {"messages": []}}


def a_line(value: object, number: int = 1) -> Line:
    """One line of a file."""
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Line(number, 0, len(raw) + 1, raw + b"\n")


def an_item(value: object = GOOD, *, duplicate: bool = False, max_body_bytes: int = 1000) -> Item:
    """What is made of a line."""
    return parse(a_line(value), "bucket/in/x.jsonl@v1", duplicate=duplicate, max_body_bytes=max_body_bytes)


def cut(raw: bytes, sizes: list[int]) -> Iterator[bytes]:
    """`raw` in pieces of `sizes`, and the rest."""
    for size in sizes:
        yield raw[:size]
        raw = raw[size:]
    yield raw


def source(raw: bytes, max_body_bytes: int = 1000) -> Source:
    """A file."""
    return Source(lambda start, end: raw[start:end], len(raw), "batch", max_body_bytes)


# --- bytes to lines -----------------------------------------------------------------------------


@given(
    st.lists(st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b"")), max_size=8),
    st.lists(st.integers(0, 9), max_size=30),
    st.booleans(),
)
def test_however_the_pieces_fall_the_lines_are_those_of_the_file(
    lines: list[bytes], sizes: list[int], ended: bool
) -> None:
    """Numbered from one, without gap or overlap. One that is too long holds nothing; the next are as ever."""
    raw = b"\n".join(lines) + (b"\n" if ended else b"")
    splitter = Splitter(max_bytes=8)
    found = [line for piece in cut(raw, sizes) for line in splitter.feed(piece)] + list(splitter.close())
    assert [line.number for line in found] == list(range(1, len(found) + 1))
    assert [line.start for line in found] == [0, *[line.end for line in found]][: len(found)]
    assert [raw[line.start : line.end] for line in found] == re.findall(rb"[^\n]*\n|[^\n]+", raw)
    for line in found:
        whole = raw[line.start : line.end]
        assert line.raw == (whole if len(whole) <= 8 else None)


def test_a_file_is_gone_on_with_at_any_line() -> None:
    """With the offsets and numbers of the whole file."""
    splitter = Splitter(100, at=4, number=3)
    assert list(splitter.feed(b"c\nd")) == [Line(3, 4, 6, b"c\n")]
    assert list(splitter.close()) == [Line(4, 6, 7, b"d")]


# --- lines to requests --------------------------------------------------------------------------


def test_a_line_is_a_request() -> None:
    """Its body is sent as JSON, half characters and all."""
    item = an_item({**GOOD, "body": {"messages": [{"content": "ü \ud800"}]}})
    assert item.fault is None
    assert item.request is not None
    assert (item.custom_id, item.request.method, item.request.path) == ("a", "POST", URL)
    assert item.request.header("content-type") == "application/json"
    assert item.request.body == b'{"messages":[{"content":"\xc3\xbc \\ud800"}]}'
    assert item.line.raw is None


@pytest.mark.parametrize(
    ("value", "code", "param", "custom_id"),
    [
        (b"no json", "invalid_json_line", None, None),
        (b"\xff\xfe{}", "invalid_json_line", None, None),
        (b"[" * 100_000, "invalid_json_line", None, None),
        (b'["a"]', "invalid_json_line", None, None),
        ({**GOOD, "custom_id": None}, "invalid_custom_id", "custom_id", None),
        ({**GOOD, "custom_id": ""}, "invalid_custom_id", "custom_id", None),
        ({**GOOD, "custom_id": 7}, "invalid_custom_id", "custom_id", None),
        ({**GOOD, "custom_id": "x" * 513}, "invalid_custom_id", "custom_id", None),
        ({**GOOD, "method": "GET"}, "invalid_method", "method", "a"),
        ({**GOOD, "url": None}, "missing_required_parameter", "url", "a"),
        ({**GOOD, "url": "https://api.openai.com/v1/chat/completions"}, "unknown_url", None, "a"),
        ({**GOOD, "url": "/v1/../metrics"}, "unknown_url", None, "a"),
        ({**GOOD, "url": "/v1/models"}, "method_not_allowed", None, "a"),
        ({**GOOD, "url": "/v1/audio/transcriptions"}, "invalid_url", "url", "a"),
        ({**GOOD, "body": "x"}, "missing_required_parameter", "body", "a"),
        ({**GOOD, "body": {"stream": True}}, "invalid_request", "stream", "a"),
        ({**GOOD, "body": {"x": "x" * 1000}}, "request_too_large", None, "a"),
    ],
)
def test_a_bad_line_says_what_is_wrong_with_it(
    value: object, code: str, param: str | None, custom_id: str | None
) -> None:
    """It is not asked, and keeps its `custom_id` if it has one."""
    item = an_item(value)
    assert item.request is None
    assert item.fault is not None
    assert (item.fault.code, item.fault.param, item.custom_id) == (code, param, custom_id)


def test_a_line_whose_id_was_there_before_is_bad() -> None:
    """As the plan of the file says."""
    item = an_item(duplicate=True)
    assert item.fault is not None
    assert (item.fault.code, item.custom_id) == ("duplicate_custom_id", "a")


def test_a_line_that_is_too_long_is_bad() -> None:
    """It was never held."""
    item = parse(Line(1, 0, 10**9, None), "batch", duplicate=False, max_body_bytes=10)
    assert item.fault is not None
    assert item.fault.code == "request_too_large"


def test_the_id_of_an_answer_is_the_same_whoever_asks() -> None:
    """And another for another line, or another version of the file."""
    assert an_item().key == an_item().key
    assert an_item().key.startswith("batch_req_")
    other = parse(a_line(GOOD), "bucket/in/x.jsonl@v2", duplicate=False, max_body_bytes=1000)
    assert other.key != an_item().key


# --- answers to lines ---------------------------------------------------------------------------


def test_an_answer_becomes_a_line_as_it_was_said() -> None:
    """Its bytes are kept, its tokens are found."""
    body = (
        '{"text":"ü","usage":{"prompt_tokens":5,"completion_tokens":7,'
        '"prompt_tokens_details":{"cached_tokens":3},"completion_tokens_details":{"reasoning_tokens":2}}}'
    ).encode()
    item = an_item()
    outcome = answered(item, 200, body)
    assert body in outcome.raw
    assert outcome.raw.count(b"\n") == 1
    assert json.loads(outcome.raw) == {
        "id": item.key,
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": item.key, "body": json.loads(body)},
        "error": None,
    }
    assert (outcome.good, outcome.tokens) == (True, (5, 3, 7, 2))


@pytest.mark.parametrize(
    ("body", "told"), [(b'{"a":\n1}', {"a": 1}), (b"plain\ntext", "plain\ntext"), (b"", "")]
)
def test_a_line_is_one_line_whatever_the_answer(body: bytes, told: object) -> None:
    """JSON is laid out anew, other text becomes a string."""
    outcome = answered(an_item(), 200, body)
    assert outcome.raw.count(b"\n") == 1
    assert json.loads(outcome.raw)["response"]["body"] == told


def test_an_answer_with_an_error_is_told_among_the_errors() -> None:
    """As the response that it is; its `error` is for what was never asked."""
    outcome = answered(an_item(), 404, b'{"error":{"code":"model_not_found"}}')
    told = json.loads(outcome.raw)
    assert not outcome.good
    assert (told["response"]["status_code"], told["error"]) == (404, None)


def test_a_line_that_was_not_asked_tells_why_and_its_number() -> None:
    """As OpenAI's, with what helps to find it."""
    item = parse(a_line(GOOD, 17), "batch", duplicate=False, max_body_bytes=1000)
    assert json.loads(refused(item, NotFound("no", code="batch_cancelled")).raw) == {
        "id": item.key,
        "custom_id": "a",
        "response": None,
        "error": {"code": "batch_cancelled", "message": "no", "param": None, "line": 17},
    }


def test_progress_survives_as_metadata() -> None:
    """It adds up, and comes back as it was."""
    item = parse(Line(4, 30, 40, a_line(GOOD).raw), "batch", duplicate=False, max_body_bytes=1000)
    body = b'{"usage":{"input_tokens":5,"output_tokens":7}}'
    progress = Progress(30, 4, 2, 1, 10, 0, 20, 0).after(item.line, answered(item, 200, body))
    assert progress == Progress(40, 5, 3, 1, 15, 0, 27, 0)
    assert progress.after(item.line, refused(item, NotFound("no"))).failed == 2
    assert Progress.load(progress.dump()) == progress
    assert not any("_" in name for name in progress.dump())  # some stores would drop it


# --- the whole file -----------------------------------------------------------------------------


def test_a_look_at_the_file_finds_what_no_line_tells() -> None:
    """How many requests there are, which ids come again, what is asked first."""
    lines = [{"custom_id": "bad", "url": "/v1/x", "method": "POST"}, GOOD, {**GOOD, "custom_id": "b"}, GOOD]
    raw = b"\n\n".join([b"\xef\xbb\xbf", b"no json", *[json.dumps(one).encode() for one in lines], b"", b""])
    assert source(raw).scan(lambda: True) == Plan(5, frozenset({11}), URL)


def test_a_look_at_the_file_ends_with_the_workers_time() -> None:
    """Then it says nothing."""
    assert source(b"{}\n").scan(lambda: False) is None


def test_a_look_at_a_file_with_too_many_requests_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing more to know."""
    monkeypatch.setattr(batch_source, "REQUESTS_MAX", 2)
    plan = source(b"{}\n" * 100).scan(lambda: True)
    assert plan is not None
    assert plan.total == 3


def test_items_are_the_same_from_wherever_the_file_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty lines count as the beginning of the next; the last line needs no end."""
    monkeypatch.setattr(batch_source, "READ_BYTES", 7)
    monkeypatch.setattr(batch_lines, "ENVELOPE_BYTES", 100)
    raw = b"\r\n \n".join(json.dumps({**GOOD, "custom_id": str(number)}).encode() for number in range(5))
    every = [item for items in source(raw).items(Progress(), {5}) for item in items]
    assert [item.custom_id for item in every] == ["0", "1", "2", "3", "4"]
    assert [item.line.number for item in every] == [1, 3, 5, 7, 9]
    assert [item.fault.code if item.fault else None for item in every] == [
        None,
        None,
        "duplicate_custom_id",
        None,
        None,
    ]
    assert every[-1].line.end == len(raw)
    for before, item in pairwise(every):
        assert item.line.start == before.line.end
        progress = Progress(before.line.end, before.line.number + 1)
        again = [one for items in source(raw).items(progress, {5}) for one in items]
        assert [(one.key, one.line) for one in again] == [
            (one.key, one.line) for one in every if one.line.start >= item.line.start
        ]
