"""A model that is on this machine already: a folder, or a file in GGUF."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path

from builder import disk, store
from builder.console import Console
from builder.progress import progress
from builder.selection import Choice, needed, remarks
from builder.store import Asked
from handler.errors import ModelNotFound, NoResources
from handler.manifest import PIECE_BYTES, sha256
from handler.prerequisites import installed


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that holds a model, to be copied."""

    path: Path
    choice: Choice
    console: Console

    @property
    def asked(self) -> Asked:
        """What is noted of it: its path, and what its files hold, because they may be written anew."""
        return Asked(str(self.path.absolute()), None, self.choice, self._state)

    def obtain(self, work: Path) -> dict[str, str]:
        """Copy what is needed into `work`. Raises `ModelNotFound`, `NoResources`, `UsageError`."""
        store.empty(work)
        there, names = self._files()
        for remark in remarks(there, names):
            self.console.say(remark)
        disk.need(work, self._total_bytes(names))
        digests = {}
        with progress(self.console, "copying", self._total_bytes(names)) as advance, disk.filled(work):
            for name in names:
                digest = hashlib.sha256()
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                with (self.path / name).open("rb") as reader, (work / name).open("wb") as writer:
                    while data := reader.read(PIECE_BYTES):
                        digest.update(data)
                        writer.write(data)
                        advance(len(data))
                digests[name] = digest.hexdigest()
        return {"source": "folder", "state": _state(digests)}

    def _state(self) -> str:
        _, names = self._files()
        with progress(self.console, "comparing", self._total_bytes(names)) as advance:
            return _state({name: sha256(self.path / name, advance) for name in names})

    def _files(self) -> tuple[list[str], list[str]]:
        files = (path for path in self.path.rglob("*") if path.is_file())
        there = [path.relative_to(self.path).as_posix() for path in files]
        return there, needed(there, self.choice)

    def _total_bytes(self, names: list[str]) -> int:
        return sum((self.path / name).stat().st_size for name in names)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file of the default model's family, to be converted."""

    path: Path
    console: Console

    @property
    def asked(self) -> Asked:
        """What is noted of it: its path, and the digest of what it holds."""
        return Asked(str(self.path.absolute()), state=lambda: sha256(self.path))

    def obtain(self, work: Path) -> dict[str, str]:
        """Convert it into `work`. Raises `ModelNotFound`, `NoResources`."""
        if not installed("numpy"):
            raise NoResources(f"converting {self.path} needs numpy: pip install 'firsttoken[cpu]'")
        from builder import gguf  # noqa: PLC0415 - numpy takes a while, and is not everywhere

        store.empty(work)
        self.console.say(f"converting {self.path} to safetensors")
        try:
            with self.path.open("rb") as file, disk.filled(work):
                # Not closed by hand: arrays may still point into it.
                data = mmap(file.fileno(), 0, access=ACCESS_READ)
                gguf.convert(data, work, lambda size_bytes: disk.need(work, size_bytes))
        except ValueError as error:  # BadGguf, or there is nothing to map
            raise ModelNotFound(f"{self.path} can't be converted: {error}") from error
        return {"source": "GGUF", "state": sha256(self.path)}


def _state(digests: dict[str, str]) -> str:
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
