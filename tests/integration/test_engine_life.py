"""`handler.engine.Engine` from its start to its end, with nothing in place of the model."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest

from handler.engine import Engine
from handler.errors import EngineFailed
from handler.phases import Phases
from handler.settings import Settings

WAIT_S = 60.0


class Opening(Engine):
    """An engine whose opening takes until `go_on`, and fails with `failure` if there is one."""

    def __init__(self, failure: Exception | None = None) -> None:
        super().__init__(Settings.from_environ({}), Phases(0.0), {})
        self.opening = threading.Event()
        self.go_on = threading.Event()
        self.failure = failure
        self.shut_down: list[float] = []
        self._thread.start()
        assert self.opening.wait(WAIT_S)

    async def _open(self) -> None:
        self.opening.set()
        await asyncio.to_thread(self.go_on.wait, WAIT_S)
        if self.failure is not None:
            raise self.failure
        self._output = asyncio.create_task(asyncio.Event().wait())
        self._llm = SimpleNamespace(
            output_handler=self._output, shutdown=lambda *, timeout: self.shut_down.append(timeout)
        )

    def close_within(self, seconds: float) -> bool:
        """Whether `close` returns in time."""
        closing = threading.Thread(target=self.close, daemon=True)
        closing.start()
        closing.join(seconds)
        return not closing.is_alive()


def test_an_engine_is_opened_and_closed() -> None:
    """Closing shuts vLLM down, with the time that a drain may take, and is not taken for its death."""
    engine = Opening()
    engine.go_on.set()
    engine.wait_open()
    assert engine.close_within(WAIT_S)
    assert engine.shut_down == [30.0]
    assert not engine.is_dead


def test_a_failed_start_is_raised_and_closes() -> None:
    """With a reason that a person can read, and the cause behind it."""
    failure = RuntimeError("no kernel\nfor this machine")
    engine = Opening(failure)
    engine.go_on.set()
    with pytest.raises(EngineFailed, match="the engine failed to start: RuntimeError: no kernel") as raised:
        engine.wait_open()
    assert raised.value.__cause__ is failure
    assert engine.close_within(WAIT_S)


def test_the_end_of_the_output_task_is_the_death_of_the_engine() -> None:
    """Whoever serves hears of it."""
    engine = Opening()
    engine.go_on.set()
    engine.wait_open()
    engine.loop.call_soon_threadsafe(engine._output.cancel)
    engine.dead.result(WAIT_S)
    assert engine.is_dead
    assert engine.close_within(WAIT_S)


def test_an_engine_that_is_closed_while_it_opens_ends() -> None:
    """Ctrl-C in a cold start, or a platform that can't be loaded, must not hang."""
    engine = Opening()
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    engine.go_on.set()
    closing.join(WAIT_S)
    assert not closing.is_alive()
