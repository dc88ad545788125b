"""Whose process is over, among gateways that share a PostgreSQL: told by a lock that ends with it.

A gateway holds an advisory lock by a session of its own. Whatever ends the process, its kernel closes the
connection, and the server lets go of the lock at once. A free lock alone proves nothing, for sessions end
under gateways that live too: one by an administrator, all by a restart of the server or of what is before it.
Those have their locks again as soon as they can. So a gateway is over for sure (`ended`) if

- the server that let go of its lock still runs: it is no other, to which the gateway may not have found yet,
- it has been silent for longer than one that lives is, with a lock or without,
- and whoever looks has had a session for so long, in which all others could have had theirs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from gateway.database import reason
from gateway.store import Store

log = logging.getLogger("gateway")

_SERVER = text("SELECT CAST(extract(epoch FROM pg_postmaster_start_time()) AS float8)")
_HOLD = text("SELECT pg_try_advisory_lock(:key)")
_IS_FREE = text("SELECT pg_try_advisory_xact_lock(:key)")


@dataclass(frozen=True, slots=True)
class Held:
    """A lock that is held since `since_s`, of the monotonic clock, at the `server` that was started then."""

    server: float
    since_s: float


class Presence:
    """The lock of the gateway `instance`, whose id is 16 hex digits. Nothing here is for the loop."""

    def __init__(self, store: Store, instance: str) -> None:
        self._store = store
        self._key = {"key": _key(instance)}
        self._session: Connection | None = None
        self._held: Held | None = None

    def hold(self) -> Held | None:
        """The lock, which is taken if it was not held; None if there is none to be had."""
        if self._session is not None:
            try:
                self._session.execute(_SERVER)
            except SQLAlchemyError as error:
                log.warning("the gateway's session has ended", extra={"reason": reason(error)})
                self.close()
            else:
                return self._held
        try:
            self._session = self._store.session()
            if self._session.scalar(_HOLD, self._key):
                self._held = Held(self._session.scalars(_SERVER).one(), time.monotonic())
                return self._held
        except SQLAlchemyError:
            pass  # whoever writes hears why
        self.close()  # or a session has it of which only the server does not know that it is lost
        return None

    def close(self) -> None:
        """Let go of the lock."""
        if self._session is not None:
            with suppress(SQLAlchemyError):
                self._session.close()
        self._session = self._held = None


def ended(connection: Connection, silent: Sequence[str]) -> list[str]:
    """Those of `silent` whose locks are free. They stay so until the transaction is over."""
    return [one for one in silent if connection.scalar(_IS_FREE, {"key": _key(one)})]


def _key(instance: str) -> int:
    return int.from_bytes(bytes.fromhex(instance), signed=True)
