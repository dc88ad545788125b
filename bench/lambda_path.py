"""`make bench-lambda`: what Lambda's way costs a stream, beside plain HTTP to the same worker.

The way is that of the tests: a REST API that streams and the Runtime API, both imitated in one process of
Python (`tests/lambda_doors.py`), whose own work is in the figures. Three parts: a stream of 200 tokens/s,
token by token; one as fast as it goes; and the time to first token of a real model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import aiohttp

from bench.overhead import describe_machine, describe_versions
from bench.stream import Heard, ask, carry_out, common_parser, first_tokens
from judge.servers import KEY, Server, free_port, start

PATHS = {"http": "worker, over HTTP", "lambda": "through Lambda"}
AS_FAST_AS_IT_GOES = 1e9
"""Tokens/s of an engine that does not wait."""
PACED, REAL = ("-m", "bench.paced", "worker"), ("-m", "handler")


def delays_ms(heard: Heard, tokens_per_s: float) -> list[float]:
    """How long after it was made each token came; the first is made when it is asked for."""
    return [1e3 * (at_s - number / tokens_per_s) for number, at_s in enumerate(heard.at_s)]


def per_s(heard: Heard) -> float:
    """Tokens per second from the request to the last."""
    return len(heard.at_s) / heard.at_s[-1]


@contextmanager
def paths(worker: Sequence[str], environ: Mapping[str, str], logs: Path) -> Iterator[dict[str, Server]]:
    """The same worker twice: on a port, and as a function behind a REST API."""
    port = free_port()
    command = [sys.executable, *worker]
    own = {**environ, "PLATFORM": "http", "HOST": "127.0.0.1", "PORT": str(port)}
    direct = start(command, own, f"http://127.0.0.1:{port}", "/ready", KEY, logs / "http.log")
    with direct, function(command, environ, logs / "lambda.log") as through:
        yield {"http": direct, "lambda": through}


@contextmanager
def function(command: Sequence[str], environ: Mapping[str, str], log: Path) -> Iterator[Server]:
    """`command` as a function, ready. Raises `RuntimeError`, which names the log, if it does not start."""
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.lambda_doors", *command],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            process_group=0,
        )
    assert process.stdout is not None, "piped"
    with Server(process, "", KEY, log) as server, process.stdout as said:
        try:
            server.root = json.loads(said.readline())["rest"].removesuffix("/v1")
        except (ValueError, KeyError):
            raise RuntimeError(f"the function did not start, see {log}") from None
        yield server


async def streams(servers: Mapping[str, Server], tokens: int, rounds: int) -> dict[str, list[Heard]]:
    """Each path's streams, one a round, in turn and every other round backwards."""
    heard: dict[str, list[Heard]] = {name: [] for name in servers}
    async with aiohttp.ClientSession() as http:
        for server in servers.values():
            await ask(http, server, 2, "paced")  # a first request opens connections
        for round_ in range(rounds):
            for name in list(servers)[:: -1 if round_ % 2 else 1]:
                heard[name].append(await ask(http, servers[name], tokens, "paced"))
    return heard


async def measure(options: argparse.Namespace, environ: Mapping[str, str], logs: Path) -> dict[str, object]:
    """All parts: the tables are printed, the line of JSON is returned."""
    common = {**environ, "API_KEY": KEY, "MODEL_NAME": "paced"}
    with paths(PACED, {**common, "PACE_TOKENS_PER_S": str(options.tokens_per_s)}, logs) as servers:
        heard = await streams(servers, options.tokens, options.rounds)
    delays = {name: [delays_ms(one, options.tokens_per_s) for one in found] for name, found in heard.items()}
    first_ms = {name: median(one[0] for one in found) for name, found in delays.items()}
    token_ms = {name: median(median(one[1:]) for one in found) for name, found in delays.items()}
    late_ms = {name: median(max(one) for one in found) for name, found in delays.items()}
    print(f"\na stream of {options.tokens} tokens at {options.tokens_per_s:g}/s: how late a token comes, ms")
    print(f"  {'':<22}{'first':>10}{'median':>10}{'latest':>10}")
    for name, label in PATHS.items():
        print(f"  {label:<22}{first_ms[name]:>10.2f}{token_ms[name]:>10.2f}{late_ms[name]:>10.2f}")

    with paths(PACED, {**common, "PACE_TOKENS_PER_S": str(AS_FAST_AS_IT_GOES)}, logs) as servers:
        heard = await streams(servers, options.fast_tokens, options.rounds)
    speed = {name: median(map(per_s, found)) for name, found in heard.items()}
    print(f"\na stream of {options.fast_tokens} tokens as fast as it goes, tokens/s")
    for name, label in PATHS.items():
        speeds = sorted(map(per_s, heard[name]))
        print(f"  {label:<22}{speed[name]:>10.0f}   {speeds[0]:.0f} - {speeds[-1]:.0f}")

    model = {"MODEL_NAME": options.model, "SERVED_MODEL_NAME": "bench", "MAX_MODEL_LEN": "1024"}
    with paths(REAL, {**common, **model}, logs) as servers:
        found = await first_tokens(servers, options, "bench")
    ttft_ms = {name: 1e3 * median(median(one) for one in rounds) for name, rounds in found.items()}
    print(f"\ntime to first token of {Path(options.model).name}, ms")
    for name, label in PATHS.items():
        print(f"  {label:<22}{ttft_ms[name]:>10.1f}")
    print()
    return {
        "added_ttft_ms": round(ttft_ms["lambda"] - ttft_ms["http"], 2),
        "added_first_ms": round(first_ms["lambda"] - first_ms["http"], 2),
        "added_token_ms": round(token_ms["lambda"] - token_ms["http"], 2),
        "tokens_ratio": round(speed["lambda"] / speed["http"], 3),
        "ttft_ms": {name: round(value, 2) for name, value in ttft_ms.items()},
        "first_ms": {name: round(value, 2) for name, value in first_ms.items()},
        "token_ms": {name: round(value, 2) for name, value in token_ms.items()},
        "latest_ms": {name: round(value, 2) for name, value in late_ms.items()},
        "tokens_per_s": {name: round(value) for name, value in speed.items()},
        "rounds": options.rounds,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    """The command line."""
    command = common_parser(environ, "lambda_path", __doc__)
    command.add_argument("--fast-tokens", type=int, default=5000, help="of each stream that does not wait")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    return carry_out(measure, parser(os.environ).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
