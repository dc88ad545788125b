"""Wherever the engine core runs, it says the same: `ENGINE_MODE` changes speed and nothing else.

The engine that all tests share is the thread. `spawn` is vLLM's own default and imports it in
each process once more: its start takes longer than all the others together.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import openai
import pytest

from handler.explain import find
from tests.servers import MODEL, STOP_TIMEOUT_S, Stack, engine_environ, worker
from tests.until import until

PROMPTS = ("Hi", "What is the capital of France?", "Say something about the sea.")


def alive(group: int) -> list[str]:
    """The processes of a group that run; one that has ended and was not yet reaped does not count."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended while we looked
            name, _, fields = stat.read_text().rpartition(")")
            state, _, its_group, *_ = fields.split()
            if int(its_group) == group and state != "Z":
                found.append(name)
    return found


def said(client: openai.OpenAI) -> list[tuple[str | None, str, int]]:
    """What the model says at temperature 0: text, why it ended, how many tokens."""
    answers: list[tuple[str | None, str, int]] = []
    for prompt in PROMPTS:
        reply = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": prompt}], max_tokens=40, temperature=0
        )
        assert reply.usage is not None
        answers.append(
            (reply.choices[0].message.content, reply.choices[0].finish_reason, reply.usage.completion_tokens)
        )
    return answers


@pytest.mark.timeout(400)  # it may start two engines: the shared one, and its own
@pytest.mark.parametrize("mode", ["fork", "spawn"])
def test_a_core_elsewhere_makes_the_same_tokens(stack: Stack, tiny_model: Path, mode: str) -> None:
    """At temperature 0, and it ends with exit code 0 and leaves no process."""
    with stack.worker.sync_client() as client:
        expected = said(client)
    with worker({**engine_environ(tiny_model), "ENGINE_MODE": mode}) as running:
        log = running.errors.read_text()
        assert find(log.splitlines())["facts"]["engine_mode"] == mode
        assert ("imports vLLM once more" in log) is (mode == "spawn")
        if mode == "fork":  # it tells its steps through a pipe
            steps = {phase["name"] for phase in find(log.splitlines())["phases"]}
            assert {"weights", "kv cache"} <= steps
        with running.server.sync_client() as client:
            assert said(client) == expected
        running.process.terminate()
        assert running.process.wait(STOP_TIMEOUT_S) == 0, running.errors.read_text()[-4000:]
    until(lambda: not alive(running.process.pid))
