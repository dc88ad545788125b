"""JSON that is read in pieces is what `json.loads` reads, and is written as it came."""

from __future__ import annotations

import json
import math
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from gateway.jobs.document import VALUES_MAX, Document, beside
from handler.members import LARGE_BYTES

WHOLE = [
    *("{}", " { } ", "[]", "null", '"a"', "-0", "1e3", '{"a":1}', '{"a":{"b":{"c":{"d":[1,2.5,null]}}}}'),
    *('{"a":{"b":"x"},"a":{"b":"y"}}', '{ "\\u0061" :\n{\t"b" : [ 1 , 2 ] } , "c" : {} }', '{"a":"\\ud800"}'),
    *('{"input":{"openai_input":{"model":"m","messages":[]},"n":1}}', '{"":{"":{"":""}}}', '{"ä":{"ö":"ü"}}'),
]
BROKEN = [
    *("", "{", "}", '{"a"}', '{"a":}', '{"a":1,}', '{"a":1 "b":2}', "{1:2}", "{'a':1}", '{"a":1}x'),
    *('{"a":{"b":1,}}', '{"a":{"b":1}', '{"a":"\n"}', '{"a":tru}', "{,}", '{"a"::1}', "[1,]", '{"a":1}{'),
    *("{" * 9, '{"a":' + "9" * 5000 + "}"),
]


@pytest.fixture(params=[VALUES_MAX, -1], ids=["few", "many"])
def values_max(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text is one of few values, or of many."""
    monkeypatch.setattr("gateway.jobs.document.VALUES_MAX", request.param)


@pytest.mark.usefixtures("values_max")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-be"])
@pytest.mark.parametrize("text", WHOLE)
def test_it_is_read_as_ever(text: str, encoding: str) -> None:
    """And each piece of it is JSON of itself."""
    raw = text.encode(encoding)
    document = Document(raw)
    assert document.value == json.loads(raw)
    pieces = [document.value]
    while pieces:
        piece = pieces.pop()
        assert json.loads(document.dump(piece)) == piece
        if isinstance(piece, dict):
            pieces += piece.values()


def read(raw: bytes, by: Callable[[bytes], Any]) -> str:
    """What `by` makes of `raw`."""
    try:
        return repr(by(raw))
    except ValueError:
        return "refused"


@pytest.mark.usefixtures("values_max")
@pytest.mark.parametrize("text", BROKEN)
def test_what_is_broken_is_refused(text: str) -> None:
    """As `json.loads` does."""
    raw = text.encode()
    assert read(raw, json.loads) == read(raw, Document) == "refused"


@pytest.mark.usefixtures("values_max")
def test_whatever_is_done_to_it_is_read_as_ever() -> None:
    """Or refused as ever."""
    chance = random.Random(7)
    signs = '{}[]:,"\\ \n0-.aenu'
    found = Counter[bool]()
    for _ in range(20_000):
        text = list(chance.choice(WHOLE))
        for _ in range(chance.randrange(3)):
            at = chance.randrange(len(text) + 1)
            text[at : at + chance.randrange(2)] = chance.choice(signs)
        raw = "".join(text).encode()
        expected = read(raw, json.loads)
        assert read(raw, lambda raw: Document(raw).value) == expected
        found[expected == "refused"] += 1
    assert min(found.values()) > 1000


def test_what_is_made_of_pieces_is_written_with_them() -> None:
    """A value that only looks like one that was read is written anew."""
    document = Document(b'{"input": {"a": {"x": 1.50}, "b": [1.50]}}')
    made = {"a": document.value["input"]["a"], "b": [1.5], "c": math.pi}
    assert document.dump(made) == b'{"a":{"x": 1.50},"b":[1.5],"c":3.141592653589793}'
    assert document.dump(document.value["input"]) == b'{"a": {"x": 1.50}, "b": [1.50]}'


async def test_what_is_large_is_read_beside_the_loop() -> None:
    """What is not is read at once."""
    here = threading.get_ident()
    assert await beside(LARGE_BYTES, threading.get_ident) == here
    assert await beside(LARGE_BYTES + 1, threading.get_ident) != here


@pytest.mark.parametrize(
    ("piece", "count"),
    [("{}", 1000), ("1", 1000), ("1.5", 1000), ("[]", VALUES_MAX), ('""', VALUES_MAX), ("null", VALUES_MAX)],
)
def test_the_parser_calls_python_on_its_way(piece: str, count: int) -> None:
    """Only there it lets others run: a thread alone would hold up the loop as well."""
    calls = Counter[str]()
    sys.setprofile(lambda _, event, __: calls.update([event]))
    try:
        Document(b'{"input":[' + ",".join([piece] * (count + 1)).encode() + b"]}")
    finally:
        sys.setprofile(None)
    assert calls["call"] > count
