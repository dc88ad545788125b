"""`handler.platforms.secret_keys`: who has a key gets in, and a change of the secret is heard of."""

from __future__ import annotations

import asyncio
import json
import threading
from hashlib import sha256
from typing import Any

import pytest

from handler.auth import Key, digest
from handler.errors import BadSettings, NotAdmitted, Unauthorized, UpstreamFailed
from handler.messages import Request
from handler.platforms.secret_keys import FRESH_S, STALE_S, UNKNOWN_S, SecretKeys, parse


def entry(key: str, name: str | None = None, **more: Any) -> dict[str, Any]:
    """A key as the secret has it."""
    return {"name": name or key, "sha256": sha256(key.encode()).hexdigest(), **more}


def request(key: str) -> Request:
    """A request that bears `key`."""
    return Request("GET", "/v1/models", (("authorization", f"Bearer {key}"),))


class Secret:
    """Secrets Manager and a clock, both of which the test sets."""

    def __init__(self, *entries: dict[str, Any]) -> None:
        self.text = json.dumps({"keys": entries})
        self.fails = False
        self.reads = 0
        self.now_s = 0.0
        self.may_read = threading.Event()
        self.may_read.set()

    def fetch(self) -> str:
        """Read it."""
        self.reads += 1
        self.may_read.wait()
        if self.fails:
            raise UpstreamFailed("no answer")
        return self.text

    async def keys(self, *fixed: Key) -> SecretKeys:
        """The keys, opened."""
        keys = SecretKeys(self.fetch, fixed, clock=lambda: self.now_s)
        await keys.open()
        return keys


async def test_a_key_of_the_secret_opens_and_is_known_by_its_name() -> None:
    """So does one that is given beside it; the secret is read once."""
    secret = Secret(entry("ft-1", "mobile app"), entry("ft-2", "batch"))
    keys = await secret.keys(Key("api_key", digest("ft-3")))
    assert [(await keys.check(request(f"ft-{n}"))).name for n in (1, 2, 3)] == [
        "mobile app",
        "batch",
        "api_key",
    ]
    assert secret.reads == 1


async def test_a_new_key_opens_without_a_restart() -> None:
    """The secret is read again for it, but not for every key that somebody makes up."""
    secret = Secret(entry("old"))
    keys = await secret.keys()
    secret.text = json.dumps({"keys": [entry("new")]})
    for key in ("new", "made up"):
        with pytest.raises(Unauthorized):
            await keys.check(request(key))
    assert secret.reads == 1
    secret.now_s = UNKNOWN_S
    assert (await keys.check(request("new"))).name == "new"
    with pytest.raises(Unauthorized):
        await keys.check(request("old"))
    assert secret.reads == 2


async def test_a_key_that_was_taken_back_opens_for_minutes() -> None:
    """Then the secret is read again, once for all who ask."""
    secret = Secret(entry("old"))
    keys = await secret.keys()
    secret.text = json.dumps({"keys": []})
    secret.now_s = FRESH_S
    await keys.check(request("old"))
    secret.now_s += 1
    for answer in await asyncio.gather(
        *(keys.check(request("old")) for _ in range(5)), return_exceptions=True
    ):
        assert isinstance(answer, Unauthorized)
    assert secret.reads == 2


async def test_keys_that_can_not_be_read_again_are_those_of_before() -> None:
    """For an hour; then nobody gets in, and it is no fault of the key."""
    secret = Secret(entry("old"))
    keys = await secret.keys()
    secret.fails = True
    secret.now_s = STALE_S
    await keys.check(request("old"))
    secret.now_s += UNKNOWN_S
    with pytest.raises(NotAdmitted):
        await keys.check(request("old"))
    secret.fails = False
    secret.now_s += UNKNOWN_S
    await keys.check(request("old"))


async def test_a_secret_that_was_spoiled_changes_nothing() -> None:
    """The log says so, and no key is in it."""
    secret = Secret(entry("old"))
    keys = await secret.keys()
    secret.text = "spoiled"
    secret.now_s = FRESH_S + 1
    assert (await keys.check(request("old"))).name == "old"


async def test_an_expired_key_does_not_open() -> None:
    """With or without a time zone; UTC is meant."""
    secret = Secret(
        entry("past", expires="2020-01-01T00:00:00Z"),
        entry("day", expires="2020-01-01"),
        entry("future", expires="2999-01-01T00:00:00+02:00"),
    )
    keys = await secret.keys()
    assert (await keys.check(request("future"))).name == "future"
    for key in ("past", "day"):
        with pytest.raises(Unauthorized):
            await keys.check(request(key))


async def test_without_a_secret_the_given_key_is_the_only_one() -> None:
    """Nothing is read."""
    keys = SecretKeys(None, [Key("api_key", digest("ft-1"))])
    await keys.open()
    assert (await keys.check(request("ft-1"))).name == "api_key"
    with pytest.raises(Unauthorized):
        await keys.check(request("ft-2"))


async def test_a_secret_that_can_not_be_read_at_the_start_is_told() -> None:
    """To whoever starts the worker."""
    secret = Secret()
    secret.fails = True
    with pytest.raises(UpstreamFailed):
        await secret.keys()


@pytest.mark.parametrize(
    ("secret", "fault"),
    [
        ("ft-plain", "is no JSON object"),
        ("[]", "is no JSON object"),
        ('{"keys": {}}', "is no JSON object"),
        ({"keys": [5]}, "keys[0] in the secret of API_KEYS_SECRET: is no object"),
        ({"keys": [{"sha256": "0" * 64}]}, 'keys[0] in the secret of API_KEYS_SECRET: "name" is not'),
        ({"keys": [{"name": "a#b", "sha256": "0" * 64}]}, '"name" is not 1 to 64 characters'),
        ({"keys": [{"name": "a", "sha256": "ft-plain"}]}, "\"sha256\" of 'a' is not 64 hexadecimal digits"),
        ({"keys": [entry("a", expires="soon")]}, "\"expires\" of 'a' is no time"),
        ({"keys": [entry("a"), entry("b", "a")]}, "two keys in the secret of API_KEYS_SECRET are called 'a'"),
    ],
)
def test_every_fault_of_a_secret_is_named(secret: Any, fault: str) -> None:
    """And what was taken for a hash is not shown: it may be a key."""
    with pytest.raises(BadSettings) as refused:
        parse(secret if isinstance(secret, str) else json.dumps(secret))
    assert fault in str(refused.value)
    assert "ft-plain" not in str(refused.value)
