"""Whether a secret gets where it must not: command lines while something runs, files when it is over.

    with watching("hf_canary") as watch:
        subprocess.run(...)
    assert watch.looks > 0
    assert watch.seen == []
    assert holding(folder, "hf_canary") == []

The secret must be one that is nowhere else on the machine, because every process is looked at: one
that has left its parents would be missed otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

PROC = Path("/proc")
EVERY_S = 0.005


@dataclass
class Watch:
    """What was seen: command lines with the secret, their words joined, and how often all were looked at."""

    seen: list[str] = field(default_factory=list)
    looks: int = 0
    looked: Event = field(default_factory=Event)
    """Set after each look."""


@contextmanager
def watching(secret: str) -> Iterator[Watch]:
    """Look at the command lines of all processes again and again while the block runs."""
    watch, over = Watch(), Event()

    def look() -> None:
        while not over.wait(EVERY_S):
            watch.seen += _command_lines(secret.encode())
            watch.looks += 1
            watch.looked.set()

    thread = Thread(target=look, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def holding(folder: Path, secret: str) -> list[Path]:
    """The files below `folder` that have the secret in their bytes, their name or where they link to."""
    found = []
    for path in folder.rglob("*"):
        texts = [bytes(path.relative_to(folder))]
        if path.is_symlink():
            texts.append(bytes(path.readlink()))
        elif path.is_file():
            texts.append(path.read_bytes())
        if any(secret.encode() in text for text in texts):
            found.append(path)
    return found


def _command_lines(secret: bytes) -> list[str]:
    found = []
    for file in PROC.glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            line = file.read_bytes()
            if secret in line:
                found.append(line.replace(b"\0", b" ").decode(errors="replace"))
    return found
