"""JSON of many megabytes, read while the loop goes on.

Python's parser lets nobody else run before its end, in a thread neither, except where it calls Python: so it
is given something to call for every object and number, and a text of very many values is left to the parser
that is all Python. Its writer calls nothing: what has to be JSON again is cut out of the text.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from json.scanner import py_make_scanner  # type: ignore[attr-defined]  # typeshed does not know it
from typing import Any, TypeVar

from handler.members import LARGE_BYTES
from handler.messages import as_json

T = TypeVar("T")

DEPTH = 2
"""How deep in objects the text of each member is known: a job's `input`, and what is in that."""

VALUES_MAX = 100_000
"""A text that may have more is read in Python: at a list, a text or a word the other parser calls nothing."""

_SPACE = re.compile(r"[ \t\n\r]*")


async def beside(size_bytes: int, work: Callable[[], T]) -> T:
    """Run `work`, which parses JSON of that size: in a thread if it is large."""
    return work() if size_bytes <= LARGE_BYTES else await asyncio.to_thread(work)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(pairs)


def _integer(text: str) -> int:
    return int(text)


def _number(text: str) -> float:
    return float(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_number)


class _Patient(json.JSONDecoder):
    """All Python, at some million values a second, while others run."""

    def __init__(self) -> None:
        super().__init__()
        self.scan_once = py_make_scanner(self)


_PATIENT = _Patient()


class Document:
    """The JSON in `raw`: its `value`, as `json.loads` has it. Raises `ValueError` and `RecursionError`."""

    def __init__(self, raw: bytes) -> None:
        self._text = raw.decode(json.detect_encoding(raw), "surrogatepass")
        values = self._text.count(",") + self._text.count("[")
        self._decoder = _DECODER if values <= VALUES_MAX else _PATIENT
        self._read_from: dict[int, tuple[object, int, int]] = {}
        """By the identity of a value, which is held so that it has that alone, where its text is."""
        self.value, end = self._value(self._skip(0), DEPTH)
        if self._skip(end) != len(self._text):
            raise json.JSONDecodeError("Extra data", self._text, end)

    def dump(self, value: object) -> bytes:
        """JSON of `value`, which was read here or is made of what was."""
        if found := self._read_from.get(id(value)):
            _, at, end = found
            return self._text[at:end].encode(errors="backslashreplace")
        if isinstance(value, dict):
            members = (as_json(name) + b":" + self.dump(one) for name, one in value.items())
            return b"{" + b",".join(members) + b"}"
        return as_json(value)

    def _value(self, at: int, depth: int) -> tuple[Any, int]:
        if depth and self._text.startswith("{", at):
            value, end = self._members(at + 1, depth - 1)
        else:
            value, end = self._decoder.raw_decode(self._text, at)
        if isinstance(value, dict | list | str):
            self._read_from[id(value)] = (value, at, end)
        return value, end

    def _members(self, at: int, depth: int) -> tuple[dict[str, Any], int]:
        members: dict[str, Any] = {}
        at = self._skip(at)
        if self._text.startswith("}", at):
            return members, at + 1
        while True:
            self._behind('"', at)
            name, at = self._decoder.raw_decode(self._text, at)
            at = self._skip(self._behind(":", self._skip(at)))
            members[name], at = self._value(at, depth)
            at = self._skip(at)
            if self._text.startswith("}", at):
                return members, at + 1
            at = self._skip(self._behind(",", at))

    def _behind(self, sign: str, at: int) -> int:
        if not self._text.startswith(sign, at):
            raise json.JSONDecodeError(f"Expecting {sign!r}", self._text, at)
        return at + 1

    def _skip(self, at: int) -> int:
        found = _SPACE.match(self._text, at)
        assert found is not None, "no space is one too"
        return found.end()
