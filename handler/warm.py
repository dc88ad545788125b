"""What a warm parent has ready for the workers that it forks (`handler.zygote`)."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace

from handler import baked, machine, preparation, readahead, seam
from handler.errors import StartError
from handler.phases import Phases
from handler.preparation import Prepared
from handler.settings import Settings, rest
from handler.zygote import Asked, Tell, Zygote, threads

log = logging.getLogger(__name__)

OF_ONE_WORKER = frozenset({"runpod"})
"""Packages that read the environment as they are imported, which has the worker's own address in it."""


@dataclass(frozen=True, slots=True)
class Fork:
    """What a worker that was forked has from its parent."""

    asked: Mapping[str, str]
    phases: Phases
    prepared: Prepared | None
    known: frozenset[str]
    tell: Tell

    def prepared_for(self, settings: Settings) -> Prepared | None:
        """The parent's configuration, if it was made for the same engine."""
        if self.prepared is None:
            return None
        asked = replace(settings, rest=rest(self.asked))  # without what preparing has set
        return self.prepared if asked.same_engine(self.prepared.settings) else None

    def teach(self) -> None:
        """Tell the parent which modules were imported since the fork."""
        new = (
            name for name in sys.modules.keys() - self.known if name.partition(".")[0] not in OF_ONE_WORKER
        )
        self.tell("\n".join(sorted(new)).encode())


@dataclass(slots=True)
class Parent:
    """A process that has imported vLLM and configured it, and holds neither a model nor a thread."""

    phases: Phases
    prepared: Prepared | None = None
    known: frozenset[str] = field(default_factory=frozenset)
    added: dict[str, str] = field(default_factory=dict)
    """What preparing has put into the environment, where vLLM and torch read it also later."""

    def warm_up(self, settings: Settings, environ: MutableMapping[str, str]) -> None:
        """Import and configure. What is wrong is left to the worker to find again, and to say."""
        before = dict(environ)
        environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # else numpy brings threads, which no fork has
        try:
            preparation.check(settings, environ)
            self.prepared = preparation.prepare(settings, self.phases, environ)
        except StartError as error:
            log.info("the warm parent is not warm", extra={"reason": str(error)})
        self.added = {name: value for name, value in environ.items() if before.get(name) != value}
        for thread in threading.enumerate():
            if thread.name == readahead.THREAD:
                thread.join()  # a fork has no other thread than the one that forks; see `unsafe`
        self.known = frozenset(sys.modules)

    def unsafe(self) -> str | None:
        """Why a fork of this process would not work, or None."""
        if threading.active_count() > 1 or len(running := threads()) > 1:
            return f"there are threads beside the main one: {', '.join(running)}"
        return seam.touched_device() if "torch" in sys.modules else None

    def learn(self, told: bytes) -> None:
        """Import what a worker has imported after its fork, for the next one.

        Not on a GPU: what a worker imports after it has opened the device may open it here.
        """
        if machine.has_accelerator() or self.prepared is None:
            return
        for name in told.decode().split("\n"):
            try:
                importlib.import_module(name)
            except Exception as error:  # noqa: BLE001 - whatever a module out of its turn raises
                log.debug("not imported ahead", extra={"import": name, "reason": str(error)})
        self.prepared = preparation.settle(self.prepared)
        for memory in self.prepared.memories:
            memory.end()  # what else is imported here, a worker brings
            memory.save()
        gc.collect()
        gc.freeze()  # a fork need not walk it, and a page that nobody walks stays shared
        self.known = frozenset(sys.modules)

    def fork(self, asked: Asked, tell: Tell) -> Fork:
        """To be called in a fork: what the worker there has from its parent."""
        given = dict(asked.environ)
        baked.adopt(given)
        os.environ.clear()
        os.environ.update({**self.added, **given})
        phases = Phases(asked.at_s)
        phases.inherit(self.phases)
        phases.facts["parent"] = "warm"
        return Fork(given, phases, self.prepared, self.known, tell)

    def zygote(self, serve: Callable[[Fork], int]) -> Zygote:
        """The `Zygote` that forks this process; each worker runs `serve` and returns its exit code."""
        return Zygote(
            work=lambda asked, tell: serve(self.fork(asked, tell)),
            unsafe=self.unsafe,
            instead=instead,
            learn=self.learn,
        )


def instead(asked: Asked, lifeline: int | None) -> int:
    """Start a worker from the beginning; returns its process id."""
    if lifeline is not None:
        os.set_inheritable(lifeline, True)
    output: list[tuple[int, int, str, int, int]] = []
    if asked.output is not None:
        output = [(os.POSIX_SPAWN_OPEN, fd, asked.output, os.O_WRONLY | os.O_APPEND, 0) for fd in (1, 2)]
    command = [sys.executable, "-m", "handler"]
    try:
        return os.posix_spawn(command[0], command, asked.environ, setsid=True, file_actions=output)
    finally:
        if lifeline is not None:
            os.set_inheritable(lifeline, False)
