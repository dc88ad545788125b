"""A reverse proxy that does nothing else, in Python: `python -m bench.plain_proxy PORT SOCKET`.

What aiohttp costs by itself, for whoever wonders what of a gateway's way is its own.
"""

from __future__ import annotations

import sys

import aiohttp
import uvloop
from aiohttp import web


def application(socket: str) -> web.Application:
    """Passes every request on to the unix socket, and its answer back as it comes."""

    async def forward(request: web.Request) -> web.StreamResponse:
        session: aiohttp.ClientSession = request.app[SESSION]
        async with session.request(
            request.method,
            f"http://worker{request.rel_url}",
            data=await request.read(),
            headers={"content-type": request.content_type},
        ) as answer:
            reply = web.StreamResponse(
                status=answer.status, headers={"content-type": answer.headers["content-type"]}
            )
            await reply.prepare(request)
            async for chunk in answer.content.iter_any():
                await reply.write(chunk)
            await reply.write_eof()
            return reply

    async def opened(app: web.Application) -> None:
        app[SESSION] = aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket, limit=0))

    async def closed(app: web.Application) -> None:
        await app[SESSION].close()

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", forward)
    app.on_startup.append(opened)
    app.on_cleanup.append(closed)
    return app


SESSION = web.AppKey("session", aiohttp.ClientSession)

if __name__ == "__main__":
    uvloop.install()
    web.run_app(
        application(sys.argv[2]), host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None
    )
