"""What the person who waits is told: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TextIO

CLEAR = "\r\x1b[K"


@dataclass(frozen=True, slots=True)
class Console:
    """Where progress goes: standard error, because a command's result goes to standard output."""

    stream: TextIO
    name: str = "fetch"
    """Of the command that speaks."""

    @property
    def terminal(self) -> bool:
        """Whether a bar that is drawn again and again can be read there."""
        return self.stream.isatty()

    def say(self, text: str) -> None:
        """Write one line, in the place of what a terminal shows now."""
        clear = CLEAR if self.terminal else ""
        print(f"{clear}{self.name}: {text}", file=self.stream, flush=True)

    def step(self, text: str) -> None:
        """Say what is being done now: on a terminal in the place of what was said so before."""
        if self.terminal:
            print(f"{CLEAR}{self.name}: {text}", end="", file=self.stream, flush=True)
        else:
            self.say(text)


def size(count_bytes: int) -> str:
    """Name a number of bytes as people do: `269 MB`."""
    amount = float(count_bytes)
    for unit in ("bytes", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"
