"""What was baked: the manifest of a folder, and whether what is there is what was baked.

    DIR/manifest.json    this file: made by `python -m builder seal`
    DIR/model/           the model, as vLLM reads it
    DIR/cache/           what a start leaves for the next: of vLLM, of torch, of ours
    DIR/cache/start.json what the start was made with and how long it took

Nothing in a manifest depends on a clock or on where it was made: the same files give the same bytes.
docs/decisions/0008-bake-format.md says why it is built so.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

from handler.errors import ManifestMismatch

FORMAT = 1
NAME = "manifest.json"
MODEL = "model"
CACHE = "cache"
START = f"{CACHE}/start.json"
STATE = ".bake.json"
"""What the builder remembers; it is beside what was baked and not a part of it."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
"""Files that take seconds to read as a whole; the quick check compares their sizes."""
PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class File:
    """One file that was baked."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Difference:
    """A file that is not what was baked: its path in the folder, and what is wrong with it."""

    path: str
    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is in a folder that was baked.

    `model` has `name`, `source` and, of a repository, `commit`. `made_with` are versions and the
    machine that the caches are for, `settings` those that shaped them, `start` what a start needs
    and took; all three are empty where no cache was made.
    """

    model: Mapping[str, str]
    files: Mapping[str, File]
    made_with: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    start: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The manifest of `folder`. Raises `ManifestMismatch` if it is none that this version reads."""
        file = folder / NAME
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise ManifestMismatch(f"{file} can't be read: {error.strerror}") from error
        return cls.parse(raw, str(file))

    @classmethod
    def parse(cls, raw: bytes, where: str) -> Self:
        """The manifest that is at `where`, as bytes. Raises as `load`."""
        try:
            found = json.loads(raw)
            if found["format"] != FORMAT:
                raise ManifestMismatch(f"{where}: format {found['format']} is not known, {FORMAT} is")
            files = {name: File(entry["size"], entry["sha256"]) for name, entry in found["files"].items()}
            if not all(map(_inside, files)):
                raise ManifestMismatch(f"{where}: it names a file outside of its folder")
            return cls(
                model=dict(found["model"]),
                files=files,
                made_with=dict(found["made_with"]),
                settings=dict(found["settings"]),
                start=dict(found["start"]),
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ManifestMismatch(f"{where} is no manifest: {error!r}") from error

    def dump(self) -> bytes:
        """The bytes of the file: sorted, a line for each value."""
        files = {name: {"sha256": file.sha256, "size": file.size_bytes} for name, file in self.files.items()}
        found = {
            "format": FORMAT,
            "model": self.model,
            "made_with": self.made_with,
            "settings": self.settings,
            "start": self.start,
            "files": files,
        }
        return (json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    def digest(self) -> str:
        """What names this manifest, in hexadecimal: another one if a byte of it is another."""
        return hashlib.sha256(self.dump()).hexdigest()


def is_bake(folder: Path) -> bool:
    """Whether `folder` was baked, as far as its manifest says."""
    return (folder / NAME).is_file()


def is_of_bake(model: Path) -> bool:
    """Whether the folder `model` is the model of a bake, sealed or in the making."""
    return model.name == MODEL and any((model.parent / name).is_file() for name in (NAME, STATE))


def contents(folder: Path) -> list[str]:
    """The files that a manifest of `folder` names, sorted: paths with `/`. Links are none."""
    found = []
    for top in (MODEL, CACHE):
        for parent, _, names in os.walk(folder / top):
            found += [Path(parent, name) for name in names]
    return sorted(file.relative_to(folder).as_posix() for file in found if not file.is_symlink())


def differences(
    folder: Path, manifest: Manifest, *, full: bool, told: Callable[[int], object] = lambda _: None
) -> Iterator[Difference]:
    """The files of `folder` that are not as in `manifest`, sorted by path.

    Sizes are compared of all; bytes of what is read quickly, the model's files but its weights, and
    with `full` of everything, and a file too many is a difference as well. `told` hears how many bytes
    were read.
    """
    listed = dict(manifest.files)
    extra = sorted(set(contents(folder)) - listed.keys()) if full else []
    for path in sorted({*listed, *extra}):
        if (expected := listed.get(path)) is None:
            yield Difference(path, "not in the manifest", "no such file", "one")
            continue
        file = folder / path
        try:
            size_bytes = file.stat().st_size if file.is_file() else None
        except OSError:
            size_bytes = None
        if size_bytes is None:
            yield Difference(path, "missing", f"{expected.size_bytes} bytes", "no such file")
        elif size_bytes != expected.size_bytes:
            yield Difference(path, "size", f"{expected.size_bytes} bytes", f"{size_bytes} bytes")
        elif (full or _quick(path)) and (found := sha256(file, told)) != expected.sha256:
            yield Difference(path, "sha256", expected.sha256, found)


def sha256(file: Path, told: Callable[[int], object] = lambda _: None) -> str:
    """The digest of `file`, in hexadecimal; `told` hears of each piece how many bytes it was."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as reader:
        while piece := reader.read(PIECE_BYTES):
            digest.update(piece)
            told(len(piece))
    return digest.hexdigest()


def _quick(path: str) -> bool:
    return path.startswith(f"{MODEL}/") and not path.endswith(WEIGHTS)


def _inside(path: str) -> bool:
    pure = PurePosixPath(path)
    return not pure.is_absolute() and ".." not in pure.parts and pure.parts[:1] in {(MODEL,), (CACHE,)}
