"""Where webhooks may lead: to the internet, and not to this machine or its network.

The URLs are strangers'. What one says is looked at when it is given, and the addresses of its name each time
that it is resolved to be connected to.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from handler.errors import BadRequest

URL_MAX_CHARS = 2048
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class Allowed:
    """Where webhooks may lead besides the internet: `names` of hosts, and `networks`."""

    names: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()

    @classmethod
    def of(cls, hosts: Sequence[str]) -> Allowed:
        """What WEBHOOK_HOSTS allows: names, addresses and networks such as `10.0.0.0/8`."""
        names, networks = set(), []
        for host in hosts:
            try:
                networks.append(ipaddress.ip_network(host, strict=False))
            except ValueError:
                names.add(host.lower())
        return cls(frozenset(names), tuple(networks))

    def host(self, name: str) -> bool:
        """Whether the host `name` may lead anywhere, this machine's network included."""
        return name.lower().rstrip(".") in self.names

    def address(self, text: str) -> bool:
        """Whether the address `text` may be connected to."""
        address = ipaddress.ip_address(text.partition("%")[0])
        inner = _inside(address)
        if any(inner in network for network in self.networks):
            return True
        return inner.is_global and not inner.is_multicast and not inner.is_reserved


def _inside(address: Address) -> Address:
    """The IPv4 address that an IPv6 one leads to, where it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None) or address


def checked(url: object, allowed: Allowed) -> str:
    """`url`, if webhooks may be sent there as far as it says. Raises `BadRequest`."""
    if not isinstance(url, str) or len(url) > URL_MAX_CHARS or not url.isprintable():
        why = f'"webhook" is a URL of at most {URL_MAX_CHARS} printable characters.'
        raise BadRequest(why, param="webhook")
    try:
        parsed = URL(url)
        host = parsed.host
    except ValueError:
        host = None
    if not host or parsed.scheme not in {"http", "https"}:
        raise BadRequest('"webhook" is a URL that begins with https:// or http://.', param="webhook")
    if not allowed.host(host) and is_address(host) and not allowed.address(host):
        raise BadRequest(
            f'"webhook" leads to {host}, which is no address of the internet. WEBHOOK_HOSTS can allow it.',
            param="webhook",
        )
    return url


def is_address(host: str) -> bool:
    """Whether `host` is an address and no name."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


class Forbidden(OSError):
    """A name leads to addresses that webhooks may not be sent to."""


class Guard(AbstractResolver):
    """Resolves names as `inner` does, to what `allowed` lets be connected to."""

    def __init__(self, allowed: Allowed, inner: AbstractResolver) -> None:
        self._allowed = allowed
        self._inner = inner

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of `host`. Raises `Forbidden` if none may be connected to."""
        found = await self._inner.resolve(host, port, family)
        if self._allowed.host(host):
            return found
        kept = [result for result in found if self._allowed.address(result["host"])]
        if not kept:
            raise Forbidden(f"{host} leads to no address of the internet")
        return kept

    async def close(self) -> None:
        """Let go of what is held."""
        await self._inner.close()
