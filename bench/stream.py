"""`make bench-stream`: what RunPod's way costs a stream, and its first token.

Two parts, both against the gateway's control plane and the unmodified SDK. At a round trip of 30 ms:
a stream of 200 tokens/s straight from a worker, through our handler, and through one that posts each
token by itself. Without delay: the time to first token of a real model, asked over a socket and
through jobs. docs/benchmarks.md says what is measured and what came out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

from bench.load import BadAnswer
from bench.overhead import describe_machine, describe_versions
from bench.servers import NOT_OURS_TO_GIVE
from judge.servers import KEY, Server, free_port, start

GOALS = {"kept": 0.95}
_CONTENT = re.compile(rb'"content":"[^"]')


@dataclass(frozen=True, slots=True)
class Heard:
    """One answer as it came: seconds from its request to each token."""

    at_s: Sequence[float]

    @property
    def per_s(self) -> float:
        """Tokens per second from the first to the last."""
        return (len(self.at_s) - 1) / (self.at_s[-1] - self.at_s[0])


async def ask(http: aiohttp.ClientSession, server: Server, tokens: int, model: str) -> Heard:
    """One streamed chat of `tokens` tokens. Raises `RuntimeError` if it is not that."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Tell me about {random.random()}."}],  # noqa: S311
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    url, headers = f"{server.root}/v1/chat/completions", {"authorization": f"Bearer {server.key}"}
    begun_s = time.perf_counter()
    at_s: list[float] = []
    rest = b""
    async with http.post(url, json=body, headers=headers) as reply:
        async for part in reply.content.iter_any():
            *frames, rest = (rest + part).split(b"\n\n")
            now_s = time.perf_counter() - begun_s
            at_s += [now_s for frame in frames if _CONTENT.search(frame)]
        if reply.status != 200 or not at_s:
            raise RuntimeError(f"{reply.status}: {rest[-500:].decode(errors='replace')}")
    return Heard(at_s)


async def rates(servers: Mapping[str, Server], options: argparse.Namespace) -> dict[str, list[Heard]]:
    """Each path's streams, one a round, in turn and every other round backwards."""
    heard: dict[str, list[Heard]] = {name: [] for name in servers}
    async with aiohttp.ClientSession() as http:
        for server in servers.values():
            await ask(http, server, 2, "paced")  # a first request opens connections
        for round_ in range(options.rounds):
            for name in list(servers)[:: -1 if round_ % 2 else 1]:
                heard[name].append(await ask(http, servers[name], options.tokens, "paced"))
                print(f"round {round_ + 1}: {name}", file=sys.stderr, flush=True)
    return heard


async def first_tokens(
    servers: Mapping[str, Server], options: argparse.Namespace, model: str
) -> dict[str, list[list[float]]]:
    """Of each path the times to first token, a list a round; requests come at no regular time."""
    pauses = random.Random(0)  # noqa: S311
    heard: dict[str, list[list[float]]] = {name: [] for name in servers}
    async with aiohttp.ClientSession() as http:
        for server in servers.values():
            await ask(http, server, 1, model)
        for round_ in range(options.rounds):
            for name in list(servers)[:: -1 if round_ % 2 else 1]:
                found = []
                for _ in range(options.requests):
                    await asyncio.sleep(pauses.uniform(0, 0.2))
                    found.append((await ask(http, servers[name], 1, model)).at_s[0])
                heard[name].append(found)
    return heard


@contextmanager
def paced(options: argparse.Namespace, environ: Mapping[str, str], logs: Path) -> Iterator[dict[str, Server]]:
    """The three paths of a steady stream."""
    common = {
        **environ,
        "PACE_TOKENS_PER_S": str(options.tokens_per_s),
        "HOST": "127.0.0.1",
        "MODEL_NAME": "paced",
        "WARM_PARENT": "off",
        "API_KEY": KEY,
    }
    port = free_port()
    direct = start(
        [sys.executable, "-m", "bench.paced", "worker"],
        {**common, "PLATFORM": "http", "PORT": str(port)},
        *(f"http://127.0.0.1:{port}", "/ready", KEY, logs / "direct.log"),
    )
    with direct:
        found = {"direct": direct}
        linked = {**common, "PACE_LINK_MS": str(options.round_trip_ms / 2)}
        for name, mode in (("runpod", "gateway-worker"), ("per-token", "gateway-per-token")):
            found[name] = gateway([sys.executable, "-m", "bench.paced", mode], linked, logs / f"{name}.log")
        try:
            yield found
        finally:
            for name in ("runpod", "per-token"):
                found[name].stop()


@contextmanager
def real(model: str, environ: Mapping[str, str], logs: Path) -> Iterator[dict[str, Server]]:
    """A model behind a gateway, asked over a socket and through jobs."""
    common = {**environ, "MODEL_NAME": model, "SERVED_MODEL_NAME": "bench", "MAX_MODEL_LEN": "1024"}
    common |= {"HOST": "127.0.0.1", "API_KEY": KEY, "WARM_PARENT": "off"}
    with (
        gateway([sys.executable, "-m", "gateway"], common, logs / "socket.log") as over_socket,
        gateway(
            [sys.executable, "-m", "gateway", "serve", "--upstream", "runpod"], common, logs / "jobs.log"
        ) as through_jobs,
    ):
        yield {"socket": over_socket, "jobs": through_jobs}


def gateway(command: list[str], environ: Mapping[str, str], log: Path) -> Server:
    """A gateway that listens: what is asked of it waits for its worker."""
    port = free_port()
    environ = {**environ, "PORT": str(port), "DATA_DIR": str(log.with_suffix(".data"))}
    server = start(command, environ, f"http://127.0.0.1:{port}", "/health", KEY, log)
    server.root += "/v2/local/openai"
    return server


async def shares(server: Server) -> dict[str, tuple[float, float]]:
    """Sum and count of the gateway's histograms of jobs, in seconds."""
    async with (
        aiohttp.ClientSession() as http,
        http.get(
            server.root.partition("/v2/")[0] + "/metrics", headers={"authorization": f"Bearer {server.key}"}
        ) as reply,
    ):
        text = await reply.text()
    return {
        name: tuple(  # type: ignore[misc] # of two
            float(
                re.findall(
                    rf"^firsttoken_gateway_runpod_job_{name}_seconds_{what}{{.*}} (\S+)$", text, re.MULTILINE
                )[0]
            )
            for what in ("sum", "count")
        )
        for name in ("queued", "first_output")
    }


def mean_ms(before: tuple[float, float], after: tuple[float, float]) -> float:
    """The mean of what was observed in between."""
    return 1e3 * (after[0] - before[0]) / (after[1] - before[1])


async def measure(options: argparse.Namespace, environ: Mapping[str, str], logs: Path) -> dict[str, object]:
    """Both parts: the tables are printed, the line of JSON is returned."""
    with paced(options, environ, logs) as servers:
        heard = await rates(servers, options)
    per_s = {name: median(one.per_s for one in found) for name, found in heard.items()}
    first_ms = {name: 1e3 * median(one.at_s[0] for one in found) for name, found in heard.items()}
    print(f"\n{options.tokens} tokens at {options.tokens_per_s:g}/s, round trip {options.round_trip_ms:g} ms")
    print(f"  {'':<28}{'tokens/s':>10}{'min - max':>18}{'kept':>8}{'first token':>14}")
    for name, label in PATHS.items():
        speeds = [one.per_s for one in heard[name]]
        span = f"{min(speeds):.1f} - {max(speeds):.1f}"
        kept = per_s[name] / per_s["direct"]
        print(f"  {label:<28}{per_s[name]:>10.1f}{span:>18}{kept:>8.3f}{first_ms[name]:>11.1f} ms")

    with real(options.model, environ, logs) as servers:
        before = await shares(servers["jobs"])
        found = await first_tokens(servers, options, "bench")
        after = await shares(servers["jobs"])
    ttft_ms = {name: 1e3 * median(median(one) for one in rounds) for name, rounds in found.items()}
    queued_ms = mean_ms(before["queued"], after["queued"])
    output_ms = mean_ms(before["first_output"], after["first_output"])
    added_ms = ttft_ms["jobs"] - ttft_ms["socket"]
    print(f"\ntime to first token, {Path(options.model).name}, no delay between worker and control plane")
    print(f"  over a socket                           {ttft_ms['socket']:7.1f} ms")
    print(f"  through RunPod's SDK                    {ttft_ms['jobs']:7.1f} ms, {added_ms:+.1f} ms")
    print(f"    in line until the SDK takes it        {queued_ms:7.1f} ms (mean)")
    print(f"    until its first output is posted      {output_ms:7.1f} ms (mean), the engine's work in it")
    kept = per_s["runpod"] / per_s["direct"]
    met = "met" if kept >= GOALS["kept"] else "missed"
    print(f"\nkept {kept:.3f}, goal >= {GOALS['kept']:g}: {met}")
    return {
        "kept": round(kept, 3),
        "added_ttft_ms": round(added_ms, 1),
        "kept_per_token": round(per_s["per-token"] / per_s["direct"], 3),
        "tokens_per_s": {name: round(value, 1) for name, value in per_s.items()},
        "first_token_ms": {name: round(value, 1) for name, value in first_ms.items()},
        "ttft_ms": {name: round(value, 1) for name, value in ttft_ms.items()},
        "queued_ms": round(queued_ms, 1),
        "first_output_ms": round(output_ms, 1),
        "round_trip_ms": options.round_trip_ms,
        "rounds": options.rounds,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


PATHS = {
    "direct": "worker, over HTTP",
    "runpod": "RunPod's SDK, ours",
    "per-token": "RunPod's SDK, a token a post",
}


def common_parser(environ: Mapping[str, str], name: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of the benchmark `name`, with what those of streams share."""
    command = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    command.add_argument(
        "--model", default=environ.get("MODEL_NAME", "tests/tinychat/model"), help="a folder"
    )
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--tokens", type=int, default=300, help="of each steady stream")
    command.add_argument("--tokens-per-s", type=float, default=200.0)
    command.add_argument("--requests", type=int, default=20, help="for the time to first token, a round")
    return command


def parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    """The command line."""
    command = common_parser(environ, "stream", __doc__)
    command.add_argument("--round-trip-ms", type=float, default=30.0)
    return command


Measure = Callable[[argparse.Namespace, Mapping[str, str], Path], Coroutine[Any, Any, dict[str, object]]]


def carry_out(measure: Measure, options: argparse.Namespace) -> int:
    """Run a benchmark; the last line of standard output is its result as JSON."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the servers are ended
    environ = {name: value for name, value in os.environ.items() if name not in NOT_OURS_TO_GIVE}
    try:
        with tempfile.TemporaryDirectory(prefix="firsttoken-bench-") as logs:
            print(json.dumps(asyncio.run(measure(options, environ, Path(logs)))))
    except (RuntimeError, BadAnswer) as error:
        print(f"the benchmark ended early: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run this one."""
    return carry_out(measure, parser(os.environ).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
