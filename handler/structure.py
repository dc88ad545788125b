"""What transformers holds, kept from one start to the next.

When it is imported, transformers reads the text of its 1,500 model files to learn which names they
define: 0.4 s of CPU, and with a cold disk a read for each. The answer depends on its files alone.
Here it is kept beside the user's other caches, and given back as long as they are the same.
"""

from __future__ import annotations

import hashlib
import marshal
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "transformers.utils.import_utils"
FUNCTION = "define_import_structure"

Define = Callable[..., Any]


def keep(environ: Mapping[str, str]) -> None:
    """Have transformers take its structure from the cache when it is imported, if it is to be."""
    if MODULE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(place(environ)))


def place(environ: Mapping[str, str]) -> Path:
    """The folder of the cache."""
    return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "firsttoken" / "transformers"


def remembering(define: Define, folder: Path) -> Define:
    """`define_import_structure` of transformers, with a cache in `folder` for its largest answer."""

    def remembered(module_path: str | Path, prefix: str | None = None) -> Any:
        if Path(module_path).name != "models":
            return define(module_path, prefix=prefix)
        file = folder / f"{_fingerprint(Path(module_path), prefix)}.marshal"
        with suppress(OSError, EOFError, ValueError, TypeError):  # not there, or cut short
            return marshal.loads(file.read_bytes())  # noqa: S302 - our own, as trusted as the .pyc beside it
        found = define(module_path, prefix=prefix)
        with suppress(OSError, ValueError):  # no place for it, or nothing that can be written down
            data = marshal.dumps(found)
            folder.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(f".{os.getpid()}")
            draft.write_bytes(data)
            draft.replace(file)
        return found

    return remembered


def _fingerprint(models: Path, prefix: str | None) -> str:
    """Another one when transformers, its folder of models or Python is another."""
    files = (models, models / "__init__.py", models.parent / "__init__.py")
    stats = [(str(file), stat.st_mtime_ns, stat.st_size) for file in files for stat in [file.stat()]]
    return hashlib.sha256(repr((stats, prefix, sys.version)).encode()).hexdigest()[:16]


class _Finder(MetaPathFinder):
    """Finds the one module, once, and wraps its loader."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._folder)
        return spec


class _Loader(Loader):
    """Loads as `loader` does, then has the function remember."""

    def __init__(self, loader: Loader, folder: Path) -> None:
        self._loader = loader
        self._folder = folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if define := getattr(module, FUNCTION, None):
            setattr(module, FUNCTION, remembering(define, self._folder))
