"""`handler.body`: bodies that can be refused for themselves."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from handler import body as bodies
from handler.body import asks_for_stream, body_fault, json_object, look, looked, member, with_member
from handler.errors import BadRequest
from handler.members import LARGE_BYTES, Members, find
from handler.messages import Headers, Request

JSON: Headers = (("content-type", "application/json"),)


def said(body: bytes, headers: Headers = JSON, path: str = "/v1/chat/completions") -> str | None:
    """What is said against `body`."""
    fault = body_fault(Request("POST", path, headers, body))
    if fault is None:
        return None
    assert (fault.status, fault.type, fault.param, fault.code) == (
        400,
        "invalid_request_error",
        None,
        "invalid_request",
    )
    return fault.message


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", ": Expecting value (character 0)."),
        (b"{", ": Expecting property name enclosed in double quotes (character 1)."),
        (b"{} {}", ": Extra data (character 3)."),
        (b'{"a": "\xff"}', "."),
        (b'{"a": ' + b"1" * 5000 + b"}", "."),
        (b"[" * 100_000, "."),
    ],
    ids=["empty", "cut", "more", "no UTF-8", "a long number", "deep"],
)
def test_what_is_no_json_is_told_with_its_place(body: bytes, why: str) -> None:
    """And with no word of what was sent."""
    assert said(body) == f"We could not parse the JSON body of your request{why}"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"[]", "an array"),
        (b'"x"', "a string"),
        (b"5", "a number"),
        (b"1.5", "a number"),
        (b"NaN", "a number"),
        (b"true", "a boolean"),
        (b"null", "null"),
    ],
)
def test_what_is_no_object_is_named(body: bytes, kind: str) -> None:
    """Every route takes an object."""
    assert said(body) == f"The body of your request must be a JSON object, not {kind}."


@pytest.mark.parametrize(
    "body",
    [b"{}", b' {"a": 1} ', b'\xef\xbb\xbf{"a": 1}', '{"a": "é"}'.encode("utf-16"), b'{"a": "\\ud800"}'],
)
def test_an_object_passes(body: bytes) -> None:
    """Also in the encodings that vLLM's parser takes."""
    assert said(body) is None


@pytest.mark.parametrize("name", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_json_may_be_called_in_several_ways(name: str) -> None:
    """Case and parameters do not matter."""
    assert said(b"{}", (("content-type", name),)) is None


@pytest.mark.parametrize(
    "headers", [(), (("content-type", "text/plain"),), (("content-type", "application/problem+json"),)]
)
def test_another_content_type_is_refused(headers: Headers) -> None:
    """Before the body is looked at."""
    assert said(b"{", headers) == "The content type of your request must be application/json."


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/audio/translations"])
def test_forms_are_not_judged(path: str) -> None:
    """Audio comes in parts."""
    assert said(b"--x\r\n", (("content-type", "multipart/form-data; boundary=x"),), path) is None


def test_a_get_has_no_body() -> None:
    """Nothing is expected of it."""
    assert body_fault(Request("GET", "/v1/models")) is None


@pytest.mark.parametrize(
    ("body", "asks"),
    [
        (b'{"stream": true}', True),
        (b'{"stream": false}', False),
        (b'{"stream": 1}', True),
        (b'{"stream": 1.0}', True),
        (b'{"stream": "Yes"}', True),
        (b'{"stream": "maybe"}', False),
        (b'{"stream": 2}', False),
        (b'{"stream": null}', False),
        (b'{"a": "\\"stream\\": true"}', False),
        (b'["stream"]', False),
        (b'{"stream": true', False),
        (b"", False),
    ],
)
def test_who_asks_for_a_stream(body: bytes, asks: bool) -> None:
    """The body says it, and nothing that only looks so."""
    assert (
        asks_for_stream(Request("POST", "/v1/completions", (("content-type", "application/json"),), body))
        is asks
    )


def large(**fields: Any) -> Request:
    """A request whose body nobody parses on the loop."""
    said = json.dumps({"messages": [{"content": "x" * LARGE_BYTES}], **fields}).encode()
    return Request("POST", "/v1/chat/completions", JSON, said)


async def test_a_large_body_is_looked_at_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what may be asked of it; a small one, and a form, by whoever asks."""
    threads = []

    def seen(raw: bytes) -> Members:
        threads.append(threading.get_ident())
        return find(raw)

    monkeypatch.setattr(bodies, "find", seen)
    request = await looked(large(model="m", stream=True))
    assert request.members is not None
    assert request.members.values == {"model": "m", "stream": True}
    small = Request("POST", "/v1/chat/completions", JSON, b'{"model":"m"}')
    form = Request("POST", "/v1/audio/transcriptions", (), b"-" * (LARGE_BYTES + 1))
    assert [(await looked(one)).members for one in (small, form)] == [None, None]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "m", "stream": True},
        {"model": "m", "stream": "no"},
        {"stream": 1, "stream_options": {"include_usage": False}},
        {},
    ],
)
def test_what_is_said_of_a_large_body_is_what_all_of_it_says(fields: dict[str, Any]) -> None:
    """Whether it was looked at before or is read now."""
    plain = large(**fields)
    known = look(plain)
    for asked in (plain, known):
        assert json_object(asked).get("model") == fields.get("model")
        assert asks_for_stream(asked) is (fields.get("stream") in (1, True))
        assert member(asked, "stream_options") == fields.get("stream_options")
        changed = with_member(asked, "stream_options", {"a": 1})
        assert json.loads(changed.body) == {**json.loads(plain.body), "stream_options": {"a": 1}}
        assert member(changed, "stream_options") == {"a": 1}
        again = with_member(changed, "stream_options", None)
        assert json.loads(again.body)["stream_options"] is None


def test_a_large_body_that_can_not_be_understood_is_refused() -> None:
    """It asks for nothing."""
    request = large(stream=True)
    broken = look(Request("POST", request.path, JSON, request.body[:-1]))
    assert not asks_for_stream(broken)
    with pytest.raises(BadRequest, match="could not parse"):
        json_object(broken)
