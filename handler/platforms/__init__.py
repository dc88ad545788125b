"""Where a worker can run.

Each module has `prepare(settings)`, called before the model is loaded, and
`run(settings, engine, phases, notifier)`, called when it is.

`ORDER` is also the order in which `detect` looks; plain HTTP comes last and fits anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType

ORDER: tuple[tuple[str, Callable[[Mapping[str, str]], bool]], ...] = (("http", lambda _: True),)
"""A platform's name, which is its module's, and how its environment is known."""


def detect(environ: Mapping[str, str]) -> str:
    """The platform whose environment this is."""
    return next(name for name, fits in ORDER if fits(environ))


def load(name: str) -> ModuleType:
    """The platform's module; its SDK is imported only now."""
    return import_module(f"{__name__}.{name}")
