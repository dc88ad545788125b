"""A route that is known answers some methods, and says which to all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from handler.errors import MethodNotAllowed
from handler.messages import Request

T = TypeVar("T")


def by_method(request: Request, answers: Mapping[str, T]) -> T:
    """The one of `answers` for the method of `request`. Raises `MethodNotAllowed`."""
    if request.method not in answers:
        raise MethodNotAllowed(request.method, request.path, answers)
    return answers[request.method]


def read_only(answer: T) -> Mapping[str, T]:
    """`answer` to whoever reads, be it the headers alone."""
    return {"GET": answer, "HEAD": answer}
