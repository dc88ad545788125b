"""A bake's manifest: every file with its size and sha256, what made them, nothing of a clock.

The same files give the same bytes. Modes and times of the files are the same each time too, so that
an image that holds them has the same layer.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from builder import disk, store
from builder.console import Console, size
from builder.progress import progress
from builder.state import State
from builder.warm import model_name
from handler import kept
from handler.errors import UsageError
from handler.manifest import CACHE, MODEL, NAME, START, File, Manifest, contents, is_file, sha256

THREADS = 4
"""hashlib lets go of the interpreter, and a disk likes more than one reader."""


def seal(bake: Path, *, environ: Mapping[str, str], console: Console) -> bool:
    """Write the manifest of `bake`; returns whether it is another one than before.

    `SERVED_MODEL_NAME` in `environ` is what the model is called; else it is its repository, or its
    folder's last part. Raises `UsageError`.
    """
    name = model_name(bake, environ)
    with store.alone(bake, console), disk.filled(bake / MODEL):
        return _seal(bake, name, console)


def _seal(bake: Path, name: str, console: Console) -> bool:
    for path in (bake / name for name in contents(bake)):
        if not is_file(path):
            what = "a link; what is baked is in the folder itself" if path.is_symlink() else "no file"
            raise UsageError(f"{path} is {what}")
    for top in (MODEL, CACHE):
        store.level(bake / top)
    if (mode := stat.S_IMODE(bake.stat().st_mode)) & kept.FOREIGN:
        with suppress(OSError):  # somebody else's, and a worker says what that means
            bake.chmod(mode & ~kept.FOREIGN)
    state = State.of(bake)
    note = json.loads((bake / MODEL / store.NOTE).read_bytes())
    start = _start(bake)
    manifest = Manifest(
        model={"name": name, **{key: note[key] for key in ("commit", "source") if key in note}},
        files=_files(bake, state, console),
        made_with=start.get("made_with", {}),
        settings=start.get("settings", {}),
        start=start.get("start", {}),
    )
    data, file = manifest.dump(), bake / NAME
    if file.is_file() and file.read_bytes() == data:
        return False
    draft = bake / f".{NAME}.draft"
    draft.write_bytes(data)
    draft.chmod(store.FILE_MODE)
    draft.replace(file)
    total_bytes = sum(of.size_bytes for of in manifest.files.values())
    console.say(f"{name}: {len(manifest.files)} files, {size(total_bytes)}, sealed in {file}")
    return True


def _files(bake: Path, state: State, console: Console) -> dict[str, File]:
    """Every file, hashed unless it is the one that was hashed before."""
    now = {path: _identity(bake / path) for path in contents(bake)}
    known = {path: was for path, was in state.hashes.items() if was[:-1] == now.get(path)}
    new = [path for path in now if path not in known]
    with progress(console, "hashing", sum(now[path][0] for path in new)) as advance:
        for path, digest in zip(new, _hashed([bake / path for path in new], advance), strict=True):
            known[path] = [*now[path], digest]
    if state.hashes != known:
        state.hashes = known
        state.save()
    return {path: File(known[path][0], known[path][-1]) for path in now}


def _hashed(files: list[Path], advance: Callable[[int], object]) -> list[str]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda file: sha256(file, advance), files))


def _identity(file: Path) -> list[int]:
    """What is another when a file was written to: its time of change can't be set."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _start(bake: Path) -> Mapping[str, Any]:
    """What warming wrote down; nothing if there are no caches."""
    file = bake / START
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UsageError(f"{file} is damaged: `python -m builder warm {bake} --again` makes it") from error
    return found if isinstance(found, dict) else {}
