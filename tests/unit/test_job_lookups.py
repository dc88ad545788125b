"""Names are resolved apart from everything else that blocks."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from aiohttp.abc import ResolveResult

from gateway.jobs.lookups import Lookups


class Hanging:
    """Servers of names that answer nothing for "dead" until the test lets them."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers = threading.Event()

    def find(self, host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
        """What they say, in a thread."""
        self.asked.append(host)
        if host == "dead":
            self.answers.wait()
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return [ResolveResult(hostname=host, host="10.0.0.1", port=port, family=family, proto=0, flags=0)]


async def test_a_name_that_hangs_has_one_thread() -> None:
    """Whoever gives up and comes again waits for the same answer; other names are not held up."""
    servers = Hanging()
    lookups = Lookups(servers.find)
    try:
        for _ in range(100):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await lookups.resolve("dead")
        assert [one["host"] for one in await lookups.resolve("alive", 80)] == ["10.0.0.1"]
        last = asyncio.create_task(lookups.resolve("dead"))
        await asyncio.sleep(0)
        servers.answers.set()
        with pytest.raises(socket.gaierror):
            await last
        assert sorted(servers.asked) == ["alive", "dead"]
        with pytest.raises(socket.gaierror):
            await lookups.resolve("dead")  # asked anew
        assert sorted(servers.asked) == ["alive", "dead", "dead"]
    finally:
        servers.answers.set()
        await lookups.close()


async def test_names_take_no_thread_of_others() -> None:
    """The one that files are written in is busy: names are resolved all the same."""
    busy = threading.Event()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    writing = asyncio.create_task(asyncio.to_thread(busy.wait))
    lookups = Lookups()
    try:
        assert {one["host"] for one in await lookups.resolve("localhost", 80)} == {"127.0.0.1"}
        assert not writing.done()
    finally:
        busy.set()
        await writing
        await lookups.close()
