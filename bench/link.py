"""A line to a server that takes its time: `python -m bench.link HOST PORT DELAY_MS` prints its own port.

What is sent into it comes out `DELAY_MS` later, each way, in order and however much it is: a round
trip takes twice as long and nothing else is slower.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from functools import partial

READ_BYTES = 1 << 16


async def serve(host: str, port: int, delay_s: float) -> None:
    """Pass connections on for ever, once the port is printed."""
    server = await asyncio.start_server(partial(_connect, host, port, delay_s), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _connect(
    host: str, port: int, delay_s: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    there, out = await asyncio.open_connection(host, port)
    try:
        with suppress(OSError):
            await asyncio.gather(_pass(reader, out, delay_s), _pass(there, writer, delay_s))
    finally:
        out.close()
        writer.close()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    loop = asyncio.get_running_loop()
    while data := await reader.read(READ_BYTES):
        loop.call_later(delay_s, writer.write, data)
    await asyncio.sleep(delay_s)
    writer.write_eof()  # one way has ended, the other may go on


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) / 1000))
