"""Where a worker can run.

Each module has `open(settings)`, which gives its `Platform`. `ORDER` is also the order in
which `detect` looks; plain HTTP comes last and fits anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from handler.settings import LAMBDA, RUNPOD

if TYPE_CHECKING:  # a health check asks which platform this is, and waits for no import
    from handler.engine import Engine
    from handler.errors import StartError
    from handler.phases import Phases
    from handler.settings import Settings
    from handler.supervision import Notifier


class Platform(Protocol):
    """What brings requests to one worker.

    The methods are called in this order, each at most once; in place of `run` one of those after it.
    """

    def fit(self) -> None:
        """Wait for what has to be known of the machine before the engine opens a device.

        Called in the engine's thread, once vLLM is imported. Raises `Unfit`.
        """

    def prepare(self) -> None:
        """Do, beside the loading of the model, all that can be done before requests are taken."""

    def run(self, engine: Engine, phases: Phases, notifier: Notifier) -> None:
        """Serve until SIGTERM or SIGINT, then drain. Raises `EngineFailed` when the engine dies."""

    def fail(self, failure: StartError, notifier: Notifier) -> None:
        """Answer every request with `failure`, which kept the engine from starting, until SIGTERM."""

    def refuse(self, failure: StartError | None) -> None:
        """Answer what is held already: the process is about to end, without an engine.

        `failure` is why; None after a signal, in whose handler this is called then. It may have been
        called before, and `prepare` may not have been.
        """


ORDER: tuple[tuple[str, Callable[[Mapping[str, str]], bool]], ...] = (
    ("runpod", lambda environ: bool(environ.get(RUNPOD))),
    ("aws_lambda", lambda environ: bool(environ.get(LAMBDA))),
    ("sqs", lambda _: False),
    ("http", lambda _: True),
)
"""A platform's name, which is its module's, and how its environment is known; nothing tells that of `sqs`."""

LISTENING = frozenset({"http"})
"""Platforms on which a worker has an address; on the others it asks for what there is to do."""

ANSWERING = frozenset({"runpod"})
"""Platforms that start a worker again and again and bill each try: one that can't start stays there."""

TOLD = frozenset({"aws_lambda"})
"""Platforms that want to know why a worker does not start, also if its settings are wrong."""


def chosen(environ: Mapping[str, str]) -> str:
    """The platform that `PLATFORM` names, else the one whose environment this is."""
    names = [name for name, _ in ORDER]
    given = environ.get("PLATFORM", "").strip().lower()
    return given if given in names else next(name for name, fits in ORDER if fits(environ))


def listens(environ: Mapping[str, str]) -> bool:
    """Whether a worker in `environ` has an address."""
    return chosen(environ) in LISTENING


def answers_failure(name: str, environ: Mapping[str, str]) -> bool:
    """Whether a worker of the platform `name` that can't start stays and says why (`START_FAILURE`)."""
    given = environ.get("START_FAILURE", "").strip().lower()
    return given == "answer" or (given != "exit" and name in ANSWERING)


def find(name: str) -> ModuleType:
    """The module of the platform `name`; its SDK is not imported yet."""
    return import_module(f"{__name__}.{name}")


def load(name: str, settings: Settings) -> Platform:
    """The platform `name`, opened."""
    platform: Platform = find(name).open(settings)
    return platform
