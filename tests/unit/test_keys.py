"""The gateway's keys: who comes in, and what they may ask."""

from __future__ import annotations

import pytest

from gateway.accounts.keys import ENV_ID, OWNER_ID, Key, Keys
from handler.auth import digest
from handler.errors import Unauthorized
from handler.messages import Request


def bearing(authorization: str) -> Request:
    """A request with that `authorization`."""
    return Request("GET", "/v1/models", (("authorization", authorization),))


def key(secret: str, **more: object) -> Key:
    """A key as it is stored."""
    return Key(f"key_{secret}", secret, digest(secret), **more)  # type: ignore[arg-type]


def test_given_key_opens_and_is_an_admins() -> None:
    """A key from the environment is known by its id and kept as a hash only."""
    keys = Keys("secret")
    found = keys.check(bearing("Bearer secret"))
    assert (found.id, found.admin) == (ENV_ID, True)
    assert keys.of(ENV_ID) is found
    assert "secret" not in repr((keys, vars(keys)))
    assert keys.used_s == {}


def test_the_owner_is_known_and_has_no_key() -> None:
    """What came through the owner's door is its own later too, and no request bears what opens for it."""
    keys = Keys("secret", [key("a")])
    owner = keys.of(OWNER_ID)
    assert (owner.name, owner.admin, owner.opens(0)) == ("this machine", True, True)
    for authorization in ("Bearer ", "", f"Bearer {OWNER_ID}"):
        with pytest.raises(Unauthorized):
            keys.check(bearing(authorization))


def test_stored_keys_open_beside_it_until_others_take_their_place() -> None:
    """And when each was used is known."""
    keys = Keys("secret", [key("a"), key("b")], clock=lambda: 7.5)
    assert keys.check(bearing("Bearer a")).name == "a"
    assert keys.used_s == {"key_a": 7}
    keys.store([key("b")])
    with pytest.raises(Unauthorized):
        keys.check(bearing("Bearer a"))
    assert keys.check(bearing("Bearer b")).name == "b"
    assert keys.check(bearing("Bearer secret")).id == ENV_ID


def test_a_key_opens_until_it_expires_or_is_revoked() -> None:
    """It is known by its id all the same: what was asked with it is still its own."""
    now_s = 100.0
    keys = Keys(None, [key("a", expires_s=101), key("b", revoked_s=50)], clock=lambda: now_s)
    assert keys.check(bearing("Bearer a")).id == "key_a"
    now_s = 101.0
    for secret in "ab":
        with pytest.raises(Unauthorized):
            keys.check(bearing(f"Bearer {secret}"))
        assert not keys.of(f"key_{secret}").opens(now_s)
    assert keys.closed() == ["key_a", "key_b"]


def test_who_wants_to_hears_that_the_keys_have_changed() -> None:
    """Once they are known."""
    keys = Keys(None, [key("a")])
    heard: list[str] = []
    keys.heard.append(lambda: heard.extend(keys.closed()))
    keys.store([key("a", revoked_s=1)])
    assert heard == ["key_a"]


@pytest.mark.parametrize("authorization", ["Bearer wrong", "Basic secret", "secret", "Bearer ", ""])
def test_anything_else_is_refused(authorization: str) -> None:
    """Only `Authorization: Bearer KEY` opens."""
    with pytest.raises(Unauthorized):
        Keys("secret", [key("a")]).check(bearing(authorization))


@pytest.mark.parametrize("authorization", ["Bearer secret", "Bearer ", "", "Bearer None"])
def test_without_a_key_nobody_comes_in(authorization: str) -> None:
    """A gateway whose keys are not read yet is shut; who had `API_KEY` once is still known by its id."""
    keys = Keys()
    with pytest.raises(Unauthorized):
        keys.check(bearing(authorization))
    assert not keys.of(ENV_ID).opens(0)


def test_a_key_is_there_for_what_it_names() -> None:
    """None is everything, and a set no more than it holds."""
    everything, some = key("a"), key("b", endpoints=frozenset({"one"}), models=frozenset({"m"}))
    assert (everything.may_use("x"), everything.may_ask("x")) == (True, True)
    assert (some.may_use("one"), some.may_use("two")) == (True, False)
    assert (some.may_ask("m"), some.may_ask("M"), some.may_ask("")) == (True, False, False)
