"""The keys in the database: made, listed and revoked there, beside a gateway that runs or by it."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Index,
    Integer,
    LargeBinary,
    Row,
    String,
    Table,
    bindparam,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from gateway.accounts.keys import ENV_ID, ENV_NAME, OWNER_ID, OWNER_NAME, Key, Keys
from gateway.database import reason
from gateway.store import Store, holds, metadata
from handler.auth import digest, generate
from handler.errors import BadRequest, NotFound
from handler.table import ENDPOINT_ID

log = logging.getLogger("gateway")

POLL_S = 0.5
"""How often a gateway looks whether the keys have changed (docs/decisions/0014-keys-and-usage.md)."""

_LIVE = text("revoked_at IS NULL")
TABLE = Table(
    "keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("digest", LargeBinary(32), nullable=False, unique=True),
    Column("admin", Boolean, nullable=False),
    Column("endpoints", JSON(none_as_null=True)),
    Column("models", JSON(none_as_null=True)),
    Column("requests_per_minute", Integer),
    Column("tokens_per_minute", Integer),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("last_used_at", BigInteger),
    Column("revoked_at", BigInteger),
    # The number of the last change of this key among those of all: the highest is what a gateway polls.
    Column("changed", Integer, nullable=False, unique=True),
    Index("keys_live_name", "name", unique=True, sqlite_where=_LIVE, postgresql_where=_LIVE),
)

_NAME_MAX_CHARS = 64
_TAKEN = re.compile(rf"key_|({ENV_ID}|{ENV_NAME}|{OWNER_ID}|{OWNER_NAME})$", re.IGNORECASE)
_MODEL = re.compile(r"[\x21-\x7e]{1,256}")
_MOST = 2**31 - 1


def parse(fields: Mapping[str, Any], now_s: float) -> Key:
    """The key, still without id and digest, that `fields` (of the admin API) describe.

    Raises `BadRequest`, which names every fault and not only the first.
    """
    faults: list[str] = []

    def field(name: str, allowed: str, good: bool) -> Any:
        if not good:
            faults.append(f"`{name}` must be {allowed}")
        return fields.get(name)

    def names(name: str, what: str, fits: Any) -> frozenset[str] | None:
        given = fields.get(name)
        items: list[Any] = given if isinstance(given, list) else [None]
        good = given is None or (bool(items) and all(isinstance(item, str) and fits(item) for item in items))
        field(name, f"null or a list of at least one {what}", good)
        return frozenset(items) if given is not None and good else None

    def number(name: str) -> int | None:
        given = fields.get(name)
        good = given is None or (type(given) is int and 1 <= given <= _MOST)
        result: int | None = field(name, f"null or a whole number from 1 to {_MOST}", good)
        return result

    name = fields.get("name")
    plain = isinstance(name, str) and _is_plain(name.strip()) and not _TAKEN.match(name.strip())
    expires_s = fields.get("expires_at")
    key = Key(
        id="",
        name=str(field("name", "1 to 64 printable characters, and no id of a key", bool(plain))),
        digest=b"",
        admin=field("admin", "true or false", type(fields.get("admin", False)) is bool) or False,
        endpoints=names("endpoints", "id of an endpoint", _is_endpoint_id),
        models=names("models", "name of a model", _MODEL.fullmatch),
        requests_per_minute=number("requests_per_minute"),
        tokens_per_minute=number("tokens_per_minute"),
        created_s=int(now_s),
        expires_s=field(
            "expires_at",
            "null or a time to come, in Unix seconds",
            expires_s is None or (type(expires_s) is int and now_s < expires_s < 2**53),
        ),
    )
    unknown = sorted(fields.keys() - {*key.view()} | (fields.keys() & _NOT_GIVEN))
    faults += [f"`{name}` is not a field of a new key" for name in unknown]
    if faults:
        raise BadRequest(f"The key can't be made: {'; '.join(faults)}.", code="invalid_key")
    return replace(key, name=key.name.strip())


def _is_plain(name: str) -> bool:
    return 1 <= len(name) <= _NAME_MAX_CHARS and name.isprintable()  # halves of surrogates are not either


_NOT_GIVEN = {"id", "created_at", "last_used_at", "revoked_at"}


def _is_endpoint_id(value: str) -> bool:
    try:
        ENDPOINT_ID.parse(value)
    except ValueError:
        return False
    return True


def create(connection: Connection, new: Key) -> tuple[Key, str]:
    """Keep the key that `parse` has made of somebody's wishes; returns it, and the key itself.

    Raises `BadRequest` if a key that is not revoked has its name.
    """
    same = select(TABLE.c.id).where(TABLE.c.name == new.name, TABLE.c.revoked_at.is_(None))
    if (other := connection.scalar(same)) is not None:
        raise BadRequest(f"There is a key of that name, {other}.", param="name", code="name_taken")
    made = generate()
    key = replace(new, id=f"key_{secrets.token_hex(8)}", digest=digest(made))
    connection.execute(
        insert(TABLE).values(**key.view(), digest=key.digest, changed=_revision(connection) + 1)
    )
    return key, made


def first(connection: Connection, now_s: float) -> str | None:
    """Make an admin key where there has never been a key; returns it, or None."""
    if connection.scalar(select(func.count()).select_from(TABLE)):
        return None
    return create(connection, parse({"name": "first", "admin": True}, now_s))[1]


def revoke(connection: Connection, name: str, now_s: float) -> Key:
    """Let the key of that id or name open nothing any more; twice is as once.

    Raises `NotFound`, and `BadRequest` for the one that is not in the database.
    """
    if name in {ENV_ID, ENV_NAME}:
        raise BadRequest("That key is API_KEY's: start the gateway without it.", code="key_is_set")
    found = _named(connection, name) if holds(name) else None
    if found is None:
        raise NotFound(f"There is no key `{name}`.", code="key_not_found")
    if found.revoked_at is None:
        connection.execute(
            update(TABLE)
            .where(TABLE.c.id == found.id)
            .values(revoked_at=int(now_s), changed=_revision(connection) + 1)
        )
    return replace(_key(found), revoked_s=found.revoked_at or int(now_s))


def _named(connection: Connection, name: str) -> Row[Any] | None:
    live = TABLE.c.revoked_at.is_(None)
    found = connection.execute(select(TABLE).where(TABLE.c.id == name)).one_or_none()
    return found or connection.execute(select(TABLE).where(TABLE.c.name == name, live)).one_or_none()


def load(connection: Connection) -> tuple[list[Key], int]:
    """Every key in the order in which they were made, revoked ones too, and the number of the last change."""
    rows = connection.execute(select(TABLE).order_by(TABLE.c.created_at, TABLE.c.name, TABLE.c.id))
    return [_key(row) for row in rows], _revision(connection)


class Following:
    """Keeps `keys` as they are in `store`. `look` at any time; `run` looks until it is cancelled."""

    def __init__(self, keys: Keys, store: Store) -> None:
        self._keys = keys
        self._store = store
        self._seen = -1

    async def look(self) -> None:
        """Read the keys if they have changed, and write down which were used."""
        if await self._store.read(_revision) != self._seen:
            stored, revision = await self._store.read(load)
            if revision > self._seen:  # else another look was faster, and has seen more
                self._seen = revision
                self._keys.store(stored)
        used_s, self._keys.used_s = self._keys.used_s, {}
        if used_s:
            try:
                await self._store.write(lambda connection: _touch(connection, used_s))
            except SQLAlchemyError:
                self._keys.used_s = used_s | self._keys.used_s
                raise

    async def run(self) -> None:
        """Look again and again. A database that fails now may be there the next time."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.look()
            except SQLAlchemyError as error:
                log.warning("keys could not be read or written", extra={"reason": reason(error)})


def _touch(connection: Connection, used_s: Mapping[str, int]) -> None:
    used = update(TABLE).where(TABLE.c.id == bindparam("key_id")).values(last_used_at=bindparam("at_s"))
    connection.execute(used, [{"key_id": key_id, "at_s": at_s} for key_id, at_s in used_s.items()])


def _revision(connection: Connection) -> int:
    return connection.scalar(select(func.max(TABLE.c.changed))) or 0


def _key(row: Row[Any]) -> Key:
    return Key(
        id=row.id,
        name=row.name,
        digest=row.digest,
        admin=row.admin,
        endpoints=None if row.endpoints is None else frozenset(row.endpoints),
        models=None if row.models is None else frozenset(row.models),
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
        created_s=row.created_at,
        expires_s=row.expires_at,
        last_used_s=row.last_used_at,
        revoked_s=row.revoked_at,
    )
