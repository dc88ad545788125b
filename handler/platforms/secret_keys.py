"""API keys in AWS's Secrets Manager: their hashes, kept for minutes, so that they change without a restart.

    {"keys": [{"name": "mobile app", "sha256": "9f86d0...", "expires": "2027-01-01T00:00:00Z"}, ...]}

`sha256` is that of the key in hexadecimal: the key itself is nowhere but with its owner.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from handler.auth import Key, Keyring, bearer, valid
from handler.errors import BadSettings, NotAdmitted, UpstreamFailed
from handler.messages import Request

log = logging.getLogger(__name__)

FRESH_S = 300.0
"""How long a key that was taken back may still open."""
STALE_S = 3600.0
"""The same while Secrets Manager does not answer; then nobody gets in."""
UNKNOWN_S = 10.0
"""How often at most an unknown key has the secret read again: anybody can make one up."""
WAIT_S = 2.0
"""How long a request waits for the secret to be read again; then what was read before has to do."""

_NAME = re.compile(r"[^\x00-\x1f#:]{1,64}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


class SecretKeys:
    """The keys of a secret, and those that are `fixed`. Lives on one event loop.

    `fetch` gives the secret's text; it runs in a thread, and may raise `UpstreamFailed`.
    """

    def __init__(
        self,
        fetch: Callable[[], str] | None,
        fixed: Sequence[Key] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._fixed = tuple(fixed)
        self._clock = clock
        self._ring = Keyring(self._fixed)
        self._read_s = clock()
        self._tried_s = self._read_s
        self._reading: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Read the secret for the first time. Raises `BadSettings` and `UpstreamFailed`."""
        if self._fetch is not None:
            self._take(await asyncio.to_thread(self._fetch))

    async def check(self, request: Request) -> Key:
        """The entry of the key that `request` bears.

        Raises `Unauthorized`, and `NotAdmitted` once what is known is too old.
        """
        given = bearer(request)
        if self._fetch is None:
            return valid(self._ring.find(given))
        if self._age_s() > FRESH_S:
            await self._read()
        found = self._ring.find(given)
        if found is None and self._clock() - self._tried_s >= UNKNOWN_S:
            await self._read()
            found = self._ring.find(given)
        if self._age_s() > STALE_S:
            raise NotAdmitted("The API keys can't be read now.", retry_after_s=UNKNOWN_S)
        return valid(found)

    def _age_s(self) -> float:
        return self._clock() - self._read_s

    async def _read(self) -> None:
        """Have the secret read; who comes meanwhile waits for the same answer. The log has what is wrong."""
        if self._reading is None:
            if self._clock() - self._tried_s < UNKNOWN_S:
                return
            self._tried_s = self._clock()
            self._reading = asyncio.create_task(self._reread())
        await asyncio.wait({self._reading}, timeout=WAIT_S)

    async def _reread(self) -> None:
        assert self._fetch is not None, "there is a secret"
        try:
            self._take(await asyncio.to_thread(self._fetch))
        except (UpstreamFailed, BadSettings) as error:
            log.warning("the API keys are those read before", extra={"reason": " ".join(str(error).split())})
        finally:
            self._reading = None

    def _take(self, text: str) -> None:
        self._ring = Keyring((*self._fixed, *parse(text)))
        self._read_s = self._clock()


def parse(text: str) -> list[Key]:
    """The keys that a secret holds. Raises `BadSettings`, which names every fault and no key."""
    try:
        entries: Any = json.loads(text)["keys"]
    except (ValueError, TypeError, KeyError, RecursionError):
        entries = None
    if not isinstance(entries, list):
        raise BadSettings(
            ['the secret of API_KEYS_SECRET is no JSON object {"keys": [{"name", "sha256"}, ...]}']
        )
    keys: list[Key] = []
    faults: list[str] = []
    for number, entry in enumerate(entries):
        try:
            keys.append(_key(entry))
        except ValueError as error:
            faults.append(f"keys[{number}] in the secret of API_KEYS_SECRET: {error}")
    names = [key.name for key in keys]
    faults += [
        f"two keys in the secret of API_KEYS_SECRET are called {name!r}"
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    if faults:
        raise BadSettings(faults)
    return keys


def _key(entry: Any) -> Key:
    if not isinstance(entry, dict):
        raise ValueError("is no object")  # noqa: TRY004 - one fault of several, none of the program's
    name, sha256, expires = entry.get("name"), entry.get("sha256"), entry.get("expires")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ValueError('"name" is not 1 to 64 characters without "#" and ":"')
    if not isinstance(sha256, str) or _SHA256.fullmatch(sha256) is None:
        raise ValueError(f'"sha256" of {name!r} is not 64 hexadecimal digits')
    return Key(name, bytes.fromhex(sha256), None if expires is None else _time_s(expires, name))


def _time_s(expires: Any, name: str) -> float:
    try:
        moment = datetime.fromisoformat(expires)
    except (TypeError, ValueError):
        raise ValueError(f'"expires" of {name!r} is no time such as "2027-01-01T00:00:00Z"') from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
