"""Webhooks lead to the internet, unless the settings say otherwise."""

from __future__ import annotations

import pytest

from gateway.jobs.destinations import Allowed, Guard, checked
from handler.errors import BadRequest
from tests.job_endpoints import Names


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.1.2.3", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
        *("2002:7f00:1::", "2002:a00:1::", "::127.0.0.1"),
    ],
)
def test_an_address_that_is_not_the_internets_is_refused(address: str) -> None:
    """In whatever way it is written."""
    assert not Allowed().address(address)


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::5db8:d70e"]
)
def test_an_address_of_the_internet_is_not(address: str) -> None:
    """IPv4 through NAT64 neither."""
    assert Allowed().address(address)


def test_what_is_allowed_is_told_by_name_address_or_network() -> None:
    """And nothing else with it."""
    allowed = Allowed.of(["Hooks.Local", "10.0.0.0/8", "127.0.0.1"])
    assert (allowed.host("hooks.local"), allowed.host("hooks.local."), allowed.host("x.hooks.local")) == (
        True,
        True,
        False,
    )
    assert [allowed.address(one) for one in ("10.9.9.9", "127.0.0.1", "127.0.0.2", "192.168.0.1")] == [
        True,
        True,
        False,
        False,
    ]
    assert checked("http://127.0.0.1:8000/x", allowed) == "http://127.0.0.1:8000/x"
    with pytest.raises(BadRequest, match="WEBHOOK_HOSTS"):
        checked("http://127.0.0.2:8000/x", allowed)
    for path in ("\r\nx: y", "\0", "\ud800"):
        with pytest.raises(BadRequest, match="printable"):
            checked(f"http://hooks.local/{path}", allowed)


async def test_a_name_is_what_it_is_resolved_to() -> None:
    """Of several addresses those of the internet are connected to, of none nothing is."""
    names = Names(good=["93.184.215.14"], mixed=["10.0.0.1", "93.184.215.14"], bad=["10.0.0.1"])
    guard = Guard(Allowed(), names)
    assert [one["host"] for one in await guard.resolve("good")] == ["93.184.215.14"]
    assert [one["host"] for one in await guard.resolve("mixed")] == ["93.184.215.14"]
    with pytest.raises(OSError, match="bad leads to no address of the internet"):
        await guard.resolve("bad")
    assert [one["host"] for one in await Guard(Allowed.of(["bad"]), names).resolve("bad")] == ["10.0.0.1"]
