"""What workers have written, out of the files in which it is kept (`gateway.upstreams.output`)."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from gateway.upstreams import WorkerView

LOOK_S = 0.25
"""How often it is looked whether there is more to follow."""


@dataclass(frozen=True, slots=True)
class Source:
    """The log of one worker."""

    endpoint: str
    worker: str
    path: Path

    def signed(self, line: str) -> str:
        """`line`, and who has written it."""
        return f"{self.endpoint} {self.worker} {line}"


def sources(workers: Iterable[tuple[str, Iterable[WorkerView]]], worker: str | None) -> list[Source]:
    """The logs of `workers`, by endpoint, in order of their starts; or that of the one called `worker`."""
    found = [
        (view.started_at, Source(endpoint_id, view.id, view.log))
        for endpoint_id, views in workers
        for view in views
        if view.log is not None and worker in {None, view.id}
    ]
    return [source for _, source in sorted(found, key=lambda pair: pair[0])]


class Reader:
    """Reads a log to its end, again and again. Raises `OSError` when it is not there any more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        self._begun = b""

    def tail(self, lines: int) -> list[str]:
        """The last `lines` of those that are there, the file before this one included."""
        last: deque[str] = deque(maxlen=lines)
        with suppress(FileNotFoundError), self._path.with_name(f"{self._path.name}.1").open("rb") as before:
            last.extend(line.decode(errors="replace").rstrip("\n") for line in before)
        last.extend(self.more())
        return list(last)

    def more(self) -> list[str]:
        """The lines that came since the last time."""
        data = self._begun + self._file.read()
        if self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino:  # a new file took its place
            data += self._file.read()
            self.close()
            self._file = self._path.open("rb")
            data += self._file.read()
        *lines, self._begun = data.split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def close(self) -> None:
        """Read no more."""
        self._file.close()


def last(of: Iterable[Source], lines: int) -> list[str]:
    """The last `lines` of each log."""
    found: list[str] = []
    for source in of:
        with suppress(FileNotFoundError), closing(Reader(source.path)) as reader:
            found += map(source.signed, reader.tail(lines))
    return found


async def follow(
    find: Callable[[], Iterable[Source]], lines: int, *, look_s: float = LOOK_S
) -> AsyncGenerator[list[str], None]:
    """The last `lines` of each log that `find` finds, then what is written, also by workers that come later.

    Nothing new is an empty list, every `look_s`.
    """
    readers: dict[Source, Reader] = {}
    try:
        newest: list[str] = []
        for source in find():
            with suppress(FileNotFoundError):
                readers[source] = reader = Reader(source.path)
                newest += map(source.signed, await asyncio.to_thread(reader.tail, lines))
        while True:
            yield newest
            await asyncio.sleep(look_s)
            newest = []
            there = list(find())
            for gone in readers.keys() - set(there):
                readers.pop(gone).close()
            for source in there:
                with suppress(FileNotFoundError):  # it has ended for so long that its file is gone
                    if source not in readers:
                        readers[source] = Reader(source.path)
                    newest += map(source.signed, await asyncio.to_thread(readers[source].more))
    finally:
        for reader in readers.values():
            reader.close()
