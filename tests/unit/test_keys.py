"""The gateway's key."""

from __future__ import annotations

import pytest

from gateway.keys import Keys
from handler.errors import Unauthorized
from handler.messages import Request


def bearing(authorization: str) -> Request:
    """A request with that `authorization`."""
    return Request("GET", "/v1/models", (("authorization", authorization),))


def test_given_key_opens_and_is_never_shown() -> None:
    """A key from the environment is known to the user: it is kept as a hash only."""
    keys = Keys.open("secret")
    keys.ring.check(bearing("Bearer secret"))
    assert keys.shown is None
    assert "secret" not in repr(keys)


def test_generated_key_opens_and_is_shown() -> None:
    """Without a key one is made, 256 random bits, and that one opens."""
    keys = Keys.open(None)
    assert keys.shown is not None
    assert (keys.shown[:3], len(keys.shown)) == ("ft-", 46)
    keys.ring.check(bearing(f"Bearer {keys.shown}"))
    assert keys.shown not in repr(keys)


def test_every_generated_key_is_another() -> None:
    """Two gateways don't share a key."""
    assert Keys.open(None).shown != Keys.open(None).shown


@pytest.mark.parametrize("authorization", ["Bearer wrong", "Basic secret", "secret", "Bearer ", ""])
def test_anything_else_is_refused(authorization: str) -> None:
    """Only `Authorization: Bearer KEY` opens."""
    with pytest.raises(Unauthorized):
        Keys.open("secret").ring.check(bearing(authorization))
