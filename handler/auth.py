"""API keys: kept as hashes, compared in constant time."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256

from handler.errors import Unauthorized
from handler.messages import Request

PREFIX = "ft-"


def generate() -> str:
    """A new key: `ft-` and 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(key: str) -> bytes:
    """What is kept of a key. The key is random and long, so a plain hash is enough."""
    return sha256(key.encode()).digest()


def bearer(request: Request) -> str:
    """The key that the request bears. Raises `Unauthorized` if there is none.

    `Authorization: Bearer KEY` counts, its scheme in any case (RFC 7235), and where there
    is none `x-api-key: KEY`, which is what clients of `/v1/messages` send.
    """
    scheme, _, key = (request.header("authorization") or "").partition(" ")
    if not scheme:
        scheme, key = "bearer", request.header("x-api-key") or ""
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthorized("You didn't provide an API key. Provide it as 'Authorization: Bearer YOUR_KEY'.")
    return key.strip()


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of one key. It opens nothing any more from `expires_s` on, in Unix time."""

    name: str
    digest: bytes = field(repr=False)
    expires_s: float | None = None


class Keyring:
    """The keys that open a server.

    An empty ring opens to nobody: a server without authentication has no ring at all.
    """

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = tuple(keys)

    @classmethod
    def of(cls, *keys: str) -> Keyring:
        """The ring that holds `keys`; they are hashed here and forgotten."""
        return cls(Key("", digest(key)) for key in keys)

    def find(self, key: str) -> Key | None:
        """The entry of `key`, expired or not.

        Every digest is compared: the time taken says nothing about which one matched.
        """
        given, found = digest(key), None
        for known in self._keys:
            if hmac.compare_digest(given, known.digest):
                found = known
        return found

    def check(self, request: Request) -> Key:
        """The entry of the key that the request bears. Raises `Unauthorized` unless it opens."""
        return valid(self.find(bearer(request)))


def valid(key: Key | None) -> Key:
    """`key`, if there is one and it has not expired. Raises `Unauthorized`."""
    if key is None or (key.expires_s is not None and key.expires_s <= time.time()):
        raise Unauthorized
    return key
