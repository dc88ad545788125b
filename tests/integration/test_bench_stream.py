"""`make bench-stream` in small: its paths, its line, and what it makes of what it heard."""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest

from bench import stream
from bench.stream import Heard
from tests.servers import ROOT


def test_a_rate_is_that_between_the_first_token_and_the_last() -> None:
    """What comes before the first is another figure."""
    assert Heard([5.0, 5.1, 5.1, 5.4]).per_s == pytest.approx(7.5)


def test_a_mean_is_of_what_was_observed_in_between() -> None:
    """In milliseconds."""
    assert stream.mean_ms((1.0, 10.0), (1.5, 20.0)) == pytest.approx(50.0)


async def test_the_line_delays_each_way_and_keeps_the_order() -> None:
    """What is sent together arrives together, however much it is."""
    server = await asyncio.start_server(_echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    line = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.link", "127.0.0.1", str(port), "40"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert line.stdout is not None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(await line.stdout.readline()))
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        sent = bytes(range(256)) * 4096
        writer.write(sent)
        writer.write_eof()
        assert await reader.read(1) == sent[:1]
        assert loop.time() - begun_s >= 0.08
        assert sent[1:] == await reader.read()
        writer.close()
        await writer.wait_closed()
    finally:
        line.kill()
        await line.wait()
        await line.stdout.read()
        server.close()
        await server.wait_closed()


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


def carried_out(name: str, *more: str) -> tuple[list[str], dict[str, Any]]:
    """What the benchmark `name` prints, and its last line, for few tokens in one round."""
    small = ("--rounds", "1", "--tokens", "20", "--requests", "2")
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{name}", *small, *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    *table, line = done.stdout.splitlines()
    return table, json.loads(line)


def test_the_benchmark_runs_and_ends_with_its_line() -> None:
    """Real gateways, the real SDK, the real engine; no word on how fast they are."""
    table, found = carried_out("stream", "--round-trip-ms", "2")
    assert {"kept", "added_ttft_ms", "kept_per_token"} <= found.keys()
    assert found["round_trip_ms"] == 2
    assert any("a token a post" in row for row in table)


def test_the_defaults_are_those_of_the_page() -> None:
    """Five rounds of 200 tokens/s at 30 ms."""
    options: argparse.Namespace = stream.parser({}).parse_args([])
    assert (options.rounds, options.tokens_per_s, options.round_trip_ms) == (5, 200.0, 30.0)
