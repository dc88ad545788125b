"""`handler.generated`: what Python itself writes for a class is compiled once."""

from __future__ import annotations

import collections
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from handler import generated, kept


@pytest.fixture
def environ(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment whose cache is empty; what was given to Python's modules is taken back."""
    yield {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    for module, name in ((dataclasses, "exec"), (collections, "eval")):
        vars(module).pop(name, None)


MANY = generated.WORTH_TEXTS
"""Classes whose texts are worth a file: Python 3.13 writes one text for each, an older one several."""


def classes(count: int) -> list[Any]:
    """As many dataclasses, and a named tuple; each has other fields."""
    return [
        *(
            dataclasses.make_dataclass(f"C{i}", [(f"a{i}", int), ("b", int, 3)], order=True)
            for i in range(count)
        ),
        collections.namedtuple("Point", ["x", "y"], defaults=[7]),  # noqa: PYI024 - it writes a text
    ]


def test_the_second_start_compiles_nothing(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And its classes do the same."""
    first = generated.keep(environ)
    classes(MANY)
    first.end()
    first.save()
    second = generated.keep(environ)
    monkeypatch.setattr(generated, "compile", None, raising=False)
    made = classes(MANY)
    point, last = made[-1], made[-2]
    assert point(1) == (1, 7)
    assert repr(last(2)) == f"C{MANY - 1}(a{MANY - 1}=2, b=3)"
    assert last(2) < last(3)
    assert last(2) == last(2)
    second.end()
    second.save()


def test_a_class_is_as_python_makes_it(environ: dict[str, str]) -> None:
    """Its functions have the globals, the file and the signature that they have without."""
    plain = dataclasses.make_dataclass("Plain", [("a", int)])
    for _ in range(2):
        texts = generated.keep(environ)
        made = dataclasses.make_dataclass("Plain", [("a", int)])
        other = dataclasses.make_dataclass("Other", [("a", int)])
        assert inspect.signature(made) == inspect.signature(plain)
        for name in ("__init__", "__eq__"):
            function, by_python = vars(made)[name], vars(plain)[name]
            assert function.__globals__ is by_python.__globals__
            assert function.__code__ == by_python.__code__
            assert function.__code__ is not vars(other)[name].__code__
        texts.end()
        texts.save()


def test_few_new_texts_are_not_written(environ: dict[str, str]) -> None:
    """A start with another model makes a few classes more, and no file."""
    texts = generated.keep(environ)
    classes(1)
    texts.end()
    texts.save()
    assert not generated.place(environ).exists()


def test_nothing_is_remembered_after_the_start(environ: dict[str, str]) -> None:
    """A process that makes classes for years holds no more for it."""
    texts = generated.keep(environ)
    texts.end()
    classes(MANY)
    texts.save()
    assert not generated.place(environ).exists()


def test_a_file_of_something_else_is_not_used(environ: dict[str, str]) -> None:
    """What it lacks is compiled, and the file written again."""
    kept.write(generated.place(environ), b"no marshal")
    texts = generated.keep(environ)
    assert classes(MANY)[-1](1) == (1, 7)
    texts.end()
    texts.save()
    assert kept.read(generated.place(environ)) != b"no marshal"


def test_code_without_a_namespace_runs_where_it_is_called(environ: dict[str, str]) -> None:
    """As the built-in does."""
    texts = generated.keep(environ)
    run: Any = vars(dataclasses)["exec"]
    seen: list[str] = []
    run("seen.append(__name__)")
    run("seen.append(__name__)", {"seen": seen, "__name__": "given"})
    assert seen == [__name__, "given"]
    texts.end()
    texts.save()
