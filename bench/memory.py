"""What a tree of processes holds in memory."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.servers import tree

SAMPLE_S = 0.25
"""How often memory is looked at: a look takes about 5 ms, and a start is seconds of growth."""


def resident_bytes(statms: Iterable[str]) -> int:
    """The memory of processes from their `/proc/PID/statm`; pages of files are counted once.

    Each counts with what is resident less what is shared, and the largest shared part is added.
    A page that a fork shares with its parent until one of them writes counts twice.
    """
    own, shared = 0, 0
    for statm in statms:
        _, resident, files, *_ = map(int, statm.split())
        own += resident - files
        shared = max(shared, files)
    return (own + shared) * mmap.PAGESIZE


def tree_bytes(pid: int) -> int:
    """The memory of `pid` and all below it, as `resident_bytes` counts it."""
    return resident_bytes(_read(pid, "statm"))


def pss_bytes(pid: int) -> int:
    """The proportional set size of `pid` and all below it: a page counts in parts for who shares it.

    0 where the kernel does not tell.
    """
    lines = (line for text in _read(pid, "smaps_rollup") for line in text.splitlines())
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) << 10


def _read(pid: int, file: str) -> Iterable[str]:
    for process in tree(pid):
        with suppress(OSError):  # it has just ended
            yield Path(f"/proc/{process}/{file}").read_text()


class Memory:
    """Watches the tree below `pid` while the block runs; `peak_bytes` is the most that was seen."""

    def __init__(self, pid: int, look: Callable[[int], int] = tree_bytes) -> None:
        self._pid = pid
        self._look = look
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self._look(self._pid))
