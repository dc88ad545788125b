"""A PostgreSQL server for tests, in a folder that is gone with it."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from judge.servers import free_port
from tests.until import until

USER = "gate"
PASSWORD = "not-to-be-shown"


class Missing(Exception):
    """There is no PostgreSQL on this machine, or nobody whom it would run as."""


def program(name: str) -> Path:
    """PostgreSQL's program of that name, which Debian keeps out of the path. Raises `Missing`."""
    if found := shutil.which(name):
        return Path(found).resolve()
    for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True):
        return path
    raise Missing(f"{name} is missing: apt-get install postgresql")


@dataclass
class Server:
    """The server in `folder`; `restart` and the like are for tests that have one to themselves."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    numbers: Iterator[int] = field(default_factory=count)

    def url(self, database: str) -> str:
        """What `DATABASE_URL` says of it."""
        return f"postgresql+psycopg://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def database(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{next(self.numbers)}"
        self.run(f"CREATE DATABASE {name}")
        return self.url(name)

    @contextmanager
    def schema(self) -> Iterator[str]:
        """The URL of an empty schema, to its gateways a database; made and gone sooner than one."""
        name = f"test_{next(self.numbers)}"
        self.run(f"CREATE SCHEMA {name}")
        try:
            yield f"{self.url('postgres')}?options=-csearch_path%3D{name}"
        finally:
            self.run(f"DROP SCHEMA {name} CASCADE")

    def run(self, statement: str) -> None:
        """Run a statement, as the server's owner."""
        engine = create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                connection.execute(text(statement))
        finally:
            engine.dispose()

    def start(self) -> None:
        """Start it, and return once it answers."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [program("postgres"), "-D", self.folder / "data"],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **owner(self.folder),
            )
        until(self._answers)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
        try:
            self.run("SELECT 1")
        except OperationalError:
            return False
        return True

    def stop(self, *, crash: bool = False) -> None:
        """Stop it, which ends every connection; `crash`: as if the power had failed."""
        assert self.process is not None
        self.process.send_signal(signal.SIGQUIT if crash else signal.SIGINT)
        self.process.wait()

    def pause(self) -> None:
        """Have no process of it do anything until `go_on`."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Go on after `pause`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        main = self.process.pid
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        for pid in (main, *map(int, children)):
            os.kill(pid, number)


def owner(folder: Path) -> dict[str, Any]:
    """The arguments for a process of whom `folder` belongs to: PostgreSQL does not run as root."""
    if os.geteuid():
        return {}
    found = folder.stat()
    return {"user": found.st_uid, "group": found.st_gid, "extra_groups": []}


@contextmanager
def serving() -> Iterator[Server]:
    """A server on loopback. Raises `Missing`."""
    program("postgres")
    with tempfile.TemporaryDirectory(prefix="ft-pg-", dir="/tmp") as name:
        folder = Path(name)
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        secret = folder / "password"
        secret.write_text(PASSWORD)
        subprocess.run(
            [
                *(program("initdb"), "--pgdata", folder / "data", "--username", USER, "--pwfile", secret),
                *("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync"),
            ],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
            **owner(folder),
        )
        server = Server(folder, free_port())
        with (folder / "data/postgresql.conf").open("a") as settings:
            settings.write(
                f"listen_addresses = '127.0.0.1'\nport = {server.port}\n"
                f"unix_socket_directories = ''\nfsync = off\nshared_buffers = 32MB\n"
            )
        server.start()
        try:
            yield server
        finally:
            if server.process is not None and server.process.poll() is None:
                server.go_on()
                server.stop(crash=True)
