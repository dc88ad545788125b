"""Names of hosts, resolved in threads that nothing else waits for."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from aiohttp.abc import AbstractResolver, ResolveResult

AT_ONCE = 32
"""Names that are resolved at the same time. One whose servers are dead takes half a minute."""


def look_up(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    """The addresses of `host`, as this machine knows them. Raises `OSError`."""
    found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return [
        ResolveResult(
            hostname=host,
            host=str(address[0]),
            port=port,
            family=family,
            proto=proto,
            flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
        )
        for family, _, proto, _, address in found
    ]


class Lookups(AbstractResolver):
    """Resolves names with `find`, which may block: each once at a time, however many ask for it.

    So a name that hangs has one thread, and not one for everybody who has given up on it.
    """

    def __init__(self, find: Callable[..., list[ResolveResult]] = look_up) -> None:
        self._find = find
        self._threads = ThreadPoolExecutor(AT_ONCE, "webhook-names")
        self._running: dict[object, asyncio.Future[list[ResolveResult]]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of `host`. Raises `OSError`."""
        asked = (host, port, family)
        running = self._running.get(asked)
        if running is None:
            loop = asyncio.get_running_loop()
            running = loop.run_in_executor(self._threads, self._find, *asked)
            self._running[asked] = running
            running.add_done_callback(partial(self._over, asked))
        return await asyncio.shield(running)

    def _over(self, asked: object, running: asyncio.Future[list[ResolveResult]]) -> None:
        del self._running[asked]
        if not running.cancelled():
            running.exception()  # whoever asked may have given up: nobody else looks at it

    async def close(self) -> None:
        """Wait for no name any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
