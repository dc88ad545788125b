"""The code that `dataclasses` and `namedtuple` write, kept compiled from one start to the next.

Both write the text of a function for a class and have Python compile it: 5,000 texts in the imports
of a start, 0.4 s of CPU; from Python 3.13 on one text has all functions of a dataclass, and a start 1,700.
What a text compiles to depends on the text and on Python alone, so nothing kept here can be out of date.
Each use has a code object of its own, as if it were compiled.
"""

from __future__ import annotations

import importlib.util
import marshal
import sys
from builtins import eval as evaluate
from builtins import exec as execute
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from handler import imports, kept

WRITERS = {"dataclasses": "exec", "collections": "eval"}
"""Who compiles what it has written, by the name of the built-in that it calls."""

WORTH_TEXTS = 100
"""The file is written again once this many texts were missing from it."""
MOST_TEXTS = 50_000
"""Of more texts than this, those that this start did not use are dropped."""


class Texts:
    """Texts of functions, and what they compile to; those of the last starts are in `file`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._kept = _parse(kept.read(file))
        self._used: dict[str, bytes] = {}
        self._new = 0
        self._ended = False

    def compiled(self, text: str, mode: str) -> CodeType:
        """What `text` compiles to; `mode` is that of `compile`."""
        key = f"{mode} {text}"
        data = None if self._ended else self._kept.get(key)
        if data is None:
            code: CodeType = compile(text, "<string>", mode, dont_inherit=True)
            if not self._ended:
                self._used[key] = marshal.dumps(code)
                self._new += 1
            return code
        self._used[key] = data
        loaded: CodeType = marshal.loads(data)  # noqa: S302 - `kept` has looked who wrote it
        return loaded

    def end(self) -> None:
        """The start is over: have Python compile what is written from now on."""
        self._ended = True

    def save(self) -> None:
        """Write down what was compiled since the last time, if it is worth it."""
        if self._new >= WORTH_TEXTS:
            self._new = 0
            whole = {**self._kept, **self._used}
            self._kept = whole if len(whole) <= MOST_TEXTS else dict(self._used)
            kept.write(self._file, marshal.dumps(self._kept))
        if self._ended:
            self._kept = {}
            self._used = {}


def keep(environ: Mapping[str, str]) -> Texts:
    """Have `dataclasses` and `namedtuple` take what they write compiled from the cache, from now on."""
    texts = Texts(place(environ))
    for module, name in WRITERS.items():
        imports.after(module, partial(_give, texts, name))
    return texts


def place(environ: Mapping[str, str]) -> Path:
    """The file, one for each version of Python's bytecode."""
    return kept.folder(environ, "generated") / f"{importlib.util.MAGIC_NUMBER.hex()}.marshal"


def _give(texts: Texts, name: str, writer: ModuleType) -> None:
    """Put a function called `name` into the module `writer`, over the built-in, that knows `texts`."""
    run: Callable[..., Any] = {"exec": execute, "eval": evaluate}[name]

    def compiled(source: Any, globals: Any = None, locals: Any = None, **kwargs: Any) -> Any:
        if globals is None:  # that of the caller, which is not us
            frame = sys._getframe(1)  # noqa: SLF001 - as the built-in does
            globals, locals = frame.f_globals, frame.f_locals if locals is None else locals  # noqa: A001
        return run(
            texts.compiled(source, name) if isinstance(source, str) else source, globals, locals, **kwargs
        )

    setattr(writer, name, compiled)


def _parse(data: bytes | None) -> dict[str, bytes]:
    with suppress(EOFError, ValueError, TypeError):
        if data is not None and isinstance(found := marshal.loads(data), dict):  # noqa: S302 - as above
            return found
    return {}
