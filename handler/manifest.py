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
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
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
CONFIGS = ("config.json", "params.json")
"""One of them is in every model's folder; the second is Mistral's own format."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


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
                raise ManifestMismatch(f"{where}: format {found['format']!r} is not known, {FORMAT} is")
            for name in found["files"]:
                if not _inside(name):
                    raise ManifestMismatch(f"{where}: {name!r} is no file in its folder")
            files = {name: _file(entry) for name, entry in found["files"].items()}
            return cls(
                model={name: _text(found["model"][name]) for name in {"name", *found["model"]}},
                files=files,
                made_with=_made_with(found["made_with"]),
                settings=dict(found["settings"]),
                start=_start(found["start"]),
            )
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
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
    """Whether `folder` was baked, as far as its manifest says; a model may have a file of that name too."""
    return (folder / NAME).is_file() and not any((folder / name).is_file() for name in CONFIGS)


def is_of_bake(model: Path) -> bool:
    """Whether the folder `model` is the model of a bake, sealed or in the making."""
    return model.name == MODEL and any((model.parent / name).is_file() for name in (NAME, STATE))


def contents(folder: Path, *tops: str) -> list[str]:
    """The paths, with `/` and sorted, of all that is in a bake `folder` but the folders themselves.

    With `tops`, of what is in these folders of it. A link is one such path, and is not followed.
    """
    found = []
    for top in tops or (MODEL, CACHE):
        for parent, folders, names in os.walk(folder / top):
            found += [Path(parent, name) for name in names]
            found += [path for path in (Path(parent, name) for name in folders) if path.is_symlink()]
    return sorted(file.relative_to(folder).as_posix() for file in found)


def is_file(path: Path) -> bool:
    """Whether `path` is a file, and no link to one: what a link leads to is not in the bake."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def differences(
    folder: Path, manifest: Manifest, *, full: bool, told: Callable[[int], object] = lambda _: None
) -> Iterator[Difference]:
    """The files of `folder` that are not as in `manifest`, sorted by path.

    Sizes are compared of all; bytes of what is read quickly, the model's files but its weights, and
    with `full` of everything. A file too many is a difference in the model, which vLLM would read, and
    with `full` anywhere. `told` hears how many bytes were read.
    """
    listed = dict(manifest.files)
    there = contents(folder, *((MODEL, CACHE) if full else (MODEL,)))
    for path in sorted({*listed, *there}):
        if (expected := listed.get(path)) is None:
            yield Difference(path, "not in the manifest", "no such file", "one")
            continue
        file = folder / path
        if not is_file(file):
            found = "a link" if file.is_symlink() else "no such file"
            yield Difference(path, "missing", f"{expected.size_bytes} bytes", found)
        elif (size_bytes := file.stat().st_size) != expected.size_bytes:
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
    """Whether `path` names a file of the model or the cache, in the one way, and may be shown to people."""
    top, *rest = path.split("/")
    return top in {MODEL, CACHE} and bool(rest) and not {"", ".", ".."} & {*rest} and path.isprintable()


def _file(entry: Mapping[str, Any]) -> File:
    size_bytes, digest = entry["size"], entry["sha256"]
    if type(size_bytes) is not int or size_bytes < 0 or not _SHA256.fullmatch(digest):
        raise ValueError(f"{entry} is no file")
    return File(size_bytes, digest)


def _made_with(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: [_kind(word, str) for word in _kind(value, list)] if name == "cpu" else value
        for name, value in found.items()
    }


def _start(found: Mapping[str, Any]) -> dict[str, Any]:
    if found:
        numbers = (found.get(name, {}).values() for name in ("phases", "kv_cache"))
        for number in chain([found["total_s"]], *numbers):
            _kind(number, (int, float))
    return dict(found)


def _text(value: Any) -> str:
    if not _kind(value, str).isprintable():
        raise ValueError(f"{value!r} can't be shown")
    return str(value)


def _kind(value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not what belongs there")
    return value
