"""`handler.freeze`: the barrier's protocol, with a scripted engine and a clock that is turned by hand."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from handler import freeze, ties
from handler.errors import BadSettings, BarrierFailed, EngineFailed
from handler.freeze import FROZEN, RESUME, RESUMED, STEP_S, Barrier, Frozen
from handler.phases import Phases
from handler.settings import Settings

HELLO = {"choices": [{"message": {"content": " Hi"}, "token_ids": [7]}]}
CANARY = {"text": " Hi", "token_ids": [7]}
DAY_S = 86_400.0


@dataclass
class ScriptedEngine:
    """Answers the canary with `answers` in turn, then with the last of them; sleeps at `level`."""

    level: int | None = None
    answers: list[Any] = field(default_factory=lambda: [HELLO])
    did: list[str] = field(default_factory=list)

    def first_token(self) -> dict[str, Any] | None:
        """The next answer; an engine that sleeps has none."""
        assert self.did[-1:] != ["sleep"] or self.level is None, "asked in its sleep"
        self.did.append("token")
        answer: dict[str, Any] | None = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return answer

    def sleep(self) -> int | None:
        """Note it."""
        self.did.append("sleep")
        return self.level

    def wake(self) -> None:
        """Note it."""
        self.did.append("wake")


class Captured:
    """A wall clock, which `sleep` moves and runs the next of `events` each time."""

    def __init__(self, *events: Callable[[], object]) -> None:
        self.now_s = 1_000.0
        self.slept = 0
        self._events = list(events)

    def clock(self) -> float:
        """Seconds since the epoch."""
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.slept += 1
        self.now_s += seconds
        if self._events:
            self._events.pop(0)()

    def stopped(self, seconds: float) -> Callable[[], None]:
        """An event: the process does not run for so long."""

        def stop() -> None:
            self.now_s += seconds

        return stop


@pytest.fixture
def _no_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of the tests holds what it likes."""
    monkeypatch.setattr(ties, "ties", lambda **_: [])


def report(name: str) -> dict[str, Any]:
    """A report of phases with one phase."""
    phase = {"name": name, "begin_s": 0.0, "end_s": 1.0, "cpu_s": 1.0, "major_faults": 0}
    return {"total_s": 1.0, "facts": {}, "phases": [phase]}


def nothing() -> None:
    """An event of no consequence."""


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (HELLO, CANARY),
        ({"choices": [{"text": " is", "token_ids": [3]}]}, {"text": " is", "token_ids": [3]}),
        ({"data": [{"embedding": [0.12349, 1.0] + [0.0] * 20}]}, {"vector": [0.123, 1.0] + [0.0] * 6}),
        (None, None),
    ],
    ids=["chat", "completion", "embedding", "none"],
)
def test_what_each_copy_must_answer_again(answer: dict[str, Any] | None, expected: object) -> None:
    """Text and token of a model that writes, the first numbers of a vector; not ids and times."""
    assert freeze.oracle(answer) == expected


@pytest.mark.usefixtures("_no_ties")
def test_an_engine_without_sleep_keeps_its_weights() -> None:
    """A CPU's: they are in the snapshot, and a copy asks for one token and has it."""
    engine = ScriptedEngine()
    frozen = freeze.freeze(engine, {})
    assert (frozen.canary, frozen.slept) == (CANARY, None)
    freeze.thaw(engine, frozen, phases := Phases(0.0), keep_seed=True)
    assert engine.did == ["token", "sleep", "token"]
    assert [span.name for span in phases.spans] == ["reseed", "canary"]
    assert phases.total_s is not None


@pytest.mark.usefixtures("_no_ties")
def test_an_engine_that_sleeps_is_rehearsed_and_woken() -> None:
    """What can't be woken here could not be woken in a copy either."""
    engine = ScriptedEngine(level=2)
    frozen = freeze.freeze(engine, {})
    assert engine.did == ["token", "sleep", "wake", "token", "sleep"]
    freeze.thaw(engine, frozen, phases := Phases(0.0), keep_seed=True)
    assert engine.did[5:] == ["wake", "token"]
    assert [span.name for span in phases.spans] == ["reseed", "wake", "canary"]


@pytest.mark.usefixtures("_no_ties")
def test_other_weights_are_never_captured() -> None:
    """The files may have changed since they were loaded: the rehearsal reads them again."""
    engine = ScriptedEngine(level=2, answers=[HELLO, {"choices": [{"text": "??", "token_ids": [9]}]}])
    with pytest.raises(EngineFailed, match=r"answered .*\[7\].* before and .*\[9\].* now"):
        freeze.freeze(engine, {})


@pytest.mark.usefixtures("_no_ties")
def test_other_weights_are_never_served() -> None:
    """A copy whose first token differs ends with exit code 70."""
    engine = ScriptedEngine(answers=[HELLO, {"choices": [{"message": {"content": " Hi"}, "token_ids": [9]}]}])
    frozen = freeze.freeze(engine, {})
    with pytest.raises(EngineFailed, match="nothing is served") as raised:
        freeze.thaw(engine, frozen, Phases(0.0), keep_seed=True)
    assert raised.value.exit_code == 70


def test_a_worker_with_ties_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all of them, so that they can be dealt with at once; exit code 75."""
    monkeypatch.setattr(ties, "ties", lambda **_: ["process 7 (git) is a child", "fd 9: TCP a to b"])
    with pytest.raises(BarrierFailed) as raised:
        freeze.freeze(ScriptedEngine(), {})
    assert str(raised.value).splitlines()[1:] == ["  - process 7 (git) is a child", "  - fd 9: TCP a to b"]
    assert raised.value.exit_code == 75


@pytest.mark.usefixtures("_no_ties")
def test_a_frozen_worker_has_no_parent() -> None:
    """Who started it need not be who resumes it: the lifeline is closed, the names are gone."""
    watched, held = os.pipe()
    environ = {"LIFELINE_FD": str(watched), "NOTIFY_SOCKET": "/run/notify", "PORT": "1"}
    freeze.freeze(ScriptedEngine(), environ)
    assert environ == {"PORT": "1"}
    with pytest.raises(BrokenPipeError):
        os.write(held, b"?")
    os.close(held)


def test_the_barrier_says_what_there_is_to_capture(tmp_path: Path) -> None:
    """One line, with the phases of the start, as `explain` reads it."""
    barrier = Barrier(tmp_path)
    barrier.announce(Frozen(CANARY, None, 1234.5), "tinychat", report("import vllm"))
    (line,) = (tmp_path / FROZEN).read_text().splitlines()
    said = json.loads(line)
    assert said.pop("resident_bytes") > 1 << 20
    assert said.pop("threads") >= 1
    assert said == {
        "pid": os.getpid(),
        "vllm": getattr(sys.modules.get("vllm"), "__version__", None),
        "python": ".".join(map(str, sys.version_info[:3])),
        "model": "tinychat",
        "canary": CANARY,
        "slept": None,
        "frozen_at": 1234.5,
        **report("import vllm"),
    }
    assert [path.name for path in tmp_path.iterdir()] == [FROZEN]


def test_a_resume_is_told(tmp_path: Path) -> None:
    """By the copy, when it is about to serve."""
    Barrier(tmp_path, clock=lambda: 99.0).tell(Frozen(CANARY, 2, 1.0), report("wake"))
    said = json.loads((tmp_path / RESUMED).read_text())
    assert said == {"resumed_at": 99.0, "took_s": 1.0, "canary": CANARY, **report("wake")}


def test_what_an_earlier_worker_left_is_gone(tmp_path: Path) -> None:
    """Else its `resume` would end the barrier before the capture. Files of others stay."""
    for name in (FROZEN, RESUME, RESUMED, "dump.log"):
        (tmp_path / name).write_text("{}")
    Barrier(tmp_path).clear()
    assert [path.name for path in tmp_path.iterdir()] == ["dump.log"]


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    """Before anything is loaded."""
    (tmp_path / "file").touch()
    with pytest.raises(BarrierFailed, match=r"can't be used: .*file"):
        Barrier(tmp_path / "file").clear()


def test_a_copy_takes_the_resume_away(tmp_path: Path) -> None:
    """So that of many copies one follows it, and the next waits for its own."""
    resume = tmp_path / RESUME
    time = Captured(nothing, lambda: resume.write_text('{"environ": {"UDS": "/tmp/1"}}'))
    assert Barrier(tmp_path, time.clock, time.sleep).wait(None) == {"UDS": "/tmp/1"}
    assert time.slept == 2
    assert not resume.exists()


def test_an_empty_resume_changes_nothing(tmp_path: Path) -> None:
    """`touch resume` goes on with the settings of the start."""
    time = Captured((tmp_path / RESUME).touch)
    assert Barrier(tmp_path, time.clock, time.sleep).wait(None) == {}


def test_a_resume_that_is_still_written_is_waited_for(tmp_path: Path) -> None:
    """A shell creates the file first, then writes it, in as many pieces as it likes."""
    resume = tmp_path / RESUME
    pieces = ("", '{"environ": {', '{"environ": {"PORT": "0"', '{"environ": {"PORT": "0"}}')
    time = Captured(*(lambda piece=piece: resume.write_text(piece) for piece in pieces))
    assert Barrier(tmp_path, time.clock, time.sleep).wait(None) == {"PORT": "0"}


@pytest.mark.parametrize(
    "text",
    [
        "UDS=/tmp/1",
        "[]",
        '{"environ": []}',
        '{"environ": null}',
        '{"environ": {"PORT": 1}}',
        '{"environ": {"PO=RT": "1"}}',
        '{"environ": {"API_KEY": "a\\u0000"}}',
    ],
)
def test_a_resume_that_says_nothing_known_is_refused(tmp_path: Path, text: str) -> None:
    """The copy exits with 78, and another can be resumed."""
    time = Captured()
    (tmp_path / RESUME).write_text(text)
    with pytest.raises(BadSettings, match="resume: not "):
        Barrier(tmp_path, time.clock, time.sleep).wait(None)
    assert not (tmp_path / RESUME).exists()


def test_nobody_resumes(tmp_path: Path) -> None:
    """A worker that nobody captures does not hold memory for ever, if it was told so."""
    time = Captured()
    with pytest.raises(BarrierFailed, match="within 60 s"):
        Barrier(tmp_path, time.clock, time.sleep).wait(60.0)
    assert 60 / STEP_S - 1 <= time.slept <= 60 / STEP_S + 1


@pytest.mark.parametrize("away_s", [DAY_S, -DAY_S], ids=["later", "a clock that is behind"])
def test_time_in_a_snapshot_does_not_count(tmp_path: Path, away_s: float) -> None:
    """The deadline begins anew in each copy, however long it was on a disk."""
    resume = tmp_path / RESUME
    time = Captured()
    time._events = [*[nothing] * 2500, time.stopped(away_s), *[nothing] * 2500, resume.touch]
    assert Barrier(tmp_path, time.clock, time.sleep).wait(60.0) == {}
    assert time.slept > 5000
    time = Captured()
    time._events = [time.stopped(away_s)]
    with pytest.raises(BarrierFailed):
        Barrier(tmp_path, time.clock, time.sleep).wait(60.0)
    assert time.slept > 60 / STEP_S


def test_a_copy_is_given_where_it_serves() -> None:
    """Over what the worker was started with, and without its parent."""
    given = {"MODEL_NAME": "org/model", "PORT": "1", "LIFELINE_FD": "3", "NOTIFY_SOCKET": "/run/notify"}
    late = {"UDS": "/tmp/1", "LOG_LEVEL": "debug", "API_KEY": "ft-1", "RUNPOD_POD_ID": "x"}
    settings = freeze.resumed_settings(given, late)
    assert (settings.model_name, settings.port, settings.uds) == ("org/model", 1, "/tmp/1")
    assert (settings.log_level, settings.api_key) == ("DEBUG", "ft-1")
    assert (settings.lifeline_fd, settings.notify_socket) == (None, None)


def test_a_copy_is_given_its_own_parent() -> None:
    """Whoever resumes it may hold a lifeline."""
    late = {"LIFELINE_FD": "5", "NOTIFY_SOCKET": "/run/new"}
    settings = freeze.resumed_settings({"LIFELINE_FD": "3"}, late)
    assert (settings.lifeline_fd, settings.notify_socket) == (5, "/run/new")


def test_what_is_in_the_snapshot_is_not_changed() -> None:
    """Refused by name, all at once and together with bad values; what says the same is no change."""
    given = {"MODEL_NAME": "org/model", "MAX_MODEL_LEN": "1024", "KEEP_ALIVE_S": "5"}
    late = {"MODEL_NAME": "org/other", "MAX_MODEL_LEN": "2048", "KEEP_ALIVE_S": "5", "PORT": "high"}
    with pytest.raises(BadSettings) as raised:
        freeze.resumed_settings(given, late)
    refused, *bad = raised.value.faults
    assert refused == "MAX_MODEL_LEN is in the snapshot; a resume can't change it"
    assert bad[0] == "MODEL_NAME is in the snapshot; a resume can't change it"
    assert len(bad) == 2
    assert bad[1].startswith("PORT='high' is not allowed")


def test_a_copy_beyond_this_machine_needs_a_key() -> None:
    """As a worker does that was never frozen."""
    with pytest.raises(BadSettings, match="no API_KEY"):
        freeze.resumed_settings({}, {"HOST": "0.0.0.0"})


@pytest.mark.parametrize("mode", ["fork", "spawn"])
def test_more_than_one_process_is_refused(mode: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(BadSettings, match=f"ENGINE_MODE={mode}: a snapshot is of one process"):
        freeze.settings_to_freeze(Settings.from_environ({"ENGINE_MODE": mode}), accelerator=False)


def test_beside_a_gpu_the_engine_can_sleep() -> None:
    """Its core is in a thread there too; who says ENABLE_SLEEP_MODE=false has it so."""
    plain = Settings.from_environ({})
    assert "ENABLE_SLEEP_MODE" not in freeze.settings_to_freeze(plain, accelerator=False).rest
    found = freeze.settings_to_freeze(plain, accelerator=True)
    assert (found.engine_mode, found.rest["ENABLE_SLEEP_MODE"]) == ("thread", "true")
    awake = Settings.from_environ({"ENABLE_SLEEP_MODE": "false"})
    assert freeze.settings_to_freeze(awake, accelerator=True).rest["ENABLE_SLEEP_MODE"] == "false"


def test_copies_draw_different_numbers() -> None:
    """They hold the same generators, so each puts in something of its own."""
    state = random.getstate()
    drawn = []
    for _ in range(2):
        random.setstate(state)
        freeze.reseed(keep_seed=True)
        drawn.append(random.random())
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("keep", [True, False])
def test_a_seed_of_the_users_stays(monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    """torch draws the tokens, numpy nothing that anybody counts on."""
    seeds: dict[str, int] = {}
    numpy = SimpleNamespace(random=SimpleNamespace(seed=lambda seed: seeds.update(numpy=seed)))
    torch = SimpleNamespace(manual_seed=lambda seed: seeds.update(torch=seed))
    monkeypatch.setitem(sys.modules, "numpy", numpy)
    monkeypatch.setitem(sys.modules, "torch", torch)
    freeze.reseed(keep_seed=keep)
    assert seeds.keys() == ({"numpy"} if keep else {"numpy", "torch"})
    assert 0 <= seeds["numpy"] < 2**32


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"SEED": "0"}, True),
        ({"VLLM_EXTRA_ARGS": "--seed 7"}, True),
        ({"VLLM_EXTRA_ARGS": "--dtype auto --seed=7"}, True),
        ({"VLLM_EXTRA_ARGS": "--served-model-name seedling"}, False),
        ({"VLLM_CONFIG_FILE": "dtype: auto\nseed: 7\n"}, True),
        ({"VLLM_CONFIG_FILE": "dtype: auto\n"}, False),
    ],
)
def test_a_seed_is_found_wherever_flags_are_given(
    tmp_path: Path, environ: dict[str, str], expected: bool
) -> None:
    """vLLM's own default, 0, is nobody's choice."""
    if text := environ.get("VLLM_CONFIG_FILE"):
        (tmp_path / "flags.yaml").write_text(text)
        environ = {"VLLM_CONFIG_FILE": str(tmp_path / "flags.yaml")}
    assert freeze.seeded(Settings.from_environ(environ)) is expected


def proc(folder: Path, processes: dict[int, str]) -> Path:
    """A /proc with those processes, whose text is what stat holds after the id."""
    for pid, stat in processes.items():
        (folder / str(pid)).mkdir()
        (folder / str(pid) / "stat").write_text(f"{pid} {stat}")
    return folder


def test_children_are_ties(tmp_path: Path) -> None:
    """Those that run; names may hold anything, and a dead child ties nobody."""
    stats = {10: "(a) b) S 7 1", 11: "(gone) Z 7 1", 12: "(another's) S 8 1"}
    assert list(ties.children(proc(tmp_path, stats), 7)) == ["process 10 (a) b) is a child of this one"]


def test_files_of_the_kernel_and_devices_are_ties() -> None:
    """A device that the engine has left is not."""
    files = {
        4: "anon_inode:[io_uring]",
        5: "/dev/nvidia0",
        6: "/dev/infiniband/uverbs0",
        7: "anon_inode:[eventpoll]",
        8: "/dev/shm/x",
        9: "/dev/dri/renderD128",
    }
    awake = list(ties.held_by_kernel(files, device_released=False))
    assert [line.split(":")[0] for line in awake] == ["fd 4", "fd 5", "fd 6", "fd 9"]
    assert "ENABLE_SLEEP_MODE=true" in awake[1]
    asleep = list(ties.held_by_kernel(files, device_released=True))
    assert [line.split(":")[0] for line in asleep] == ["fd 4", "fd 6"]


def test_standard_streams_are_the_captors(tmp_path: Path) -> None:
    """And copies of them, such as faulthandler's. A file that is open twice is no copy."""
    (tmp_path / "fd").mkdir()
    links = {
        0: "/dev/null",
        1: "socket:[1]",
        2: "socket:[1]",
        3: "socket:[1]",
        4: "socket:[2]",
        5: "/dev/null",
    }
    for fd, to in links.items():
        (tmp_path / "fd" / str(fd)).symlink_to(to)
    assert ties.open_files(tmp_path) == {4: "socket:[2]", 5: "/dev/null"}
