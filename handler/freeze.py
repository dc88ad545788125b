"""The snapshot barrier: a warm worker that is captured once and resumed many times.

The worker loads its model, lets go of all that a snapshot can't hold and waits. Whoever captures
it (CRIU, a platform) speaks with it through one folder, whose path is the same after a restore:

    frozen.json   by the worker: capture me now. What it is, how large, and its canary's answer
    resume        by the captor, for one copy: go on. Empty, or {"environ": {"UDS": "...", ...}}
    resumed.json  by the copy: how long it took and that its canary still says the same

A copy takes `resume` away as it reads it, so of many copies exactly one follows each. Any end of
the waiting is by the wall clock: the monotonic one stands still in a snapshot or jumps with it.
No signal resumes: a captor may stop and continue a process as it likes.

The protocol is that of vLLM's own `vllm snapshot` (vllm/snapshot/server.py in 0.32), without its
server and for one process.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import random
import re
import ssl
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from handler import ties
from handler.errors import BadSettings, BarrierFailed, EngineFailed
from handler.phases import Phases
from handler.settings import Settings, rows

log = logging.getLogger(__name__)

FROZEN, RESUME, RESUMED = "frozen.json", "resume", "resumed.json"

STEP_S = 0.02
JUMP_S = 5.0
"""Two looks that are further apart were not made by one running process: it was captured between them."""
SETTLED_LOOKS = 10
"""A `resume` that is not whole JSON is taken for unfinished until it stays the same for so many looks."""

LATE = rows(
    "PLATFORM",
    "HOST",
    "PORT",
    "UDS",
    "API_KEY",
    "AUTH",
    "CORS_ORIGINS",
    "MAX_BODY_BYTES",
    "DRAIN_TIMEOUT_S",
    "LOG_LEVEL",
    "LIFELINE_FD",
    "NOTIFY_SOCKET",
)
"""Settings that a copy may be given as it resumes; every other is in the snapshot."""
LATE_PREFIXES = ("AWS_", "MODAL_", "RUNPOD_")
"""Names of platforms' own, which a captured process can't know before it runs somewhere."""
OF_THE_PARENT = ("LIFELINE_FD", "NOTIFY_SOCKET")
"""Settings that tie a worker to who started it, who need not be who resumes it."""

Oracle = dict[str, Any] | None


class Warm(Protocol):
    """What is asked of `handler.freezable.FreezableEngine`."""

    def first_token(self) -> dict[str, Any] | None:
        """The answer of vLLM's application to the canary; None where the model takes none."""

    def sleep(self) -> int | None:
        """Forget all prompts, and give the device back where that can be done; the level of sleep."""

    def wake(self) -> None:
        """Undo `sleep`: the weights are read from their files again."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """A worker at the barrier: what its canary answered, and how deep it sleeps (None: not at all)."""

    canary: Oracle
    slept: int | None
    at_s: float


def settings_to_freeze(settings: Settings, *, accelerator: bool) -> Settings:
    """`settings` for a worker that is one process and, beside an `accelerator`, can sleep.

    Raises `BadSettings` where they ask for more processes.
    """
    if settings.engine_mode not in {"auto", "thread"}:
        raise BadSettings(
            [f"ENGINE_MODE={settings.engine_mode}: a snapshot is of one process; leave it out, or thread"]
        )
    rest = dict(settings.rest)
    if accelerator:
        rest.setdefault("ENABLE_SLEEP_MODE", "true")
    # Traces are sent by a thread, which a copy would not have.
    return replace(
        settings,
        engine_mode="thread",
        rest=rest,
        otel_exporter_otlp_endpoint=None,
        otel_exporter_otlp_traces_endpoint=None,
    )


def seeded(settings: Settings) -> bool:
    """Whether the user has chosen vLLM's seed, so that every copy is to draw the same tokens."""
    words = settings.vllm_extra_args or ""
    if settings.vllm_config_file:
        with suppress(OSError):  # vLLM has read it
            words += "\n" + Path(settings.vllm_config_file).read_text()
    return "SEED" in settings.rest or re.search(r"(^|\s)(--)?seed[\s:=]", words, re.MULTILINE) is not None


def freeze(engine: Warm, environ: MutableMapping[str, str]) -> Frozen:
    """Bring `engine` to where it can be captured. Raises `BarrierFailed` if a tie is left."""
    canary = oracle(engine.first_token())
    slept = engine.sleep()
    if slept is not None:
        # Rehearsed once: a model whose weights can't be read again had better not be captured.
        engine.wake()
        same(canary, oracle(engine.first_token()))
        engine.sleep()
    if left := ties.ties(device_released=slept is not None):
        raise BarrierFailed("a snapshot can't hold this worker:\n" + "\n".join(f"  - {tie}" for tie in left))
    let_go_of_parent(environ)
    gc.collect()
    gc.freeze()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is not in the snapshot
    return Frozen(canary, slept, time.time())


def let_go_of_parent(environ: MutableMapping[str, str]) -> None:
    """Forget who started this process."""
    if number := environ.get("LIFELINE_FD", "").strip():
        with suppress(OSError):
            os.close(int(number))
    for name in OF_THE_PARENT:
        environ.pop(name, None)


def oracle(answer: dict[str, Any] | None) -> Oracle:
    """What of the canary's `answer` each copy must give again."""
    if answer is None:
        return None
    if "choices" in answer:
        (choice,) = answer["choices"]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        return {"text": text, "token_ids": choice.get("token_ids")}
    vector = answer["data"][0]["embedding"]
    return {"vector": [round(value, 3) for value in vector[:8]]}


def same(expected: Oracle, found: Oracle) -> None:
    """Raise `EngineFailed` if the canary no longer says what it said: the weights are others."""
    if found != expected:
        raise EngineFailed(f"the canary answered {expected} before and {found} now; nothing is served")


def thaw(engine: Warm, frozen: Frozen, phases: Phases, *, keep_seed: bool) -> None:
    """Make a running copy an engine of its own. Raises `EngineFailed` if it is not the one captured."""
    with phases.span("reseed"):
        reseed(keep_seed=keep_seed)
    if frozen.slept is not None:
        with phases.span("wake"):
            engine.wake()
    with phases.span("canary"):
        same(frozen.canary, oracle(engine.first_token()))
    phases.done()


def reseed(*, keep_seed: bool) -> None:
    """Give this copy random numbers of its own.

    Copies of one snapshot hold the same generators, and would draw the same ids, the same samples
    and, in OpenSSL, the same keys. `keep_seed` leaves torch's, which draws the tokens.
    """
    random.seed(os.urandom(32))
    ssl.RAND_add(os.urandom(32), 32.0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(int.from_bytes(os.urandom(4)))
    torch = sys.modules.get("torch")
    if torch is not None and not keep_seed:
        torch.manual_seed(int.from_bytes(os.urandom(8)) >> 1)  # signed; a GPU's generators too


@dataclass(slots=True)
class Barrier:
    """The folder through which a worker and its captor speak. `clock` is wall time in seconds."""

    folder: Path
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    _seen: tuple[bytes, int] = field(default=(b"", 0))

    def clear(self) -> None:
        """Make the folder, without what an earlier worker left. Raises `BarrierFailed`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (FROZEN, RESUME, RESUMED):
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise _unusable(error) from error

    def announce(self, frozen: Frozen, model: str, report: Mapping[str, Any]) -> None:
        """Write `frozen.json`; `report` is that of the cold start. Raises `BarrierFailed`."""
        vllm = sys.modules.get("vllm")
        self._write(
            FROZEN,
            {
                "pid": os.getpid(),
                "resident_bytes": resident_bytes(),
                "threads": len(list(Path("/proc/self/task").iterdir())),
                "vllm": getattr(vllm, "__version__", None),
                "python": sys.version.split()[0],
                "model": model,
                "canary": frozen.canary,
                "slept": frozen.slept,
                "frozen_at": frozen.at_s,
                **report,
            },
        )

    def wait(self, timeout_s: float | None) -> dict[str, str]:
        """Wait to be resumed; returns the settings of this copy.

        `timeout_s` counts while the process runs: a capture between two looks begins it anew.
        Raises `BarrierFailed` after it, and `BadSettings` for a `resume` that can't be read.
        """
        waited_s, last_s = 0.0, self.clock()
        while (raw := self._take()) is None:
            if timeout_s is not None and waited_s >= timeout_s:
                raise BarrierFailed(f"nobody resumed this worker within {timeout_s:g} s")
            self.sleep(STEP_S)
            now_s = self.clock()
            waited_s = waited_s + now_s - last_s if 0 <= now_s - last_s <= JUMP_S else 0.0
            last_s = now_s
        return parse_resume(raw)

    def tell(self, frozen: Frozen, report: Mapping[str, Any]) -> None:
        """Write `resumed.json`; `report` is that of the resume. Raises `BarrierFailed`."""
        took = {"resumed_at": self.clock(), "took_s": report["total_s"]}
        self._write(RESUMED, {**took, "canary": frozen.canary, **report})

    def _take(self) -> bytes | None:
        """What `resume` says, if it is there, whole and no other copy has taken it."""
        path = self.folder / RESUME
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(error) from error
        before, looks = self._seen
        self._seen = raw, looks + 1 if raw == before else 1
        if not _is_json(raw) and self._seen[1] < SETTLED_LOOKS:
            return None
        try:
            path.unlink()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(error) from error
        return raw

    def _write(self, name: str, what: Mapping[str, Any]) -> None:
        draft = self.folder / f".{name}.{os.getpid()}"
        try:
            draft.write_text(json.dumps(what) + "\n")  # one line, so that `explain` finds the phases
            draft.replace(self.folder / name)
        except OSError as error:
            raise _unusable(error) from error


def parse_resume(raw: bytes) -> dict[str, str]:
    """The settings in a `resume` file. Raises `BadSettings`."""
    if not raw.strip():
        return {}
    try:
        asked = json.loads(raw)
    except ValueError as error:
        raise BadSettings([f"{RESUME}: not JSON: {error}"]) from error
    environ = asked.get("environ", {}) if isinstance(asked, dict) else None
    if not isinstance(environ, dict) or not all(_fits_environ(*item) for item in environ.items()):
        raise BadSettings([f'{RESUME}: not {{"environ": {{NAME: text}}}}'])
    return environ


def _fits_environ(name: str, value: object) -> bool:
    return name.isidentifier() and isinstance(value, str) and value.isprintable()


def resumed_settings(given: Mapping[str, str], late: Mapping[str, str]) -> Settings:
    """The settings of a copy: those of the worker's environment `given`, and `late` ones over them.

    Raises `BadSettings` with every fault, among them what `late` would change of the snapshot.
    """
    allowed = {name for row in LATE for name in row.names}
    faults = [
        f"{name} is in the snapshot; a resume can't change it"
        for name, value in sorted(late.items())
        if name not in allowed and not name.startswith(LATE_PREFIXES) and given.get(name) != value
    ]
    kept = {name: value for name, value in given.items() if name not in OF_THE_PARENT}
    try:
        settings = Settings.from_environ({**kept, **late})
    except BadSettings as error:
        raise BadSettings([*faults, *error.faults]) from None
    if faults:
        raise BadSettings(faults)
    return settings


def resident_bytes() -> int:
    """How much memory this process holds, which is about the size of its snapshot."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except ValueError:
        return False
    return True


def _unusable(error: OSError) -> BarrierFailed:
    return BarrierFailed(f"the barrier's folder can't be used: {error.filename}: {error.strerror}")
