"""Hooks on the import of a module of somebody else's, without importing it now."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Around = Callable[[ModuleType], AbstractContextManager[object]]


def after(name: str, change: Callable[[ModuleType], object]) -> None:
    """Call `change` with the module `name` once it is imported: now, if it already is."""
    if (module := sys.modules.get(name)) is not None:
        change(module)
        return

    @contextmanager
    def then_changed(module: ModuleType) -> Iterator[None]:
        yield
        change(module)

    around(name, then_changed)


def around(name: str, context: Around) -> None:
    """Run the body of the module `name` within `context` when it is imported; nothing if it already is."""
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
    finder.awaited.setdefault(name, []).append(context)


class _Finder(MetaPathFinder):
    """Finds what is awaited where the others find it, once, and has its loader do more."""

    def __init__(self) -> None:
        self.awaited: dict[str, list[Around]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        contexts = self.awaited.pop(fullname, None)
        if contexts is None:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                _extend(spec, contexts)
                return spec
        return None


def _extend(spec: ModuleSpec, contexts: Sequence[Around]) -> None:
    # The loader's own attribute, not another loader: who asks it for its type or for data finds the same.
    loader: Any = spec.loader
    if loader is None or isinstance(loader, type):  # a namespace, or Python's own modules
        return
    execute, own = loader.exec_module, vars(loader).get("exec_module")

    def exec_module(module: ModuleType) -> None:
        if module.__spec__ is not spec:  # a loader may be that of many
            execute(module)
            return
        if own is None:
            del loader.exec_module
        else:
            loader.exec_module = own
        _within(contexts, module, execute)

    loader.exec_module = exec_module


def _within(contexts: Sequence[Around], module: ModuleType, execute: Callable[[ModuleType], None]) -> None:
    if not contexts:
        execute(module)
        return
    with contexts[0](module):
        _within(contexts[1:], module, execute)
