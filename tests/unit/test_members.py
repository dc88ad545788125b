"""What is found in a large body is what Python's parser finds there."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler import members
from handler.members import WANTED, Members, find

TEXT = st.text(st.sampled_from('{}[]",:\\/ \n\tnué😀\x00\ud800a'), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.lists(st.tuples(st.sampled_from([*WANTED, "messages", "x"]) | TEXT, VALUES), max_size=6)


def joined(pairs: list[tuple[str, Any]], *, ascii_only: bool, indent: bool) -> bytes:
    """An object in which a name may stand more than once."""
    space = " \r\n\t" if indent else ""

    def one(value: Any) -> str:
        return json.dumps(value, ensure_ascii=ascii_only, indent=1 if indent else None)

    inner = f"{space},{space}".join(f"{one(name)}{space}:{space}{one(value)}" for name, value in pairs)
    return f"{space}{{{space}{inner}{space}}}{space}".encode(errors="surrogatepass")


@pytest.mark.parametrize("step", [1, 7, 64 << 10])
@given(pairs=OBJECTS, ascii_only=st.booleans(), indent=st.booleans())
def test_members_are_those_of_the_parser(
    step: int, pairs: list[tuple[str, Any]], ascii_only: bool, indent: bool
) -> None:
    """Whatever stands around them, however far is looked at once; their places are those of their text."""
    raw = joined(pairs, ascii_only=ascii_only, indent=indent)
    try:
        expected = {name: value for name, value in json.loads(raw).items() if name in WANTED}
    except ValueError:  # half a character that was not escaped
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(members, "STEP_BYTES", step)
        found = find(raw)
    assert not found.broken
    assert repr(found.values) == repr({name: expected[name] for name in found.values})
    assert found.values.keys() == expected.keys()
    for name, (at, end) in found.spans.items():
        assert repr(json.loads(raw[at:end])) == repr(expected[name])


@pytest.mark.parametrize(
    "raw",
    [
        *(
            b"",
            b" ",
            b"{",
            b"[]",
            b'"model"',
            b"5",
            b"{}x",
            b"{,}",
            b'{"model"}',
            b'{"model":}',
            b"{model:1}",
        ),
        *(
            b'{"model":"a"',
            b'{"model":"a\\"}',
            b'{"model":"a",}',
            b'{"model":"a"]',
            b'{"x":[1,2',
            b'{"x":["a]}',
        ),
        *(b'{"model":nonsense}', b'{"model":"\xff"}', b'{"stream":tru}', '{"model":"a"}'.encode("utf-16")),
        b'{"model":"%b"}' % (b"a" * members.VALUE_MAX_BYTES),
        b'{"model":"a"%b}' % (b',"x":1' * members.MEMBERS_MAX),
    ],
)
def test_what_is_no_object_is_broken(raw: bytes) -> None:
    """As far as it was looked at: who reads all of it says what is wrong."""
    assert find(raw) == Members(broken=True)


@pytest.mark.parametrize(
    "inner",
    [b'"%b"' % (b"a" * 300_000), b"[%b1]" % (b"[]," * 100_000), b'["%b"]' % (b'\\\\\\"]' * 50_000)],
    ids=["a string", "lists", "backslashes"],
)
def test_what_is_larger_than_a_step_is_skipped(inner: bytes) -> None:
    """An image, many small things, and what looks like an end and is none."""
    raw = b'{"messages":%b,"stream":true,"model":"m"}' % inner
    assert find(raw).values == {"stream": True, "model": "m"}
