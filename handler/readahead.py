"""Files that a start is going to read, asked of the disk before it does.

A start reads thousands of files in the order in which Python imports them, one at a time, and
a cold disk idles between two of them. `begin` tells the kernel of all of them at once: the
weights, and what the last start of the same kind was seen to read (`record`).
`posix_fadvise(WILLNEED)` neither copies nor holds the interpreter; reading the files in
threads costs more than it gains. Nothing is asked for that memory holds already.

Measured on two cores with a cold page cache: 10.1 s to the first token without, 6.7 s with.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import sys
import sysconfig
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from handler import pack
from handler.levers import pulled

THREADS = 4
"""Enough to keep a queue at the disk; more of them take turns at the interpreter."""

THREAD = "read-ahead"
"""What each of them is called."""

BAKED = "baked.txt"
"""The list of a bake."""

SAMPLE = 4
RESIDENT = 0.9
"""The files count as read if this much of the `SAMPLE` largest is in the page cache."""


def begin(environ: Mapping[str, str]) -> list[threading.Thread]:
    """Ask the disk for what this start will read; returns the threads that do it.

    The model's weights, and the recorded list if there is one. Files that are gone are passed
    over. These are two levers: `weights` and `readahead` (`handler.levers`).
    """
    files = weights(environ.get("MODEL_NAME", "")) if pulled("weights", environ) else []
    if pulled("readahead", environ):
        listed = recorded(place(environ))
        if pulled("pack", environ) and (modules := pack.place(environ)).exists():
            listed = [str(modules), *(file for file in listed if not file.endswith(".pyc"))]
        files += listed
    return advise(files)


def weights(model: str) -> list[str]:
    """The weight files of the folder `model`, in the order of their names, which is load order."""
    folder = Path(model).expanduser()
    return sorted(map(str, folder.glob("*.safetensors"))) if model and folder.is_dir() else []


def place(environ: Mapping[str, str]) -> Path:
    """Where the list of files is kept: one for each model and state of the packages, in the user's cache.

    Of a bake there is one, wherever it is. Times are whole seconds here and wherever a cache depends on
    one: an image has no others.
    """
    folder = Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "firsttoken" / "readahead"
    if (baked := folder / BAKED).exists():
        return baked
    installed = int(os.stat(sysconfig.get_path("purelib")).st_mtime)  # noqa: PTH116
    kind = "\0".join([sys.prefix, sys.version, str(installed), environ.get("MODEL_NAME", "")])
    return folder / f"{hashlib.sha256(kind.encode()).hexdigest()[:16]}.txt"


def recorded(path: Path) -> list[str]:
    """The files that `record` wrote to `path`, the largest first; none if there is no such list."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def record(path: Path) -> None:
    """Write to `path`, unless it is there, which files this process has read: modules and mapped ones."""
    if path.exists():
        return
    sizes: dict[str, int] = {}
    for candidates in [*map(_forms, list(sys.modules.values())), *((file,) for file in _mapped())]:
        for file in candidates:
            try:
                sizes[file] = os.stat(file).st_size  # noqa: PTH116 - thousands of them
                break
            except OSError:
                continue
    lines = sorted(sizes, key=lambda file: (-sizes[file], file))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text("\n".join(lines) + "\n")
    draft.replace(path)


def advise(files: Sequence[str]) -> list[threading.Thread]:
    """Have `THREADS` threads ask for `files`, or none if memory holds them."""
    if not files or warm(files):
        return []
    workers = [
        threading.Thread(target=_ask, args=(files[first::THREADS],), name=THREAD, daemon=True)
        for first in range(THREADS)
    ]
    for worker in workers:
        worker.start()
    return workers


def warm(files: Sequence[str]) -> bool:
    """Whether the page cache holds the largest of `files` already; then asking would cost and not gain."""
    sizes: list[tuple[int, str]] = []
    for file in files[: 4 * SAMPLE]:
        try:
            sizes.append((os.stat(file).st_size, file))  # noqa: PTH116
        except OSError:
            continue
    largest = sorted(sizes, reverse=True)[:SAMPLE]
    return all(resident(file) >= RESIDENT for size, file in largest if size)


def resident(file: str) -> float:
    """Which share of `file` is in the page cache (mincore(2)); 1 if it can't be told."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as view:  # noqa: PTH123
            pages = -(-len(view) // mmap.PAGESIZE)
            vector = (ctypes.c_ubyte * pages)()
            start = ctypes.c_char.from_buffer(view)
            failed = libc.mincore(
                ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(view)), vector
            )
            del start  # the view can't be closed while something points into it
            return 1.0 if failed else bytes(vector).count(1) / pages
    except (OSError, ValueError):
        return 1.0


def _ask(files: Iterable[str]) -> None:
    for file in files:
        try:
            opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(opened)


def _forms(module: object) -> list[str]:
    """The files of `module`: the compiled one, which is what is read, and the source if there is none."""
    # Not `getattr` for the name: a lazy module would load itself to answer.
    names = getattr(module, "__dict__", {})
    found = (names.get(attribute) for attribute in ("__cached__", "__file__"))
    return [file for file in found if isinstance(file, str)]


def _mapped() -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {
        path for line in lines if (path := line.partition("/")[1] + line.partition("/")[2]).startswith("/")
    }
