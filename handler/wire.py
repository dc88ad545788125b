"""The frames of a link: many requests on one connection between a gateway and a worker of its own machine.

With HTTP/1.1 each request has a connection, so each token costs either side a call of the kernel and a
wake-up. On a link all that is said in one turn of a loop goes out in one piece, whomever it is for.

A frame is its kind (1 byte), the number of its request (4), the length of what follows (4), and that. The
gateway connects to the socket on which the worker speaks HTTP, opens with `PREFACE`, and says

    ASK     {"method", "path", "query_string", "headers", "body_bytes"} in JSON; the body follows
    BODY    a piece of it
    LEAVE   nobody wants the answer any more
    PAUSE   whoever reads it is slow: say no more for now
    RESUME  go on

to which the worker answers

    HEAD    {"status", "headers"} in JSON
    DATA    a chunk of the answer: of an event stream whole frames (`handler.messages.Reply`)
    END     that was all of it
    CUT     it breaks off here

Numbers are given by the gateway, each in turn. What is said of one that is over is not heard: it has crossed
the news of that.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from abc import ABC, abstractmethod

PREFACE = b"firsttoken-link/1\n"
"""The first that is written to a unix socket in which nothing is: so it comes in one piece."""

ASK, BODY, LEAVE, PAUSE, RESUME, HEAD, DATA, END, CUT = range(1, 10)

PIECE_BYTES = 64 * 1024
"""What is larger, and can be, is cut into pieces of that size, between which others have their say."""

NUMBER_MAX = 2**32 - 1

_FRAME = struct.Struct("!BII")
_pack, _unpack, _SIZE = _FRAME.pack, _FRAME.unpack_from, _FRAME.size

log = logging.getLogger(__name__)


class Wire(asyncio.Protocol, ABC):
    """One end of a link; the other is `peer`, for a person to read."""

    transport: asyncio.Transport

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._parts: list[bytes] = []
        """Read, and no whole frame yet."""
        self._missing = _SIZE
        """How many bytes more make one, at least."""
        self.room = asyncio.Event()
        """Set while the other end reads as fast as it is written to, and once it is gone."""
        self.room.set()

    @abstractmethod
    def took(self, kind: int, number: int, payload: bytes) -> None:
        """The other end has said this of the request `number`."""

    def put(self, kind: int, number: int, payload: bytes = b"") -> None:
        """Say this of the request `number`, with all else that is said in this turn of the loop."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out += (_pack(kind, number, len(payload)), payload)
        self._out_bytes += len(payload)
        if self._out_bytes > PIECE_BYTES:  # so that who says much in one turn sees when it is too much
            self._flush()

    def _flush(self) -> None:
        out, self._out, self._out_bytes = self._out, [], 0
        if out and not self.transport.is_closing():
            self.transport.write(b"".join(out))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """End."""
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """Take what was read, each whole frame by itself."""
        if self._parts:
            self._parts.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return
            data = b"".join(self._parts)
            self._parts.clear()
        at, size, took = 0, len(data), self.took
        while True:
            begin = at + _SIZE
            if begin > size:
                self._missing = begin - size
                break
            kind, number, length = _unpack(data, at)
            end = begin + length
            if not ASK <= kind <= CUT:
                log.error("what came on a link is no frame", extra={"peer": self._peer})
                self.transport.abort()
                return
            if end > size:
                self._missing = end - size
                break
            took(kind, number, data[begin:end])
            at = end
        if at < size:
            self._parts.append(data[at:])

    def pause_writing(self) -> None:
        """The other end does not read as fast as it is written to."""
        self.room.clear()

    def resume_writing(self) -> None:
        """It does."""
        self.room.set()
