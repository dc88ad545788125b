"""A model below a prefix of an object store: what is there, and its files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from builder import disk
from builder.console import Console, size
from builder.parallel import Stop
from builder.pieces import Wanted, download, missing_bytes
from builder.s3 import Bucket, Location, Object, told
from builder.selection import Choice, needed, remarks
from builder.store import Asked
from handler import manifest
from handler.errors import ModelNotFound, StoreFailed


class Prefix:
    """The model at `location`; the store is asked when its answer is needed, and once."""

    def __init__(self, location: Location, choice: Choice, console: Console) -> None:
        self.location = location
        self.choice = choice
        self.console = console

    @property
    def asked(self) -> Asked:
        """What is noted of it: its location, and which objects are there, because they may be replaced."""
        return Asked(str(self.location), None, self.choice, self._state)

    def obtain(self, work: Path) -> dict[str, str]:
        """Download what is needed into `work`.

        Raises `ModelNotFound`, `Damaged`, `NoResources`, and `UsageError` where `choice` names what is
        not there.
        """
        with _not_found(self.location):
            bucket, listed, names = self._found
            for remark in remarks(listed, names):
                self.console.say(remark)

            def wanted(name: str) -> Wanted:
                return bucket.wanted(name, listed[name], bucket.digest(name, listed[name]))

            files = Stop().all(wanted, names)
            disk.need(work, missing_bytes(files, work))
            total_bytes = sum(file.size_bytes for file in files)
            self.console.say(f"downloading {self.location}: {len(files)} files, {size(total_bytes)}")
            download(files, work, self.console)
        return {"source": "S3", "state": self._state()}

    def sizes(self) -> dict[str, int]:
        """The bytes of every object below the location, by its name there. Raises `ModelNotFound`."""
        with _not_found(self.location):
            _, listed, _ = self._found
        return {name: found.size_bytes for name, found in listed.items()}

    def get(self, name: str, begin: int, end: int) -> bytes:
        """The bytes of an object from `begin` to before `end`. Raises `ModelNotFound`."""
        with _not_found(self.location):
            bucket, listed, _ = self._found
            return b"".join(bucket.wanted(name, listed[name], None).read(begin, end))

    def _state(self) -> str:
        with _not_found(self.location):
            _, listed, names = self._found
        lines = "".join(f"{listed[name].etag} {listed[name].size_bytes} {name}\n" for name in names)
        return sha256(lines.encode()).hexdigest()

    @cached_property
    def _found(self) -> tuple[Bucket, dict[str, Object], list[str]]:
        """The bucket, what is below the location, and what of that is needed."""
        bucket = Bucket.open(self.location)
        listed = bucket.objects()
        if not listed:
            raise ModelNotFound("nothing is there")
        if manifest.NAME in listed and "config.json" not in listed:
            raise ModelNotFound("it is a whole bake: python -m builder pull takes it")
        return bucket, listed, needed(listed, self.choice)


@contextmanager
def _not_found(location: Location) -> Iterator[None]:
    """Say that a model can't be had, and why, whatever keeps it from us."""
    try:
        with told(location):
            yield
    except StoreFailed as failure:
        raise ModelNotFound(str(failure)) from failure
    except ModelNotFound as failure:
        raise ModelNotFound(f"{location} can't be fetched: {failure}") from failure
