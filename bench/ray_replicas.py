"""`make bench-ray`: what a second replica of Ray Serve gives, through the gateway.

Two deployments in one cluster, one with one replica and one with two, each replica with an engine that says
tokens at a steady rate and holds few streams at once: the cores are not the limit. The same load goes to each
in turn, so much that both are full. Twice the tokens per second is all that could be had.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import cast

import aiohttp
import ray
from ray import serve

from bench.overhead import describe_machine
from bench.paced import PacedEngine
from bench.stream import carry_out
from handler.engine import Engine
from handler.platforms.ray_serve import Replica
from handler.platforms.ray_settings import RaySettings
from handler.settings import Settings
from judge.servers import KEY, Server, free_port, start

REPLICAS = {"one": 1, "two": 2}
GOAL = 1.9
SLOTS = 8
TOKENS_PER_S = 20.0


class PacedReplica(Replica):
    """A replica whose engine waits and makes up tokens."""

    async def __init__(  # type: ignore[misc] # Ray awaits it
        self, given: Mapping[str, str]
    ) -> None:
        self._settings = Settings.from_environ({**given, "AUTH": "off"})
        self._engine = cast("Engine", PacedEngine(TOKENS_PER_S))

    def __del__(self) -> None:
        """Nothing is to be closed."""


@contextmanager
def deployed(port: int) -> Iterator[None]:
    """Both deployments, each under its name."""
    environ = {"PYTHONPATH": str(Path.cwd())}
    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=3, runtime_env={"env_vars": environ})
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
    try:
        for name, number in REPLICAS.items():
            bounds = {"MIN_WORKERS": str(number), "MAX_WORKERS": str(number), "MAX_CONCURRENCY": str(SLOTS)}
            options = RaySettings.from_environ(bounds, gpus=False).deployment()
            replica = serve.deployment(serve.ingress()(PacedReplica)).options(name="worker", **options)
            serve.run(replica.bind({}), name=name, route_prefix=f"/{name}")
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


@contextmanager
def gateway(behind: int, environ: Mapping[str, str], folder: Path) -> Iterator[Server]:
    """The gateway in front of both."""
    tables = [
        f'[[endpoint]]\nid = "{name}"\nmodel = "paced"\nupstream = "http"\n'
        f'upstream_url = "http://127.0.0.1:{behind}/{name}/v1"\n'
        for name in REPLICAS
    ]
    (folder / "endpoints.toml").write_text("\n".join(tables))
    port = free_port()
    own = {
        **environ,
        "PORT": str(port),
        "API_KEY": KEY,
        "DATA_DIR": str(folder / "data"),
        "ENDPOINTS_FILE": str(folder / "endpoints.toml"),
    }
    root = f"http://127.0.0.1:{port}"
    with start(
        [sys.executable, "-m", "gateway"], own, root, "/health", KEY, folder / "gateway.log"
    ) as server:
        yield server


async def window(server: Server, name: str, streams: int, requests: int, tokens: int) -> float:
    """Tokens per second of `streams` clients that ask `requests` times each."""
    url = f"{server.root}/v2/{name}/openai/v1/chat/completions"
    body = {"model": "paced", "messages": [], "max_tokens": tokens, "stream": True}
    heard = 0

    async def client(http: aiohttp.ClientSession) -> None:
        nonlocal heard
        for _ in range(requests):
            async with http.post(url, json=body) as reply:
                if reply.status != 200:
                    raise RuntimeError(await reply.text())
                async for line in reply.content:
                    heard += b" word" in line

    headers = {"authorization": f"Bearer {server.key}"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as http:
        began_s = time.monotonic()
        await asyncio.gather(*(client(http) for _ in range(streams)))
        took_s = time.monotonic() - began_s
    if heard != streams * requests * tokens:
        raise RuntimeError(f"{heard} tokens came of {streams * requests * tokens}")
    return heard / took_s


async def measure(options: argparse.Namespace, environ: Mapping[str, str], folder: Path) -> dict[str, object]:
    """Rounds of both in turn: the table is printed, the line of JSON is returned."""
    behind = free_port()
    rates: dict[str, list[float]] = {name: [] for name in REPLICAS}
    load = (options.streams, options.requests, options.tokens)
    with deployed(behind), gateway(behind, environ, folder) as server:
        for name in REPLICAS:
            await window(server, name, options.streams, 1, 2)  # connections, and Ray's routers
        for round_ in range(options.rounds):
            for name in list(REPLICAS)[:: -1 if round_ % 2 else 1]:
                rates[name].append(await window(server, name, *load))
    most = {name: number * SLOTS * TOKENS_PER_S for name, number in REPLICAS.items()}
    print(f"\n{options.streams} streams through the gateway and Ray Serve, tokens/s")
    for name, found in rates.items():
        spread = f"{min(found):.0f} - {max(found):.0f}"
        print(f"  {'replicas: ' + name:<16}{median(found):>8.1f}   {spread:<12} of {most[name]:.0f}")
    ratio = median(two / one for one, two in zip(rates["one"], rates["two"], strict=True))
    print(f"  ratio {ratio:.3f}, goal {GOAL}: {'met' if ratio >= GOAL else 'not met'}\n")
    return {
        "replicas_ratio": round(ratio, 3),
        "tokens_per_s": {name: round(median(found), 1) for name, found in rates.items()},
        "streams": options.streams,
        "rounds": options.rounds,
        "ray": ray.__version__,
        "machine": describe_machine(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    command = argparse.ArgumentParser(prog="python -m bench.ray_replicas", description=__doc__)
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--streams", type=int, default=32)
    command.add_argument("--requests", type=int, default=2, help="of each stream in a round")
    command.add_argument("--tokens", type=int, default=40, help="of each answer")
    return carry_out(measure, command.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
