"""`handler.auth`: who bears a key gets in, and nobody else."""

from __future__ import annotations

import pytest

from handler import auth
from handler.auth import Keyring
from handler.errors import Unauthorized
from handler.messages import Headers, Request

RING = Keyring.of("first-key", "second-key")


def request(*headers: tuple[str, str]) -> Request:
    """A request with `headers`."""
    return Request("GET", "/v1/models", headers)


@pytest.mark.parametrize(
    "headers",
    [
        (("authorization", "Bearer first-key"),),
        (("authorization", "Bearer second-key"),),
        (("authorization", "bearer first-key"),),
        (("authorization", "BEARER   first-key "),),
        (("x-api-key", "first-key"),),
        (("x-api-key", "wrong"), ("authorization", "Bearer first-key")),
    ],
)
def test_a_known_key_opens(headers: Headers) -> None:
    """The scheme is case-insensitive, and `x-api-key` counts where there is no `Authorization`."""
    RING.check(request(*headers))


@pytest.mark.parametrize(
    "headers",
    [
        (("authorization", "Bearer third-key"),),
        (("authorization", "Bearer first-key second-key"),),
        (("authorization", "Bearer First-Key"),),
        (("authorization", "Bearer first-ke"),),
        (("authorization", "Bearer first-key\u00e9"),),
        (("x-api-key", "third-key"),),
        (("authorization", "Bearer wrong"), ("x-api-key", "first-key")),
        (("authorization", "Bearer wrong"), ("authorization", "Bearer first-key")),
    ],
)
def test_a_wrong_key_does_not(headers: Headers) -> None:
    """Only the whole key counts, and a wrong one is not made up for by another header."""
    with pytest.raises(Unauthorized) as refused:
        RING.check(request(*headers))
    assert refused.value.message == "Incorrect API key provided."


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer "),),
        (("authorization", "first-key"),),
        (("authorization", "Basic first-key"),),
        (("authorization", "Bearerfirst-key"),),
        (("authorization", "Basic x"), ("x-api-key", "first-key")),
        (("x-api-key", " "),),
        (("api-key", "first-key"),),
        (("cookie", "authorization=Bearer first-key"),),
    ],
)
def test_no_key_does_not(headers: Headers) -> None:
    """What is no key in the right place is told how to give one."""
    with pytest.raises(Unauthorized) as refused:
        RING.check(request(*headers))
    assert refused.value.message == (
        "You didn't provide an API key. Provide it as 'Authorization: Bearer YOUR_KEY'."
    )


def test_an_empty_ring_opens_to_nobody() -> None:
    """A mistake in the configuration shuts the door."""
    for headers in ((("authorization", "Bearer x"),), ()):
        with pytest.raises(Unauthorized):
            Keyring.of().check(request(*headers))


def test_a_ring_does_not_hold_its_keys() -> None:
    """Neither a dump of memory's objects nor a log of them shows one."""
    ring = Keyring.of("first-key")
    assert "first-key" not in repr(vars(ring))
    assert "first-key" not in repr(ring)


def test_generated_keys_differ_and_open() -> None:
    """A key is 256 random bits behind a prefix that scanners can look for."""
    one, other = auth.generate(), auth.generate()
    assert one != other
    assert one.startswith("ft-")
    assert len(one) == 3 + 43
    Keyring.of(one).check(request(("authorization", f"Bearer {one}")))
