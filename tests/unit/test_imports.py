"""`handler.imports`: a module of others is changed as it is imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from handler import imports

NAME = "awaited_module"


@pytest.fixture
def module_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a module that was not imported yet."""
    file = tmp_path / f"{NAME}.py"
    file.write_text("order = ['body']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setitem(sys.modules, NAME, ModuleType(NAME))
    del sys.modules[NAME]
    return file


def test_a_module_is_changed_once_it_is_imported(module_file: Path) -> None:
    """Its loader is the usual one."""
    imports.after(NAME, lambda module: module.order.append("change"))
    assert NAME not in sys.modules
    module = importlib.import_module(NAME)
    assert module.order == ["body", "change"]
    assert module.__loader__ is not None
    assert module.__loader__.get_source(NAME) == module_file.read_text()  # type: ignore[attr-defined]


def test_a_module_that_is_imported_is_changed_at_once(module_file: Path) -> None:
    """And the next import changes nothing."""
    module = importlib.import_module(NAME)
    imports.after(NAME, lambda module: module.order.append("after"))
    importlib.import_module(NAME)
    assert module.order == ["body", "after"]


def test_a_body_runs_within_its_context(module_file: Path) -> None:
    """Which is left also when the body fails."""
    module_file.write_text("raise ValueError('a body')\n")
    seen: list[str] = []

    @contextmanager
    def context(module: ModuleType) -> Iterator[None]:
        seen.append(module.__name__)
        try:
            yield
        finally:
            seen.append("left")

    imports.around(NAME, context)
    with pytest.raises(ValueError, match="a body"):
        importlib.import_module(NAME)
    assert seen == [NAME, "left"]


def test_a_module_that_is_not_there_is_not_found(module_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a change of it."""
    imports.after("not_there_by_any_name", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match="not_there_by_any_name"):
        importlib.import_module("not_there_by_any_name")


def test_a_loader_of_many_modules_is_as_it_was(module_file: Path) -> None:
    """Also while the body imports others."""
    other = module_file.with_name(f"{NAME}_other.py")
    other.write_text("order = ['other']\n")
    module_file.write_text(f"import {NAME}_other as other\norder = ['body']\n")

    class ForMany:
        def create_module(self, spec: ModuleSpec) -> None: ...

        def exec_module(self, module: ModuleType) -> None:
            SourceFileLoader(module.__name__, str(module.__file__)).exec_module(module)

    many = ForMany()

    class Finder:
        def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
            spec = PathFinder.find_spec(name) if name.startswith(NAME) else None
            if spec is not None:
                spec.loader = many  # type: ignore[assignment]
            return spec

    sys.meta_path.insert(0, Finder())
    imports.after(NAME, lambda module: module.order.append("after"))
    try:
        module = importlib.import_module(NAME)
    finally:
        sys.modules.pop(other.stem, None)
    assert (module.order, module.other.order) == (["body", "after"], ["other"])
    assert vars(many) == {}
