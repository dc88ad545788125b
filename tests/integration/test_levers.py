"""What one start keeps for the next changes how long that takes, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.servers import ROOT, engine_environ

KEPT = ("pack", "generated", "structure", "distributions")
OFF = (*KEPT, "inductor", "sources")
START = """
import json, os, sys

from handler.__main__ import remember_start
from handler.start import begin, read_settings
from handler.engine import Engine
from handler.messages import Request, read

async def ask(call, prompt):
    body = {"model": "tinychat", "messages": [{"role": "user", "content": prompt}], "max_tokens": 24,
            "temperature": 0, "logprobs": True, "return_token_ids": True}
    request = Request("POST", "/v1/chat/completions", (("content-type", "application/json"),),
                      json.dumps(body).encode())
    async with call(request) as reply:
        choice = json.loads(await read(reply))["choices"][0]
    return [choice["token_ids"], choice["message"]["content"]]

phases = begin(os.environ)
engine = Engine.start(read_settings(os.environ), phases, os.environ)
engine.wait_open()
memories = {type(memory).__name__: vars(memory) for memory in engine._memories}
found = {
    "taken": len(memories["Pack"]["_taken"]) if "Pack" in memories else None,
    "compiled": memories["Texts"]["_new"] if "Texts" in memories else None,
    "compiler": "torch._inductor.lowering" in sys.modules,
    "levers_off": phases.facts.get("levers_off"),
    "answers": [engine.submit(ask(engine.call, prompt)).result() for prompt in sys.argv[1:]],
}
remember_start(engine.save, os.environ)
engine.close()
print(json.dumps(found), flush=True)
os._exit(0)
"""
PROMPTS = ("Hi", "What is the capital of France?")


@dataclass(frozen=True, slots=True)
class Machine:
    """Where starts are made one after the other."""

    model: Path
    cache: Path

    def start(self, **settings: str) -> dict[str, Any]:
        """Start once, and what is known of it: what it took, and what the model said."""
        environ = {
            **engine_environ(self.model),
            "XDG_CACHE_HOME": str(self.cache),
            "VLLM_CACHE_ROOT": str(self.cache / "vllm"),
            **settings,
        }
        done = subprocess.run(
            [sys.executable, "-c", START, *PROMPTS],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def files(self) -> dict[Path, tuple[int, int]]:
        """The files that starts keep: when each was written, and its mode."""
        kept = {"modules", "generated", "transformers", "distributions"}
        return {
            file: (file.stat().st_mtime_ns, file.stat().st_mode & 0o777)
            for file in sorted((self.cache / "firsttoken").rglob("*.*"))
            if file.parent.name in kept
        }


@pytest.fixture(scope="module")
def machine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine that has made one start."""
    made = Machine(tiny_model, tmp_path_factory.mktemp("cache"))
    made.start()
    return made


def test_the_second_start_takes_what_the_first_has_kept(machine: Machine) -> None:
    """Thousands of modules and texts, without the compiler, and it writes nothing."""
    before = machine.files()
    second = machine.start()
    assert second["taken"] > 3000
    assert second["compiled"] < 50
    assert second["compiler"] is False
    assert machine.files() == before
    assert {mode for _, mode in before.values()} == {0o600}
    assert len(before) == 5


def test_without_them_the_tokens_are_the_same(machine: Machine) -> None:
    """And each is off by its name."""
    without = machine.start(LEVERS_OFF=",".join(OFF))
    assert without["taken"] is None
    assert without["compiled"] is None
    assert without["compiler"] is True
    assert sorted(without["levers_off"]) == sorted(OFF)
    assert without["answers"] == machine.start()["answers"]


def test_a_cache_of_somebody_else_is_not_taken(machine: Machine) -> None:
    """One that others could have written, or that is damaged, is made again."""
    answers = machine.start()["answers"]
    for file in machine.files():
        if file.parent.name == "modules":
            file.chmod(0o666)
        else:
            file.write_bytes(os.urandom(4096))
    again = machine.start()
    assert again["taken"] == 0
    assert again["compiled"] > 1000
    assert again["answers"] == answers
    assert {mode for _, mode in machine.files().values()} == {0o600}
    assert machine.start()["taken"] > 3000
