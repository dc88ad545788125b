"""Whether the worker of this container is well: `python -m handler.healthcheck`, for an image's HEALTHCHECK.

Exit code 0 is healthy, 1 is not, or not yet; one line says which. Docker asks again and again, each
time with a new process: nothing is imported that is slow to import. What the answers of `/ping` mean is
in `handler.platforms.door`.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from handler.platforms import listens
from handler.settings import rows

TIMEOUT_S = 3.0
"""The image's HEALTHCHECK gives up a little later."""

DEFAULTS = {row.name: row.default or "" for row in rows("HOST", "PORT")}
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what a worker is told to listen on
"""Where to reach what listens on every address."""

ENDED = "ZX"
"""The states of a process that does nothing any more, from proc(5)."""


def main() -> int:
    """Look once, say what was seen, return the exit code."""
    well, said = look(os.environ)
    print(said)  # noqa: T201 - a command prints
    return 0 if well else 1


def look(environ: Mapping[str, str], processes: Path = Path("/proc")) -> tuple[bool, str]:
    """Whether the worker is well, and why.

    It is asked for `/ping`. Where nobody can ask it, because it takes jobs or its port is any that is
    free, its process has to run.
    """
    given = {name: value.strip() for name, value in environ.items()}
    port = given.get("PORT_HEALTH") or given.get("PORT") or DEFAULTS["PORT"]
    if not listens(environ) or (port == "0" and not given.get("UDS")):
        return running(processes)
    host = given.get("HOST") or DEFAULTS["HOST"]
    try:
        return ping(given.get("UDS") or (ANY.get(host, host), int(port)))
    except (OSError, ValueError, OverflowError) as error:  # the last two of a port that is none
        return False, f"nobody answers: {error}"


def ping(address: str | tuple[str, int]) -> tuple[bool, str]:
    """What the server at `address`, a path or a host and port, answers. Raises `OSError`."""
    with connect(address) as connection:
        connection.sendall(b"GET /ping HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n")
        with connection.makefile("rb") as reader:
            status = reader.readline(64).split(b" ", 2)[1:2]
    if status == [b"200"]:
        return True, "ready"
    if status == [b"204"]:
        return False, "starting"
    return False, f"/ping is answered with {b''.join(status).decode(errors='replace') or 'nothing'}"


def connect(address: str | tuple[str, int]) -> socket.socket:
    """A connection to `address`. Raises `OSError`."""
    if isinstance(address, tuple):
        return socket.create_connection(address, TIMEOUT_S)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TIMEOUT_S)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def running(processes: Path) -> tuple[bool, str]:
    """Whether a worker is among `processes`, a folder as `/proc` is."""
    for folder in processes.glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended meanwhile
            continue
        if (b"-m", b"handler") in pairwise(words) and state not in ENDED:
            return True, f"the worker runs, process {folder.name}"
    return False, "no worker runs"


if __name__ == "__main__":
    sys.exit(main())
