"""API keys: kept as hashes, compared in constant time."""

from __future__ import annotations

import hmac
import secrets
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


class Keyring:
    """The keys that open a server.

    An empty ring opens to nobody: a server without authentication has no ring at all.
    """

    def __init__(self, digests: frozenset[bytes]) -> None:
        self._digests = digests

    @classmethod
    def of(cls, *keys: str) -> Keyring:
        """The ring that holds `keys`; they are hashed here and forgotten."""
        return cls(frozenset(digest(key) for key in keys))

    def check(self, request: Request) -> None:
        """Raise `Unauthorized` unless the request bears a key of this ring.

        `Authorization: Bearer KEY` counts, its scheme in any case (RFC 7235), and where there
        is none `x-api-key: KEY`, which is what clients of `/v1/messages` send.
        """
        scheme, _, key = (request.header("authorization") or "").partition(" ")
        if not scheme:
            scheme, key = "bearer", request.header("x-api-key") or ""
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized(
                "You didn't provide an API key. Provide it as 'Authorization: Bearer YOUR_KEY'."
            )
        given = digest(key.strip())
        # Every digest is compared: the time taken says nothing about which one matched.
        if not sum(hmac.compare_digest(given, known) for known in self._digests):
            raise Unauthorized
