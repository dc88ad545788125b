"""The structure that transformers reads out of its model files, kept from one start to the next.

When it is imported, transformers reads the text of its 1,500 model files to learn which names they
define, once for itself and once more for its folder of models: 0.6 s of CPU, and with a cold disk a
read for each. The answer depends on its files alone. Here it is kept beside the user's other
caches, and given back as long as they are the same.
"""

from __future__ import annotations

import hashlib
import marshal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from handler import imports, kept

MODULE = "transformers.utils.import_utils"
FUNCTION = "define_import_structure"

Define = Callable[..., Any]


def keep(environ: Mapping[str, str]) -> None:
    """Have transformers take its structure from the cache when it is imported, if it is to be."""
    if MODULE not in sys.modules:
        folder = place(environ)

        def remember(module: ModuleType) -> None:
            if define := getattr(module, FUNCTION, None):
                setattr(module, FUNCTION, remembering(define, folder))

        imports.after(MODULE, remember)


def place(environ: Mapping[str, str]) -> Path:
    """The folder of the cache."""
    return kept.folder(environ, "transformers")


def remembering(define: Define, folder: Path) -> Define:
    """`define_import_structure` of transformers, with a cache in `folder` for its largest answers."""

    def remembered(module_path: str | Path, prefix: str | None = None) -> Any:
        models = _models(Path(module_path))
        if models is None:
            return define(module_path, prefix=prefix)
        file = folder / f"{_fingerprint(models, str(module_path), prefix)}.marshal"
        with suppress(EOFError, ValueError, TypeError):  # of another kind
            if (data := kept.read(file)) is not None:
                return marshal.loads(data)  # noqa: S302 - our own, as trusted as the .pyc beside it
        found = define(module_path, prefix=prefix)
        with suppress(ValueError):  # nothing that can be written down
            kept.write(file, marshal.dumps(found))
        return found

    return remembered


def _models(asked: Path) -> Path | None:
    """The folder of all models, if it is `asked` for: by its path, or by that of its `__init__.py`."""
    folder = asked.parent if asked.name == "__init__.py" else asked
    return folder if folder.name == "models" else None


def _fingerprint(models: Path, asked: str, prefix: str | None) -> str:
    """Another one when transformers, its folder of models or Python is another."""
    files = (models, models / "__init__.py", models.parent / "__init__.py")
    stats = [(str(file), int(stat.st_mtime), stat.st_size) for file in files for stat in [file.stat()]]
    return hashlib.sha256(repr((stats, asked, prefix, sys.version)).encode()).hexdigest()[:16]
