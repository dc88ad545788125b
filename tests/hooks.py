"""A server of somebody's, to which webhooks are sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web


class Hooks:
    """A server that webhooks are sent to: it answers with the next of `statuses`, 200 after them."""

    def __init__(self, *statuses: int) -> None:
        self._statuses = list(statuses)
        self.got: list[tuple[str, bytes]] = []
        self.headers: list[dict[str, str]] = []
        self.hang = False
        self._news = asyncio.Condition()
        self.port = 0

    async def came(self, count: int) -> None:
        """Return once so many have come."""
        async with self._news:
            await self._news.wait_for(lambda: len(self.got) >= count)

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        async with self._news:
            self.got.append((request.path, body))
            self.headers.append({name.lower(): value for name, value in request.headers.items()})
            self._news.notify_all()
        if self.hang:
            await asyncio.Event().wait()
        status = self._statuses.pop(0) if self._statuses else 200
        return web.Response(status=status, headers={"location": "/elsewhere"} if status == 302 else {})

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Hooks]:
        """On a port of the loopback, for as long as the block runs."""
        app = web.Application(client_max_size=1 << 28)
        app.add_routes([web.route("*", "/{path:.*}", self._answer)])
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            await runner.cleanup()
