"""A stand-in for S3, SQS and the rest of AWS: moto's server as a process, over HTTP.

    with serving(tmp_path) as store:
        client = store.client("s3")
        subprocess.run(..., env={**os.environ, **store.environ})

tests/conftest.py has it as a fixture, `object_store`, one for the whole run.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from tests.until import until

REGION = "us-east-1"
_LISTENS = re.compile(r"Running on (http://127\.0\.0\.1:\d+)")
_COLOR = r"(?:\x1b\[\d+m)*"
_ANSWERED = re.compile(rf'"{_COLOR}([A-Z]+ \S+) HTTP/[\d.]+{_COLOR}" (\d+)')


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """Where it is, and the file of its log."""

    url: str
    log: Path

    @property
    def environ(self) -> Mapping[str, str]:
        """What a program needs that is to use it."""
        return environ(self.url)

    def client(self, service: str = "s3") -> Any:
        """A client of boto3's for one of its services."""
        import boto3  # noqa: PLC0415 - most tests of a run need none

        return boto3.client(
            service,
            endpoint_url=self.url,
            region_name=REGION,
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Have it check who asks and what their policies allow, which it does not do otherwise.

        https://docs.getmoto.org/en/latest/docs/iam.html
        """
        address = f"{self.url}/moto-api/reset-auth"
        httpx.post(address, content="0", timeout=60).raise_for_status()
        try:
            yield
        finally:
            httpx.post(address, content="inf", timeout=60).raise_for_status()

    def answered(self) -> list[tuple[str, int]]:
        """The requests that were answered, as `PUT /bucket/key`, and their statuses."""
        return [(found[1], int(found[2])) for found in _ANSWERED.finditer(self.log.read_text())]


def environ(url: str) -> dict[str, str]:
    """What a program needs to use the store at `url`."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def serving(folder: Path, program: str = "moto.server") -> Iterator[ObjectStore]:
    """Run moto's server on a free port of loopback, its log in `folder`."""
    log = folder / "moto.log"
    with log.open("w") as writer:
        process = subprocess.Popen(
            [sys.executable, "-m", program, "--host", "127.0.0.1", "--port", "0"],
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=subprocess.STDOUT,
        )
    try:
        until(lambda: _LISTENS.search(log.read_text()) or process.poll() is not None)
        listens = _LISTENS.search(log.read_text())
        assert listens is not None, log.read_text()
        yield ObjectStore(listens[1], log)
    finally:
        process.terminate()
        process.wait()


class Relay:
    """A way to the store on which some requests go no further: those that have `stall` in them."""

    def __init__(self, store: ObjectStore, stall: bytes) -> None:
        self.stall = stall
        self.stalled: set[bytes] = set()
        """The first lines of those."""
        target = urlsplit(store.url)
        self._target = (target.hostname or "", target.port or 0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._listener]
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        with suppress(OSError):  # it was closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._open += [client, server]
                Thread(target=self._ask, args=(client, server), daemon=True).start()
                Thread(target=self._pass, args=(server, client), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                if self.stall in data:
                    self.stalled.add(data.partition(b"\r\n")[0])
                    return
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _pass(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)
