"""What a worker writes to its standard output and error: shown, kept in a file, and its end remembered."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from handler.plain import plain
from handler.settings import TABLE

log = logging.getLogger("gateway")

STDERR = 2
"""Where it is shown: standard output is the gateway's own, for its address."""
LOG_MAX_BYTES = 8 << 20
"""A file that is larger becomes `{file}.1`, in the place of the one before."""
TAIL_LINES = 20
LINE_MAX_CHARS = 400
READ_BYTES = 64 << 10

_SECRET = re.compile(r"(^|_)(API_?KEYS?|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS)(_|$)", re.IGNORECASE)
_SECRET_MIN_CHARS = 6
_HIDDEN = "[hidden]"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SECRET_ROWS = frozenset(name for row in TABLE if row.secret for name in row.names)


def secrets_of(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The values in `environ` that its names say are secret, the longest first."""
    found = {
        value.strip()
        for name, value in environ.items()
        if (_SECRET.search(name) or name in _SECRET_ROWS) and len(value.strip()) >= _SECRET_MIN_CHARS
    }
    return tuple(sorted(found, key=lambda value: (-len(value), value)))


class Output:
    """A named pipe at `pipe`, whose writer's output goes to standard error and to the file `kept`.

    By lines, as a terminal would show them in the end: what clients and models say may be in them, and no
    terminal is to obey that. `secrets` are hidden. The last of them are `tail`.
    """

    def __init__(self, pipe: Path, kept: Path, secrets: Iterable[str]) -> None:
        self.pipe = pipe
        self.kept = kept
        self._secrets = tuple(secrets)
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._begun = b""
        os.mkfifo(pipe, 0o600)
        # For writing too: the pipe has then no end, though a writer ends before another begins.
        self._fd = os.open(pipe, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._file = _held(kept)
        self._size_bytes = os.fstat(self._file).st_size
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._read)

    @property
    def tail(self) -> tuple[str, ...]:
        """The last lines, the newest last."""
        return tuple(self._tail)

    def add(self, lines: Iterable[str]) -> None:
        """`lines` that belong to it and came another way."""
        self._tail.extend(lines)

    def close(self) -> None:
        """Its writers have ended: take what they have left in the pipe, and read no more."""
        if self._fd < 0:
            return
        while self._read():
            pass
        self._keep([self._begun])
        self._loop.remove_reader(self._fd)
        for fd in (self._fd, self._file):
            os.close(fd)
        self._fd = -1
        self.pipe.unlink(missing_ok=True)

    def _read(self) -> bool:
        try:
            chunk = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return False
        *lines, self._begun = (self._begun + chunk).split(b"\n")
        if len(self._begun) > READ_BYTES:
            lines, self._begun = [*lines, self._begun], b""
        self._keep(lines)
        return True

    def _keep(self, lines: Iterable[bytes]) -> None:
        texts = [text for line in lines if (text := self._text(line))]
        if not texts:
            return
        self._tail.extend(text[:LINE_MAX_CHARS] for text in texts)
        data = ("\n".join(texts) + "\n").encode()
        with suppress(OSError):  # nobody looks
            os.write(STDERR, data)
        try:
            if self._size_bytes + len(data) > LOG_MAX_BYTES:
                self._turn_over()
            os.write(self._file, data)
            self._size_bytes += len(data)
        except OSError as error:
            log.debug("output of a worker was not kept", extra={"reason": error.strerror})

    def _text(self, line: bytes) -> str:
        """What a terminal would show of `line` in the end, and obey nothing of, without secrets."""
        text = line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")
        text = plain(_COLOUR.sub("", text)).rstrip()
        for secret in self._secrets:
            text = text.replace(secret, _HIDDEN)
        return text

    def _turn_over(self) -> None:
        with suppress(FileNotFoundError):  # it has been moved, and then there was no new one to be had
            self.kept.replace(self.kept.with_name(f"{self.kept.name}.1"))
        file = _held(self.kept)
        os.close(self._file)  # not before: the number of a closed one is soon another file's
        self._file, self._size_bytes = file, 0


def _held(kept: Path) -> int:
    """`kept`, to be appended to, in such a way that `is_held` sees it."""
    file = os.open(kept, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with suppress(OSError):  # a network disk without locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def is_held(kept: Path) -> bool:
    """Whether an `Output` of any pool still writes to the file `kept`."""
    with kept.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False
