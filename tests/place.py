"""A prefix in an object store, and the builder's commands that use it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from builder.__main__ import run
from tests import servers
from tests.object_store import ObjectStore, Relay, environ


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended: its status and what it said, the way of each."""

    status: int
    out: str
    err: str


class Place:
    """A prefix in a bucket of the test's own, and the commands that use it."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.bucket = f"bakes-{uuid4()}"
        self.url = f"s3://{self.bucket}/deep/prefix"
        self.s3 = store.client()
        self.s3.create_bucket(Bucket=self.bucket)

    def command(self, *words: str | Path) -> Done:
        """Run `python -m builder` to its end, in this process."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out):
            status = run([*map(str, words)], {}, err)
        return Done(status, out.getvalue(), err.getvalue())

    @contextmanager
    def killed(self, *words: str | Path, through: Relay) -> Iterator[None]:
        """Run it as a process that reaches the store through a relay, and kill it when the block ends."""
        process = subprocess.Popen(
            [sys.executable, "-m", "builder", *map(str, words)],
            cwd=servers.ROOT,
            env={"PATH": os.environ["PATH"], **environ(through.url)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield
        finally:
            process.kill()
            process.wait()

    def done(self, *words: str | Path) -> Done:
        """Run it, and it goes well."""
        done = self.command(*words)
        assert done.status == 0, done.err
        return done

    def parts(self) -> list[str]:
        """The numbers of the parts that were uploaded, in order."""
        return [line.rpartition("partNumber=")[2] for line in self.answered("PUT") if "partNumber=" in line]

    def objects(self) -> dict[str, bytes]:
        """What is in the store, below the prefix."""
        listed = self.s3.list_objects_v2(Bucket=self.bucket).get("Contents", ())
        keys = [entry["Key"] for entry in listed]
        return {
            key.removeprefix("deep/prefix/"): self.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()
            for key in keys
        }

    def put(self, name: str, body: bytes, **options: Any) -> None:
        """Write an object by other means than ours."""
        self.s3.put_object(Bucket=self.bucket, Key=f"deep/prefix/{name}", Body=body, **options)

    def answered(self, method: str) -> list[str]:
        """The requests of a kind for what is below the prefix that were answered well, in order."""
        top = f"{method} /{self.bucket}/deep/prefix/"
        return [
            line.removeprefix(top)
            for line, status in self.store.answered()
            if line.startswith(top) and status < 300
        ]
