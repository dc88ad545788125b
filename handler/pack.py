"""The compiled modules of a start, in one file for the next.

Python looks for each of 5,000 modules in its folder, compares times, opens and reads a file of its
own: 0.3 s of CPU, and with a cold disk thousands of reads. What a start has imported is written
into one file here, with the time and size of each source and the time of each folder. The next one
takes a module from there if these are the same; else, and for what is not in there, Python looks as
ever. Only modules within packages are taken, so that nothing in Python's path is passed over.
"""

from __future__ import annotations

import _imp
import hashlib
import importlib.util
import marshal
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from handler import kept

HEADER_BYTES = 16
PYC_HEADER_BYTES = 16
YOUNG_S = 2
"""A source that changed less than this before the start is left out: it may change once more in the same
second, which its time would not show.
"""
WORTH_MODULES = 200
"""The pack is written again once this many modules were missing from it."""


class Entry(NamedTuple):
    """One module of a pack: its source as it was, and where in the file its code is."""

    source: str
    compiled: str
    mtime_s: int
    size_bytes: int
    begin: int
    end: int

    @property
    def is_package(self) -> bool:
        """Whether other modules may be in it."""
        return self.source.endswith("/__init__.py")

    @property
    def folders(self) -> tuple[str, ...]:
        """Those that decide which file is the module: that of its source, of a package the one above too."""
        return (self.folder, self.folder.rpartition("/")[0]) if self.is_package else (self.folder,)

    @property
    def folder(self) -> str:
        """The folder that the source is in."""
        return self.source.rpartition("/")[0]


class Contents:
    """What is in a file: modules, and when each of their folders was written to.

    Each module is read when it is asked for. A file that is mapped would count as memory of the
    start, and could not be cut short by anybody while it is.
    """

    def __init__(
        self, entries: Mapping[str, Entry], folders: Mapping[str, int], descriptor: int | None
    ) -> None:
        self.entries = entries
        self.folders = folders
        self._descriptor = descriptor

    def code(self, entry: Entry) -> bytes:
        """The code of one of the modules. Raises `OSError`."""
        if self._descriptor is None:
            return b""
        return os.pread(self._descriptor, entry.end - entry.begin, entry.begin)

    def __del__(self) -> None:
        if self._descriptor is not None:  # not before the last thread has read what it found
            os.close(self._descriptor)


NOTHING = Contents({}, {}, None)


class Pack(MetaPathFinder):
    """Finds modules in the file, as long as it stands in Python's list of finders."""

    def __init__(self, file: Path, started_s: float) -> None:
        self._file = file
        self._started_s = started_s
        self._contents = opened(file)
        self._fresh: dict[str, bool] = {}
        self._before = frozenset(sys.modules)
        self._taken: set[str] = set()

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,  # noqa: ARG002 - a finder is asked so
    ) -> ModuleSpec | None:
        """Where the module `fullname` of the package at `path` is, or None to have others look."""
        entry = self._contents.entries.get(fullname)
        if entry is None or type(path) is not list or len(path) != 1:
            return None
        folder = entry.folder
        if path[0] != (folder.rpartition("/")[0] if entry.is_package else folder):
            return None
        if not (self._is_fresh(path[0]) and (folder == path[0] or self._is_fresh(folder))):
            return None
        if _times(entry.source) != (entry.mtime_s, entry.size_bytes):
            return None
        loader: Any = SourceFileLoader(fullname, entry.source)
        # Its own attribute, for one call: what is left is the loader that Python would have made.
        loader.get_code = partial(self._code, loader, entry)
        spec = importlib.util.spec_from_file_location(
            fullname,
            entry.source,
            loader=loader,
            submodule_search_locations=[folder] if entry.is_package else None,
        )
        if spec is not None:
            spec.cached = entry.compiled
            self._taken.add(fullname)
        return spec

    def begin(self) -> None:
        """Be asked for modules, before Python looks into its path."""
        at = next((at for at, finder in enumerate(sys.meta_path) if finder is PathFinder), None)
        if at is not None and self._contents.entries:
            sys.meta_path.insert(at, self)

    def end(self) -> None:
        """The start is over: what is imported from now on Python finds."""
        with suppress(ValueError):
            sys.meta_path.remove(self)
        self._contents = NOTHING

    def save(self) -> None:
        """Write down the modules of this start, if enough of them were not in the file."""
        others = sys.modules.keys() - self._before - self._taken
        found = {name: entry for name in others if (entry := _imported(name, self._started_s)) is not None}
        if len(found) >= WORTH_MODULES:
            with suppress(OSError):  # no place for it
                _write(self._file, found, self._started_s)
            self._taken |= found.keys()

    def _is_fresh(self, folder: str) -> bool:
        """Whether the same files are in `folder`."""
        if (fresh := self._fresh.get(folder)) is None:
            times = _times(folder)
            fresh = self._fresh[folder] = times is not None and times[0] == self._contents.folders.get(folder)
        return fresh

    def _code(self, loader: SourceFileLoader, entry: Entry, fullname: str) -> CodeType | None:
        del loader.get_code
        with suppress(OSError, EOFError, ValueError, TypeError):
            code = marshal.loads(self._contents.code(entry))  # noqa: S302 - `kept` has looked who wrote it
            if isinstance(code, CodeType):
                _imp._fix_co_filename(code, entry.source)  # type: ignore[attr-defined]  # noqa: SLF001 - as Python
                return code
        self._taken.discard(fullname)
        return loader.get_code(fullname)


def place(environ: Mapping[str, str]) -> Path:
    """The file, one for each Python and each environment of packages."""
    kind = f"{sys.prefix}\0{sys.version}\0{sys.flags.optimize}\0{sys.pycache_prefix}"
    return kept.folder(environ, "modules") / f"{hashlib.sha256(kind.encode()).hexdigest()[:16]}.pack"


def opened(file: Path) -> Contents:
    """What is in `file`; nothing if it is not there, not whole, or not to be trusted."""
    with suppress(OSError, EOFError, ValueError, TypeError, OverflowError):
        descriptor = kept.open_own(file)
        contents = Contents({}, {}, descriptor)  # which closes it
        header = os.pread(descriptor, HEADER_BYTES, 0)
        begin, total_bytes = int.from_bytes(header[:8], "little"), os.fstat(descriptor).st_size
        index = os.pread(descriptor, max(0, total_bytes - begin), begin)
        if header[8:] == _check(index):
            entries, contents.folders = marshal.loads(index)  # noqa: S302 - as above
            contents.entries = {name: Entry(*entry) for name, entry in entries.items()}
            return contents
    return NOTHING


def _write(file: Path, found: Mapping[str, Entry], started_s: float) -> None:
    """Write `found` to `file`, beside what is there and still true."""
    before = opened(file)
    entries: dict[str, tuple[object, ...]] = {}
    folders: dict[str, int] = {}

    def settled(folder: str) -> bool:
        times = (folders.get(folder, 0), 0) if folder in folders else _times(folder)
        if times is None or times[0] >= started_s - YOUNG_S:
            return False
        folders[folder] = times[0]
        return True

    with kept.draft(file) as writer:
        writer.write(bytes(HEADER_BYTES))
        at = HEADER_BYTES
        for name, entry in {**before.entries, **found}.items():
            if not all(map(settled, entry.folders)):
                continue
            code = _compiled(entry) if name in found else _code_before(entry, before)
            if code is None:
                continue
            writer.write(code)
            entries[name] = (*entry[:4], at, at + len(code))
            at += len(code)
        index = marshal.dumps((entries, folders))
        writer.write(index)
        writer.seek(0)
        writer.write(at.to_bytes(8, "little") + _check(index))


def _compiled(entry: Entry) -> bytes | None:
    """The code in the .pyc of a module, if it is that of its source."""
    try:
        data = Path(entry.compiled).read_bytes()
        flags, mtime_s, size_bytes = struct.unpack("<3I", data[4:PYC_HEADER_BYTES])
    except (OSError, struct.error):  # gone, or cut short
        return None
    right = data[:4] == importlib.util.MAGIC_NUMBER and flags == 0
    same = (mtime_s, size_bytes) == (entry.mtime_s & 0xFFFFFFFF, entry.size_bytes & 0xFFFFFFFF)
    return data[PYC_HEADER_BYTES:] if right and same else None


def _code_before(entry: Entry, before: Contents) -> bytes | None:
    same = _times(entry.source) == (entry.mtime_s, entry.size_bytes)
    return before.code(entry) if same else None


def _imported(name: str, started_s: float) -> Entry | None:
    """The module `name` of this process, if it was found in the usual way and is as it was then."""
    parent, _, tail = name.rpartition(".")
    # Not `getattr` for the names: a lazy module would load itself to answer.
    spec = getattr(sys.modules.get(name), "__dict__", {}).get("__spec__")
    path = getattr(sys.modules.get(parent), "__dict__", {}).get("__path__")
    if not isinstance(spec, ModuleSpec) or spec.name != name or type(spec.loader) is not SourceFileLoader:
        return None
    source, compiled = spec.origin, spec.cached
    if not isinstance(path, list) or len(path) != 1 or source is None or compiled is None:
        return None
    times = _times(source)
    if source not in {f"{path[0]}/{tail}.py", f"{path[0]}/{tail}/__init__.py"} or times is None:
        return None
    if times[0] >= started_s - YOUNG_S or _times(compiled) is None:
        return None
    return Entry(source, compiled, *times, 0, 0)


def _times(file: str) -> tuple[int, int] | None:
    """When `file` was written to, in whole seconds as in a .pyc, and its size in bytes."""
    try:
        found = os.stat(file)  # noqa: PTH116 - thousands of them
    except OSError:
        return None
    return int(found.st_mtime), found.st_size


def _check(index: bytes) -> bytes:
    return hashlib.blake2b(index, digest_size=8).digest()
