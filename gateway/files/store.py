"""The files that clients give and get: a row of the database for each, and its bytes in a folder.

    files/file-0199...          as its row says; or an output that a batch still writes
    files/file-0199....part     on its way here

The bytes are whole and on the disk before there is a row. So no row is ever without its file; a file without
a row is what a killed gateway has left, and goes when the next one starts. Gateways that share a database
share the folder too: what may still be on its way to another stays for a day.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Index,
    String,
    Table,
    delete,
    func,
    insert,
    select,
)

from gateway.files.draft import Draft, full_disk_is_told
from gateway.store import Store, holds, metadata
from handler.errors import NotFound, StartError, StorageFull

T = TypeVar("T")

FILENAME_MAX_CHARS = 255
READ_BYTES = 1 << 20
EXPIRED_MAX = 1000
SHARED_KEPT_S = 86_400.0
"""No upload takes so long, and no batch is written to for so long without a row that says so."""
_PART = ".part"

FILES = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),  # later ones are greater
    Column("key_id", String(64), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("filename", String(FILENAME_MAX_CHARS), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),  # Unix time
    Column("expires_at", BigInteger),
    Index("files_by_key", "key_id", "id"),
    Index("files_by_end", "expires_at"),
)


@dataclass(frozen=True, slots=True)
class File:
    """A file as its row says; times are Unix times. `sha256` is that of its bytes, in hex."""

    id: str
    key_id: str
    purpose: str
    filename: str
    bytes: int
    sha256: str
    created_at: int
    expires_at: int | None

    def public(self) -> dict[str, Any]:
        """OpenAI's object: https://platform.openai.com/docs/api-reference/files/object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


def new_id(prefix: str) -> str:
    """An id that nobody guesses, greater than all that were made a millisecond ago or earlier."""
    return f"{prefix}{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def put(connection: Connection, file: File) -> None:
    """Write the row of `file`, whose bytes are there."""
    connection.execute(insert(FILES).values(**asdict(file)))


def find(connection: Connection, file_id: str, key_id: str | None, now: float) -> File | None:
    """The file `file_id` of the key `key_id`, or of any for None, unless it has expired."""
    if not holds(file_id):
        return None
    row = connection.execute(select(FILES).where(FILES.c.id == file_id)).mappings().first()
    file = None if row is None else File(**row)
    if file is None or key_id not in {None, file.key_id}:
        return None
    return None if file.expires_at is not None and file.expires_at <= now else file


class FilesUnusable(StartError):
    """The folder of files can't be made, read or cleared."""

    exit_code = 74


class FileStore:
    """The files in `folder`, each of at most `max_file_bytes`, all together of `max_stored_bytes`.

    The bound on all is for what clients send: what batches write counts, and is written all the same.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        *,
        max_file_bytes: int,
        max_stored_bytes: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._folder = folder
        self._max_stored_bytes = max_stored_bytes
        self._drafts: set[Draft] = set()
        self._stored_bytes = 0  # as of the last `make_room`
        self.max_file_bytes = max_file_bytes
        self.now = now

    async def open(self, writing: Collection[str]) -> Self:
        """Make the folder, and remove what a killed gateway has left; not `writing`, for which rows come.

        Raises `FilesUnusable`.
        """
        rows = await self._store.read(lambda connection: set(connection.scalars(select(FILES.c.id))))
        try:
            await asyncio.to_thread(self._sweep, rows | set(writing))
        except OSError as error:
            raise FilesUnusable(
                f"{error.filename or self._folder} can't be used for files: {error.strerror}"
            ) from error
        return self

    def _sweep(self, known: Collection[str]) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        before_s = time.time() - SHARED_KEPT_S
        for path in self._folder.iterdir():
            if path.name in known:
                continue
            with suppress(FileNotFoundError):  # another gateway sweeps too
                if not self._store.shared or path.stat().st_mtime < before_s:
                    path.unlink()

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file are whose id was made here."""
        return self._folder / file_id

    @contextmanager
    def draft(self) -> Iterator[Draft]:
        """A file to write; it is gone with the block unless `keep` has taken it."""
        with full_disk_is_told():
            path = self._folder / (new_id("file-") + _PART)
            draft = Draft(path, self.max_file_bytes, self._check_room)
        self._drafts.add(draft)
        try:
            yield draft
        finally:
            self._drafts.remove(draft)
            draft.close()

    async def make_room(self, size_bytes: int) -> None:
        """Raise `StorageFull` if there is no place for so much beside what is here or on its way."""
        total = select(func.coalesce(func.sum(FILES.c.bytes), 0))
        self._stored_bytes = await self._store.read(
            lambda connection: int(connection.execute(total).scalar_one())
        )
        self._check_room(size_bytes)

    def _check_room(self, more_bytes: int = 0) -> None:
        coming = sum(draft.size_bytes for draft in self._drafts)
        if self._stored_bytes + coming + more_bytes > self._max_stored_bytes:
            raise StorageFull(f"All files together may have {self._max_stored_bytes} bytes.")

    async def keep(
        self, draft: Draft, *, key_id: str, purpose: str, filename: str, expires_in_s: int | None
    ) -> File:
        """What `draft` holds as a file of the key `key_id`. Raises `StorageFull`."""
        await self.make_room(0)
        file_id, created_at = new_id("file-"), int(self.now())
        expires_at = None if expires_in_s is None else created_at + expires_in_s
        name = filename[:FILENAME_MAX_CHARS]

        async def finish() -> File:
            sha256 = await draft.finish(self.path(file_id))
            file = File(file_id, key_id, purpose, name, draft.size_bytes, sha256, created_at, expires_at)
            await self._store.write(lambda connection: put(connection, file))
            return file

        return await to_the_end(finish())  # a client that leaves now leaves a file, and not half of one

    async def find(self, file_id: str, key_id: str | None) -> File:
        """The file `file_id` of the key `key_id`, or of any for None. Raises `NotFound`."""
        file = await self._store.read(lambda connection: find(connection, file_id, key_id, self.now()))
        if file is None:
            raise no_such_file(file_id)
        return file

    async def list(
        self, key_id: str | None, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> Sequence[File]:
        """At most `limit` files of the key `key_id`, or of all for None, behind the one called `after`."""
        wanted = select(FILES).order_by(FILES.c.id.desc() if newest_first else FILES.c.id).limit(limit)
        wanted = wanted.where(FILES.c.expires_at.is_(None) | (FILES.c.expires_at > self.now()))
        if key_id is not None:
            wanted = wanted.where(FILES.c.key_id == key_id)
        if purpose is not None:
            wanted = wanted.where(FILES.c.purpose == purpose)
        if after is not None:
            wanted = wanted.where(FILES.c.id < after if newest_first else FILES.c.id > after)
        rows = await self._store.read(lambda connection: connection.execute(wanted).mappings().all())
        return [File(**row) for row in rows]

    async def delete(
        self, files: Sequence[str], check: Callable[[Connection], None] = lambda _: None
    ) -> None:
        """Forget `files`, which `check` may refuse by raising; first the rows, then the bytes."""

        def forget(connection: Connection) -> None:
            check(connection)
            connection.execute(delete(FILES).where(FILES.c.id.in_(files)))

        async def both() -> None:
            await self._store.write(forget)
            await asyncio.to_thread(self._remove, files)

        await to_the_end(both())

    def _remove(self, files: Sequence[str]) -> None:
        for file_id in files:
            self.path(file_id).unlink(missing_ok=True)

    async def expired(self) -> Sequence[str]:
        """Files whose time is over, some at a time."""
        wanted = select(FILES.c.id).where(FILES.c.expires_at <= self.now()).limit(EXPIRED_MAX)
        return await self._store.read(lambda connection: list(connection.scalars(wanted)))


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Do `work`; it is not cancelled with its caller, who waits for its end all the same."""
    doing = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(doing)
    finally:
        await asyncio.wait({doing})


def no_such_file(file_id: str, param: str = "id") -> NotFound:
    """That there is no file of that id, or none that this key may see."""
    return NotFound(f"No such File object: {file_id}", param=param, code="file_not_found")
