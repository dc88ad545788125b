"""Shortcuts past slow work that torch, vLLM and transformers do while they are imported.

Each function says what they do and what it does instead. The outcome is the same, and a version that
a shortcut does not know is left as it is.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import marshal
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from handler import imports, kept

LOWERING = "torch._inductor.lowering"
OVERRIDES = "vllm.env_override"
ALLOWING = "_patch_inductor_fallback_allow_list"
ALLOWED = "FALLBACK_ALLOW_LIST"
ALLOWS_ALL = "_VllmFallbackAllowList"
DOES_WITHOUT = "from torch._inductor import lowering as _lowering\n    except ImportError:\n        return\n"
"""How vLLM's function begins where it can do without the compiler."""


def import_inductor_later() -> None:
    """Have torch's compiler imported when something is compiled.

    As it is imported, vLLM imports the compiler to replace one list in it: 500 modules, 0.6 s, which
    an eager model never uses. Here the list is replaced when the compiler is imported.
    """
    imports.around(OVERRIDES, _without_inductor)


@contextmanager
def _without_inductor(overrides: ModuleType) -> Iterator[None]:
    text = overrides.__spec__.loader.get_source(OVERRIDES)  # type: ignore[union-attr]
    known = text is not None and all(part in text for part in (DOES_WITHOUT, ALLOWED, ALLOWS_ALL))
    if not known or LOWERING in sys.modules:
        yield
        return
    finder = _NotYet()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)

    def allow(lowering: ModuleType) -> None:
        allowed = getattr(overrides, ALLOWS_ALL)(getattr(lowering, ALLOWED))
        for module in (lowering, sys.modules.get("torch._inductor.graph")):
            if hasattr(module, ALLOWED):
                setattr(module, ALLOWED, allowed)

    if finder.refused:
        imports.after(LOWERING, allow)


class _NotYet(MetaPathFinder):
    """Does not find the compiler, for the one function of vLLM's that can do without."""

    refused = False

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - a finder is asked so
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname == LOWERING and _importing_function() == (OVERRIDES, ALLOWING):
            self.refused = True
            raise ModuleNotFoundError(f"{fullname} is imported later", name=fullname)
        return None


def _importing_function() -> tuple[str, str]:
    """Module and name of the function that imports."""
    frame = sys._getframe(2)  # noqa: SLF001 - of the one that asks for a module, below Python's own
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("importlib."):
        frame = frame.f_back
    return frame.f_globals.get("__name__", ""), frame.f_code.co_name


def name_sources_by_frame() -> None:
    """Have torch read from the stack frame where an operator was defined.

    torch has `inspect` look for the module of the frame, and for the text of its line, which it throws
    away. For that all modules are gone through each time, and links in the paths of new ones are
    resolved: 0.25 s.
    """

    def replace_source(utils: Any) -> None:
        if hasattr(utils, "get_source"):
            utils.get_source = _source

    def replace_module(library: Any) -> None:
        if hasattr(library, "inspect"):
            library.inspect = _Inspect()

    imports.after("torch._library.utils", replace_source)
    imports.after("torch.library", replace_module)


def _source(stacklevel: int) -> str:
    frame = sys._getframe(stacklevel)  # noqa: SLF001 - as torch does
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class _Inspect:
    """The module `inspect`, which looks at a frame first to tell its module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)

    def getmodule(self, asked: object, *args: Any) -> ModuleType | None:
        if isinstance(asked, FrameType):
            module = sys.modules.get(asked.f_globals.get("__name__", ""))
            if module is not None and vars(module).get("__file__") == asked.f_code.co_filename:
                return module
        return inspect.getmodule(asked, *args)


def keep_distributions(environ: Mapping[str, str]) -> None:
    """Have Python keep what it has read of the metadata of packages.

    transformers asks which distribution each package is from as it is imported, and the lists of files
    of all that is installed are read: 0.1 s. vLLM asks for entry points, several times. The answers are
    kept as long as the same folders of metadata are there.
    """
    file = kept.folder(environ, "distributions") / "packages.marshal"
    theirs, entry_points = importlib.metadata.packages_distributions, importlib.metadata.entry_points
    last: list[Any] = [None, None]

    def packages_distributions() -> Mapping[str, list[str]]:
        installed = _installed()
        with suppress(EOFError, ValueError, TypeError):  # of another kind
            if (data := kept.read(file)) is not None:
                was, found = marshal.loads(data)  # noqa: S302 - `kept` has looked who wrote it
                if was == installed:
                    return dict(found)
        found = theirs()
        kept.write(file, marshal.dumps((installed, {name: list(of) for name, of in found.items()})))
        return found

    def kept_entry_points(**asked: Any) -> Any:
        installed = _installed()
        if last[0] != installed:
            last[:] = installed, entry_points()
        return last[1].select(**asked) if asked else entry_points()

    importlib.metadata.packages_distributions = packages_distributions
    importlib.metadata.entry_points = kept_entry_points


def _installed() -> list[Any]:
    """Something else when another distribution is installed, or one of them again."""
    return [sys.version, *map(_metadata, sys.path)]


def _metadata(folder: str) -> Any:
    """The folders of metadata in one entry of Python's path, and when each was last written to."""
    try:
        with os.scandir(folder or ".") as entries:
            return folder, sorted(
                (entry.name, int(entry.stat().st_mtime))
                for entry in entries
                if entry.name.endswith((".dist-info", ".egg-info", ".egg"))
            )
    except NotADirectoryError:  # an archive
        stat = Path(folder).stat()
        return folder, int(stat.st_mtime), stat.st_size
    except OSError:
        return folder, None
