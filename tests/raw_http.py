"""HTTP byte by byte, on connections whose beginning and end a test sees."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol


class Served(Protocol):
    """What can be connected to."""

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to it."""


async def ask(
    served: Served, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one request on a connection of its own."""
    reader, writer = await served.connect()
    try:
        writer.write(
            head(method, path, {**(headers or {}), "content-length": str(len(body)), "connection": "close"})
        )
        writer.write(body)
        status, got = await read_head(reader)
        raw = await reader.read()
    finally:
        writer.close()
    return status, got, dechunked(raw) if got.get("transfer-encoding") == "chunked" else raw


def head(method: str, path: str, headers: Mapping[str, str]) -> bytes:
    """The first lines of a request."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "host: worker",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    return int(first.split()[1]), {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
    }


def dechunked(raw: bytes) -> bytes:
    """A chunked body without its frames."""
    body = b""
    while raw:
        size, _, rest = raw.partition(b"\r\n")
        body += rest[: int(size, 16)]
        raw = rest[int(size, 16) + 2 :]
    return body
