"""Who may come in: the keys that a gateway knows, as hashes, and what each of them may ask.

They are kept in the database (`gateway.accounts.key_table`), but for the one that `API_KEY` gives and for the
owner's, who needs none.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from handler.auth import bearer, digest
from handler.errors import Unauthorized
from handler.messages import Request

ENV_ID = "env"
ENV_NAME = "API_KEY"
"""The id of the key that `API_KEY` gives, whose hash is kept nowhere."""
OWNER_ID = "door"
OWNER_NAME = "this machine"
"""Under what it is written down that came through the owner's door (`gateway.door`), without a key."""


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of one key, and what it may do; None is no limit. Times are Unix seconds.

    `digest` is the SHA-256 of the key, which is 256 random bits: a plain hash is enough. What is
    `revoked_s` or has `expires_s` behind it opens nothing.
    """

    id: str
    name: str
    digest: bytes = field(repr=False)
    admin: bool = False
    endpoints: frozenset[str] | None = None
    models: frozenset[str] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    created_s: int = 0
    expires_s: int | None = None
    last_used_s: int | None = None
    revoked_s: int | None = None

    def opens(self, now_s: float) -> bool:
        """Whether it is valid at `now_s`."""
        return self.revoked_s is None and (self.expires_s is None or now_s < self.expires_s)

    def may_use(self, endpoint_id: str) -> bool:
        """Whether the endpoint of that id is there for it."""
        return self.endpoints is None or endpoint_id in self.endpoints

    def may_ask(self, model: str) -> bool:
        """Whether the model of that name is there for it."""
        return self.models is None or model in self.models

    @property
    def limited(self) -> bool:
        """Whether what it may ask in a minute is bounded."""
        return self.requests_per_minute is not None or self.tokens_per_minute is not None

    def view(self) -> dict[str, Any]:
        """What the admin API says of it."""
        return {
            "id": self.id,
            "name": self.name,
            "admin": self.admin,
            "endpoints": None if self.endpoints is None else sorted(self.endpoints),
            "models": None if self.models is None else sorted(self.models),
            "requests_per_minute": self.requests_per_minute,
            "tokens_per_minute": self.tokens_per_minute,
            "created_at": self.created_s,
            "expires_at": self.expires_s,
            "last_used_at": self.last_used_s,
            "revoked_at": self.revoked_s,
        }


OWNER = Key(OWNER_ID, OWNER_NAME, b"", admin=True)


class Keys:
    """The keys that a gateway knows: that of `API_KEY`, if there is one, and those that are `stored`."""

    def __init__(
        self,
        api_key: str | None = None,
        stored: Iterable[Key] = (),
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._env = (
            # Known without its key too: what was asked with it before is still its own.
            Key(ENV_ID, ENV_NAME, b"", admin=True, revoked_s=0)
            if api_key is None
            else Key(ENV_ID, ENV_NAME, digest(api_key), admin=True)
        )
        self.heard: list[Callable[[], None]] = []
        """Called whenever the keys have changed."""
        self.used_s: dict[str, int] = {}
        """When each key of the database was last used, as far as it is not written down yet."""
        self.store(stored)

    def store(self, stored: Iterable[Key]) -> None:
        """Replace the stored keys by these."""
        by_digest = (*stored, self._env)  # and never the owner, who has no key
        self._by_id = {key.id: key for key in (*by_digest, OWNER)}
        self._by_digest = {key.digest: key for key in by_digest}
        for heard in self.heard:
            heard()

    def check(self, request: Request) -> Key:
        """The key that `request` bears. Raises `Unauthorized` unless it opens."""
        given = digest(bearer(request))
        # How long a look-up takes may say something of digests, and from a digest nobody finds its key.
        key = self._by_digest.get(given, self._env)
        now_s = self._clock()
        if not (hmac.compare_digest(given, key.digest) and key.opens(now_s)):
            raise Unauthorized
        if key is not self._env:
            self.used_s[key.id] = int(now_s)
        return key

    def known(self, request: Request) -> Key | None:
        """The key that `request` bears, or None. Raises `Unauthorized` for one that does not open."""
        try:
            bearer(request)
        except Unauthorized:
            return None
        return self.check(request)

    def __contains__(self, key_id: object) -> bool:
        return key_id in self._by_id

    def closed(self) -> list[str]:
        """The ids of those that open nothing any more. `API_KEY` is none: each gateway has its own."""
        now_s = self._clock()
        return [key.id for key in self._by_id.values() if key is not self._env and not key.opens(now_s)]

    def of(self, key_id: str) -> Key:
        """The key of that id, whether it opens or not (`Key.opens`). Raises `KeyError`."""
        return self._by_id[key_id]
