"""Workers on batches, as processes: killed, stopped, dead, and with a real model."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

from tests import batch_stack, servers
from tests.aws_stack import AwsStack
from tests.batch_stack import CHAT, Resources, echoes, line
from tests.batch_worker import environ, worker
from tests.scripted_app import Script, ScriptedApp, Seen, echo
from tests.scripted_server import application
from tests.servers import MODEL, engine_environ
from tests.until import until

KILLS = 3
SEED = 20261126


@pytest.fixture
def resources(aws_stack: AwsStack) -> Resources:
    """What template.yaml makes, the test's own; its workers are under the template's policy."""
    return batch_stack.of(aws_stack)


async def test_a_batch_survives_workers_that_are_killed(resources: Resources, tmp_path: Path) -> None:
    """Three times, with SIGKILL, at random points: each good line is answered once, each bad one is told."""
    chance = random.Random(SEED)
    bad = set(chance.sample(range(1000), 50))
    kill_at = sorted(chance.sample(range(20, 940), KILLS))
    good = [f"line-{number}" for number in range(1000) if number not in bad]
    lines = [b"not json\n" if number in bad else line(f"line-{number}") for number in range(1000)]
    processes: list[subprocess.Popen[bytes]] = []
    asked: list[str] = []
    answered: set[str] = set()

    def make(seen: Seen) -> Script:
        script = echo(seen)
        asked.append(script.steps[0].data)  # type: ignore[union-attr] # it says something
        answered.add(asked[-1])
        if kill_at and len(answered) >= kill_at[0]:
            kill_at.pop(0)
            os.kill(processes[-1].pid, signal.SIGKILL)
        return script

    app = ScriptedApp({}, makes={CHAT: make}, remembers=False)
    socket = tmp_path / "engine.sock"
    given = environ(resources, ENGINE_SOCKET=str(socket), SMALL_PARTS="1")
    resources.put("a", lines)
    async with application(app, socket):
        for _ in range(KILLS):
            with worker(given, tmp_path / "worker.log") as process:
                processes.append(process)
                assert await asyncio.to_thread(process.wait, 60) == -signal.SIGKILL
        assert not resources.is_over("a")
        with worker(given, tmp_path / "worker.log") as process:
            processes.append(process)
            found = await resources.over("a")
            await resources.quiet()
    assert found.status == "completed"
    assert found.request_counts is not None
    assert found.request_counts.model_dump() == {"total": 1000, "completed": 950, "failed": 50}
    assert found.metadata is not None
    assert found.metadata["attempt"] == str(KILLS + 1)
    assert echoes(resources.lines("a", "output.jsonl")) == good
    errors = [one["error"]["line"] for one in resources.lines("a", "error.jsonl")]
    assert errors == [number + 1 for number in sorted(bad)]
    assert len(answered) == 950
    assert 950 < len(asked) < 2 * 950  # what was in parts was not asked again
    assert resources.dead() == []


def test_a_worker_that_is_stopped_hands_its_batch_on(resources: Resources, tmp_path: Path) -> None:
    """It exits with 0, and the batch is there for the next at once."""
    resources.put("a", [line(f"line-{number}") for number in range(30_000)])
    with worker(environ(resources), tmp_path / "worker.log") as process:
        until(lambda: any(name.startswith("parts/") for name in resources.names("a")))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not resources.is_over("a")
    assert resources.waiting() == (1, 0, 0)


def test_a_worker_whose_engine_dies_ends(resources: Resources, tmp_path: Path) -> None:
    """With 70, and the batch is there for the next at once."""
    resources.put("a", [line(f"line-{number}") for number in range(2000)])
    with worker(environ(resources, ENGINE_DIES_AFTER="1500"), tmp_path / "worker.log") as process:
        assert process.wait(60) == 70
    assert not resources.is_over("a")
    assert resources.waiting() == (1, 0, 0)
    with worker(environ(resources), tmp_path / "worker.log"):
        until(lambda: resources.is_over("a"))
    found = resources.record("a")
    assert found is not None
    assert found.request_counts is not None
    assert (found.request_counts.completed, found.request_counts.failed) == (2000, 0)


def test_a_worker_without_its_queue_does_not_start(resources: Resources, tmp_path: Path) -> None:
    """It exits with 75 and says what AWS says."""
    log = tmp_path / "worker.log"
    with worker(environ(resources, SQS_QUEUE_URL=resources.queue_url + "-gone"), log) as process:
        assert process.wait(60) == 75
    assert "SQS_QUEUE_URL can't be used" in log.read_text()


def test_a_batch_through_a_real_model(resources: Resources, tiny_model: Path, tmp_path: Path) -> None:
    """`PLATFORM=sqs python -m handler` with vLLM: forty lines, of which one asks for another model."""
    lines = [line(f"line-{number}", text="Hello", max_tokens=4) for number in range(39)]
    other = line("other").replace(f'"{MODEL}"'.encode(), b'"gpt-4"')
    resources.put("a", [*lines, other])
    given = {**environ(resources), **engine_environ(tiny_model), "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    with worker(given, tmp_path / "worker.log", "handler") as process:
        until(lambda: process.poll() is not None or resources.is_over("a"), timeout_s=servers.START_TIMEOUT_S)
        assert process.poll() is None, (tmp_path / "worker.log").read_text()[-4000:]
        process.terminate()
        assert process.wait(60) == 0
    found = resources.record("a")
    assert found is not None
    assert found.status == "completed"
    assert found.request_counts is not None
    assert found.request_counts.model_dump() == {"total": 40, "completed": 39, "failed": 1}
    outputs = resources.lines("a", "output.jsonl")
    assert [one["custom_id"] for one in outputs] == [f"line-{number}" for number in range(39)]
    assert all(one["response"]["body"]["choices"][0]["message"]["content"] for one in outputs)
    used = [one["response"]["body"]["usage"] for one in outputs]
    assert found.usage is not None
    assert found.usage.input_tokens == sum(one["prompt_tokens"] for one in used)
    assert found.usage.output_tokens == sum(one["completion_tokens"] for one in used)
    (error,) = resources.lines("a", "error.jsonl")
    assert (error["custom_id"], error["response"]["status_code"]) == ("other", 404)
    assert error["response"]["body"]["error"]["code"] == "model_not_found"
