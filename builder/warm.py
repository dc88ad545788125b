"""A bake's caches: made by starts as a worker makes them, then kept beside the model.

Two starts, each in a process of its own with an empty folder for caches, because what the first
one writes a second one may add to: the first fills the caches, the second uses them, and its phases
are what a start from this bake takes. Neither is told a secret.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from builder import disk, store
from builder.console import Console
from builder.credentials import without_secrets
from builder.state import State
from handler import baked, manifest, readahead
from handler.errors import (
    BadSettings,
    EngineFailed,
    ManifestMismatch,
    ModelNotFound,
    NoResources,
    UsageError,
)
from handler.manifest import CACHE, MODEL, NAME, START
from handler.settings import ENGINE_FIELDS, TABLE, public_name

START_COMMAND = (sys.executable, "-m", "builder.start")

KEPT = ("cuda", "firsttoken", "flashinfer", "torchinductor", "triton", "vllm")
"""The folders of a cache that are worth keeping; what else is written there is a library's own affair."""
PASSING = (".draft", ".lock", ".pid", ".tmp")
"""Files of a moment."""

WITH_PASSWORD = re.compile(r"://[^/\s]*:[^/\s]*@")
"""Values of the environment that no start from a folder needs: a proxy's address, a database's."""
SHAPING = ("CUDA_", "CXX", "FLASHINFER_", "NCCL_", "OMP_", "TORCH", "TRITON_", "VLLM_")
"""How names begin that libraries read, beside the flags of vLLM."""
NAMES = next(row.names for row in TABLE if row.field == "served_model_name")
UNSHAPING = {"MODEL_NAME", *NAMES}
"""No cache depends on where the bake is and what its model is called."""
OF_ONE_START = ("PYTHONDONTWRITEBYTECODE", "MODEL_REVISION", "REVISION", "VLLM_CACHE_ROOT", *baked.CACHES)


def warm(bake: Path, *, environ: Mapping[str, str], console: Console, again: bool = False) -> bool:
    """Make the caches of the model in `bake/model`; returns whether there was anything to do.

    `environ` has the settings that the worker will have at run time. Nothing is done if the caches
    were made for the same model, settings, versions and machine, unless `again`. Raises `StartError`
    with what kept the engine from starting.
    """
    given = start_environ(bake, environ)
    with store.alone(bake, console), disk.filled(bake / MODEL):
        return _warm(bake, given, console, again=again)


def _warm(bake: Path, given: Mapping[str, str], console: Console, *, again: bool) -> bool:
    state = State.of(bake)
    wanted = _wanted(bake, given, state.warmed.get("flags", ()))
    if not again and state.warmed.get("of") == wanted and (bake / START).is_file():
        return False
    (bake / NAME).unlink(missing_ok=True)  # from here on it is not what was sealed
    shutil.rmtree(bake / CACHE, ignore_errors=True)
    (bake / CACHE).mkdir()
    state.save()  # it is a bake in the making, which is told by this file
    _start(bake, given, "making the caches", console)
    found = _start(bake, given, "a start with them", console)
    note = {
        "made_with": {**wanted["made_with"], "gpu_architecture": found["architecture"]},
        "settings": found["settings"],
        "start": _needs(bake, found),
    }
    (bake / START).write_text(json.dumps(note, indent=1, sort_keys=True) + "\n")
    state.warmed = {"flags": found["flags"], "of": _wanted(bake, given, found["flags"])}
    state.save()
    console.say(f"{given[NAMES[0]]} makes its first token {found['report']['total_s']:.1f} s after its start")
    return True


def start_environ(bake: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the starts: the settings of `environ` for this model, and no secrets."""
    given = {
        name: value
        for name, value in without_secrets(environ).items()
        if name not in OF_ONE_START and not WITH_PASSWORD.search(value)
    }
    given["MODEL_NAME"] = str((bake / MODEL).absolute())
    given["AUTH"] = "off"  # nobody is listened to
    given.setdefault("LOG_LEVEL", "ERROR")  # that caches are missing is why this is done
    for name in NAMES[1:]:
        given.pop(name, None)
    return {**given, NAMES[0]: model_name(bake, environ)}


def model_name(bake: Path, environ: Mapping[str, str]) -> str:
    """What clients call the model that was fetched into `bake`. Raises `UsageError` if there is none."""
    try:
        fetched = str(json.loads((bake / MODEL / store.NOTE).read_bytes())["model"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(
            f"{bake} has no model: `python -m builder fetch MODEL --out {bake / MODEL}` first"
        ) from error
    given = next((environ[name] for name in NAMES if environ.get(name)), None)
    return given or public_name(fetched)


def _start(bake: Path, given: Mapping[str, str], what: str, console: Console) -> dict[str, Any]:
    """Start from the caches of `bake` and keep what is added to them; returns what the start says."""
    with TemporaryDirectory(prefix="firsttoken-warm-") as folder:
        at = Path(folder, "cache")
        environ = dict(given)
        baked.show(bake / CACHE, at, environ)
        environ["HF_HOME"] = str(Path(folder, "huggingface"))  # the user's has a token
        found = _run(environ, what, console)
        _keep(bake, at)
    return found


def _run(environ: Mapping[str, str], what: str, console: Console) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with (
        _lifeline() as end,
        subprocess.Popen(
            START_COMMAND,
            env={**environ, "LIFELINE_FD": str(end)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(end,),
        ) as process,
    ):
        assert process.stdout is not None, "a pipe"
        try:
            for line in process.stdout:
                said = _said(line)
                if "phase" in said:
                    console.step(f"{what}: {said['phase']}")
                found = said if "report" in said else found
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()  # it writes to a folder that is about to be removed
            raise
    if code or not found:
        kinds = (UsageError, ManifestMismatch, ModelNotFound, NoResources)
        failure = next((kind for kind in kinds if kind.exit_code == code), EngineFailed)
        if code == BadSettings.exit_code:
            raise BadSettings(["those above"])
        raise failure(f"the start exited with code {code}; its reason is above")
    return found


@contextmanager
def _lifeline() -> Iterator[int]:
    """The end of a pipe by which a start knows that this process is gone, however that ended."""
    theirs, ours = os.pipe()
    try:
        yield theirs
    finally:
        os.close(theirs)
        os.close(ours)


def _said(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:  # a library's own word
        return {}
    return found if isinstance(found, dict) else {}


def _keep(bake: Path, at: Path) -> None:
    """Move what was written to `at` into the cache of `bake`."""
    for top in KEPT:
        for parent, _, names in os.walk(at / top):
            for path in (Path(parent, name) for name in names if not name.endswith(PASSING)):
                if path.is_symlink():  # it was there before
                    continue
                kept = bake / CACHE / path.relative_to(at)
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.unlink(missing_ok=True)
                shutil.move(path, kept)
    _keep_list(bake, at)


def _keep_list(bake: Path, at: Path) -> None:
    """Keep the list of files to read ahead by a name that does not depend on where the model was."""
    folder = bake / CACHE / "firsttoken" / "readahead"
    own = tuple(f"{path}/" for one in (bake, at) for path in (one.absolute(), one.resolve()))
    for file in sorted(folder.glob("*.txt")):
        lines = [line for line in file.read_text().splitlines() if not line.startswith(own)]
        file.unlink()
        (folder / readahead.BAKED).write_text("\n".join(lines) + "\n")


def _needs(bake: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """What a start from these caches needs and takes; times in seconds."""
    report = found["report"]
    weights = [Path(file).name for file in readahead.weights(str(bake / MODEL))]
    return {
        "facts": report["facts"],
        "kv_cache": found["kv_cache"],
        "phases": {span["name"]: round(span["end_s"] - span["begin_s"], 3) for span in report["phases"]},
        "total_s": report["total_s"],
        "weights": weights,
    }


def _wanted(bake: Path, given: Mapping[str, str], flags: Collection[str]) -> dict[str, Any]:
    """What the caches depend on; another one means that they are made anew."""
    own = {row.name for row in TABLE if row.field in ENGINE_FIELDS} - UNSHAPING
    shaping = {
        name: value
        for name, value in given.items()
        if name in own or name.lower() in flags or name.startswith(SHAPING)
    }
    if (file := given.get("VLLM_CONFIG_FILE")) and Path(file).is_file():
        shaping["VLLM_CONFIG_FILE"] = Path(file).read_text()
    model = json.loads((bake / MODEL / store.NOTE).read_bytes())
    return {
        "made_with": baked.made_with(),
        "model": hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest(),
        "settings": hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest(),
        "format": manifest.FORMAT,
    }
