"""Sends a `Request` to an HTTP server, and its answer back as it comes."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import quote

import aiohttp
from yarl import URL

from gateway.counted import Inside
from gateway.upstreams import WorkerLost
from handler import sse
from handler.errors import UpstreamFailed
from handler.messages import Headers, Reply, Request, without

CONNECT_TIMEOUT_S = 5.0
KEEP_ALIVE_S = 30.0
"""Idle connections are closed by us before the worker does (75 s), so that none is reused too late."""
LARGE_BODY_BYTES = 512 * 1024

_HOP_BY_HOP = (
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"),
    *("te", "trailer", "transfer-encoding", "upgrade"),
)
_NOT_FOR_THE_WORKER = frozenset(
    {
        *_HOP_BY_HOP,
        *("host", "content-length", "expect", "accept-encoding", "origin"),
        *("authorization", "cookie", "api-key", "x-api-key"),
    }
)
_NOT_FOR_THE_CLIENT = frozenset({*_HOP_BY_HOP, "date", "server"})


def for_worker(headers: Headers) -> Headers:
    """What of a client's `headers` a worker gets."""
    return without(headers, _NOT_FOR_THE_WORKER)


def for_client(headers: Headers) -> Headers:
    """What of a worker's `headers` a client gets."""
    return without(headers, _NOT_FOR_THE_CLIENT)


class Refused(WorkerLost):
    """Nothing listens there: the worker is dead or takes no more."""


class Proxy:
    """Asks the HTTP server at `base`, a URL without a path, with `headers` on each request.

    It may be another machine, or many behind one address. Each request has a connection of its own: what
    balances connections (a Kubernetes service) spreads requests then, and a new worker gets its share at
    once. TLS is worth keeping: who ends it sees requests.

    Leaving a reply closes its connection at once, which is how the worker learns that its client has gone.
    Raises `WorkerLost` while nothing was answered, and `UpstreamFailed` from the frames when the answer is
    cut off.
    """

    def __init__(self, base: str, headers: Headers = ()) -> None:
        self._base = base
        self._headers = headers
        if base.startswith("https:"):
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        else:
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("accept", "accept-encoding", "content-type", "user-agent"),
        )
        self._inside = Inside()

    @asynccontextmanager
    async def call(self, request: Request) -> AsyncIterator[Reply]:
        """Answer `request`; leaving the reply closes its connection."""
        with self._inside:
            response, begun = await self._open(request)
            try:
                yield _reply(response, begun)
            finally:
                response.close()

    async def _open(self, request: Request) -> tuple[aiohttp.ClientResponse, bytes]:
        """The response and the first bytes of its body: until then another worker may be asked."""
        try:
            response = await self._session.request(
                request.method,
                self._url(request),
                data=_payload(request.body),
                headers=(*for_worker(request.headers), *self._headers),
                allow_redirects=False,
            )
        except aiohttp.ClientConnectorError as error:
            raise Refused("The worker could not be reached.") from error
        except (aiohttp.ClientError, OSError) as error:
            raise WorkerLost("The worker went away before it answered.") from error
        try:
            return response, await response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            response.close()
            raise WorkerLost("The worker went away before it answered.") from error
        except asyncio.CancelledError:
            response.close()
            raise

    def _url(self, request: Request) -> URL:
        # Encoded here and not by yarl, which would resolve `..`: what the allow-list saw is what is asked.
        query = "?" + request.query if request.query else ""
        return URL(f"{self._base}{quote(request.path)}{query}", encoded=True)

    async def close(self) -> None:
        """Wait for what is in flight to end, then close every connection."""
        try:
            await self._inside.empty()
        finally:
            await self._session.close()


def _payload(body: bytes) -> bytes | io.BytesIO | None:
    # aiohttp warns of large `bytes`, which it would write in one go.
    return (body or None) if len(body) < LARGE_BODY_BYTES else io.BytesIO(body)


def _reply(response: aiohttp.ClientResponse, begun: bytes) -> Reply:
    headers: Headers = tuple(
        (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in response.raw_headers
    )
    chunks = _chunks(begun, response.content)
    reply = Reply(response.status, for_client(headers), chunks)
    return Reply(reply.status, reply.headers, sse.frames(chunks)) if reply.streams else reply


async def _chunks(begun: bytes, rest: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    try:
        while begun:
            yield begun
            begun = await rest.readany()
    except (aiohttp.ClientError, OSError) as error:
        raise UpstreamFailed("The worker went away while it answered.") from error
