"""What a server has to know of a JSON body of many megabytes, found without reading all of it.

Python's parser takes a tenth of a second for each megabyte of small values, many times their memory, and lets
nobody else run meanwhile, in a thread neither. This skips what nobody asks for: a string, of an image say,
at the speed of memory, and in a thread the loop goes on. It believes what it skips; who reads all of it says
what is wrong there.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

LARGE_BYTES = 256 << 10
"""A body up to this is parsed by whoever wants to know something of it."""
WANTED = frozenset({"model", "stream", "stream_options"})
VALUE_MAX_BYTES = 64 << 10
"""No value that is wanted is longer."""
MEMBERS_MAX = 10_000
"""No request has so many."""
STEP_BYTES = 64 << 10
"""How far is looked at once: nobody else runs meanwhile."""

_SPACE = re.compile(rb"[ \t\n\r]*")
_SCALAR = re.compile(rb"[^,\]} \t\n\r]+")
_STRING = rb'"(?>[^"\\]++|\\.)*+"'
_STRINGS = re.compile(_STRING, re.DOTALL)
_WHOLE_STRINGS = re.compile(rb'(?>[^"]++|%b)*+' % _STRING, re.DOTALL)
_SIGN = re.compile(rb"[\[\]{}]|" + _STRING, re.DOTALL)
_NO_SIGN = bytes({*range(256)} - {*b"[]{}"})
_DEPTH = [(sign in b"[{") - (sign in b"]}") for sign in range(256)]
_BACKSLASH = ord("\\")


@dataclass(frozen=True, slots=True)
class Members:
    """Of an object those members that are `WANTED`, and where in its text their values are.

    `broken`: it is no object that could be understood.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    broken: bool = False


def find(raw: bytes) -> Members:
    """The members of the object in `raw`, JSON in UTF-8. Of two of one name the last counts, as in Python."""
    try:
        return _members(raw)
    except (ValueError, RecursionError):
        return Members(broken=True)


def _members(raw: bytes) -> Members:
    values: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    at = _behind(raw, b"{", len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0)
    more, seen = not raw.startswith(b"}", at), 0
    while more:
        if (seen := seen + 1) > MEMBERS_MAX:
            raise ValueError
        name_at = _behind(raw, b'"', at) - 1
        name_end = _string(raw, name_at + 1)
        at = _behind(raw, b":", name_end)
        end = _value(raw, at)
        if (name := _name(raw[name_at:name_end])) in WANTED:
            if end - at > VALUE_MAX_BYTES:
                raise ValueError
            values[name], spans[name] = json.loads(raw[at:end]), (at, end)
        at = _space(raw, end)
        if more := raw.startswith(b",", at):
            at += 1
    if _space(raw, _behind(raw, b"}", at)) != len(raw):
        raise ValueError
    return Members(values, spans)


def _name(raw: bytes) -> str:
    """The name in a JSON string; of one that is long, nothing."""
    return "" if len(raw) > VALUE_MAX_BYTES else str(json.loads(raw))


def _value(raw: bytes, at: int) -> int:
    """Where the value ends that begins at `at`."""
    if raw.startswith(b'"', at):
        return _string(raw, at + 1)
    if raw.startswith((b"{", b"["), at):
        return _nested(raw, at)
    if found := _SCALAR.match(raw, at):
        return found.end()
    raise ValueError


def _nested(raw: bytes, at: int) -> int:
    """Where the object or list ends that begins at `at`."""
    depth = 0
    while at < len(raw):
        end = _match(_WHOLE_STRINGS, raw, at, at + STEP_BYTES)
        if end == at:  # a string that is longer than a step
            at = _string(raw, at + 1)
            continue
        signs = _STRINGS.sub(b"", raw[at:end]).translate(None, _NO_SIGN)
        depths = [*accumulate((_DEPTH[sign] for sign in signs), initial=depth)]
        if signs and min(depths[1:]) <= 0:
            return _closed(raw, at, depth)
        at, depth = end, depths[-1]
    raise ValueError


def _closed(raw: bytes, at: int, depth: int) -> int:
    """The place soon behind `at` where nothing of `depth` is open any more."""
    for found in _SIGN.finditer(raw, at):
        depth += _DEPTH[raw[found.start()]]
        if depth <= 0 and raw[found.start()] in b"]}":
            return found.end()
    raise ValueError


def _string(raw: bytes, at: int) -> int:
    """Where the string ends whose first character is at `at`, its closing quote included."""
    while (end := raw.find(b'"', at)) >= 0:
        back = end
        while back > at and raw[back - 1] == _BACKSLASH:
            back -= 1
        at = end + 1
        if (end - back) % 2 == 0:
            return at
    raise ValueError


def _space(raw: bytes, at: int) -> int:
    return _match(_SPACE, raw, at, len(raw))


def _match(pattern: re.Pattern[bytes], raw: bytes, at: int, end: int) -> int:
    """Where the match of `pattern` at `at` ends, which may be empty."""
    found = pattern.match(raw, at, end)
    assert found is not None, "nothing is a match too"
    return found.end()


def _behind(raw: bytes, sign: bytes, at: int) -> int:
    """The place behind `sign`, which comes next, and behind the space there, unless that is in a string."""
    at = _space(raw, at)
    if not raw.startswith(sign, at):
        raise ValueError
    return at + 1 if sign == b'"' else _space(raw, at + 1)
