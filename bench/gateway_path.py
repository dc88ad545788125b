"""`make bench-gateway`: what the way through the gateway costs, beside the same worker asked straight.

The gateway's own worker is asked at its unix socket, so that both ways end in the same engine. Beside them
are two proxies that do nothing else: one of aiohttp, which our gateway asks its workers with, and nginx where
it is installed. Two workers: a real vLLM, and one without a model that says its tokens as fast as Python can.
docs/benchmarks.md says what is measured and what came out.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import load
from bench.figures import Figures, Window, percentile
from bench.overhead import MODEL_ID, QUIET_CORES, describe_machine, describe_versions, flags, prompts
from bench.servers import busy_s, cpu_s, tree, tree_cpu_s
from bench.stream import carry_out
from judge.servers import KEY, Server, as_settings, free_port, start

LABELS: Mapping[str, str] = {
    "direct": "worker, its socket",
    "gateway": "gateway",
    "aiohttp": "plain aiohttp proxy",
    "nginx": "nginx",
}
"""The ways to the worker, the straight one first."""

GOALS: Mapping[str, tuple[str, float]] = {"added_ttft_p50_ms": ("<=", 3.0), "tokens_ratio": (">=", 0.95)}
CHAT = "/v1/chat/completions"
AS_FAST_AS_IT_GOES = 1e9
"""Tokens/s of an engine that does not wait."""

Windows = Mapping[int, Mapping[str, Sequence[Window]]]
"""By the number of streams, then by way; one a round."""

NGINX = """
daemon off;
user root;
pid {folder}/nginx.pid;
error_log stderr;
worker_processes 1;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream worker {{ server unix:{socket}; keepalive 64; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://worker;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to the worker. `pids` are the processes that stand in it."""

    name: str
    port: int = 0
    path: str = CHAT
    uds: str | None = None
    pids: tuple[int, ...] = ()

    def job(self, streams: int, bodies: Sequence[str]) -> load.Job:
        """What the load generator is told."""
        asked = bodies[:streams], bodies[streams:]
        return load.Job("127.0.0.1", self.port, self.path, KEY, streams, *asked, uds=self.uds)

    def cpu_s(self) -> float:
        """What its processes have taken of the CPU."""
        return sum(map(cpu_s, self.pids))


@dataclass(frozen=True, slots=True)
class Ways:
    """All ways to one worker, and the process that has started everything but the proxies."""

    ways: Sequence[Way]
    gateway_pid: int

    @property
    def cpu_s(self) -> float:
        """What all that is measured has taken of the CPU."""
        return tree_cpu_s(self.gateway_pid) + sum(way.cpu_s() for way in self.ways if way.name != "gateway")


@contextmanager
def ways(
    command: Sequence[str], settings: Mapping[str, str], environ: Mapping[str, str], logs: Path, first: str
) -> Iterator[Ways]:
    """The ways to the worker of the gateway `command`, once it has answered `first`, a request's body.

    Raises `RuntimeError`, and `BadAnswer` if it has not.
    """
    port = free_port()
    own = {"HOST": "127.0.0.1", "PORT": str(port), "API_KEY": KEY, "WARM_PARENT": "off"}
    own |= {"DATA_DIR": str(logs / "data"), "TMPDIR": str(logs)}
    root = f"http://127.0.0.1:{port}"
    with ExitStack() as stack:
        server = start([*command], {**environ, **settings, **own}, root, "/health", KEY, logs / "gateway.log")
        pid = stack.enter_context(server).process.pid
        gateway = Way("gateway", port, f"/v2/local/openai{CHAT}", pids=(pid,))
        load.run(gateway.job(1, [first, first]), lambda: None)  # which waits for the worker
        (socket,) = logs.glob("firsttoken-*/worker-*.sock")
        found = [
            Way("direct", uds=str(socket)),
            gateway,
            stack.enter_context(plain_proxy(socket, environ, logs)),
        ]
        if shutil.which("nginx"):
            found.append(stack.enter_context(nginx(socket, environ, logs)))
        yield Ways(found, pid)


@contextmanager
def plain_proxy(socket: Path, environ: Mapping[str, str], logs: Path) -> Iterator[Way]:
    """A proxy of aiohttp that does nothing else."""
    port = free_port()
    command = [sys.executable, "-m", "bench.plain_proxy", str(port), str(socket)]
    with proxy(command, port, environ, logs / "aiohttp.log") as server:
        yield Way("aiohttp", port, pids=(server.process.pid,))


@contextmanager
def nginx(socket: Path, environ: Mapping[str, str], logs: Path) -> Iterator[Way]:
    """The same, by nginx."""
    port, folder = free_port(), logs / "nginx"
    folder.mkdir()
    settings = folder / "nginx.conf"
    settings.write_text(NGINX.format(folder=folder, socket=socket, port=port))
    command = ["nginx", "-p", str(folder), "-e", "stderr", "-c", str(settings)]
    with proxy(command, port, environ, logs / "nginx.log") as server:
        yield Way("nginx", port, pids=tuple(tree(server.process.pid)))


def proxy(command: list[str], port: int, environ: Mapping[str, str], log: Path) -> Server:
    """`command`, once the worker answers through it."""
    return start(command, environ, f"http://127.0.0.1:{port}", "/ready", KEY, log)


def measure(found: Ways, options: argparse.Namespace, kind: str, counts: Mapping[int, int]) -> Windows:
    """Each way at so many streams, round by round; `counts` says how many requests a window has.

    Every other round goes the other way round.
    """
    windows: dict[int, dict[str, list[Window]]] = {n: {way.name: [] for way in found.ways} for n in counts}
    for round_ in range(options.rounds):
        for streams, count in counts.items():
            words = random.Random(f"{kind} {round_} {streams}")  # noqa: S311
            bodies = list(prompts(words, streams + count, options))
            for way in found.ways[:: -1 if round_ % 2 else 1]:
                windows[streams][way.name].append(window(found, way, streams, bodies))
        print(f"{kind}: round {round_ + 1} of {options.rounds} done", file=sys.stderr, flush=True)
    return windows


def window(found: Ways, way: Way, streams: int, bodies: Sequence[str]) -> Window:
    """`way`, asked all of `bodies`."""
    before: list[float] = []
    outcome = load.run(way.job(streams, bodies), lambda: before.extend([way.cpu_s(), found.cpu_s, busy_s()]))
    own_s, all_s, busy = way.cpu_s() - before[0], found.cpu_s - before[1], busy_s() - before[2]
    return Window(
        path=way.name,
        streams=streams,
        first_s=[sample.first_s for sample in outcome.samples],
        tokens=sum(sample.tokens for sample in outcome.samples),
        wall_s=outcome.wall_s,
        cpu_s=own_s,
        other_cores=max(0.0, (busy - all_s - outcome.cpu_s) / outcome.wall_s),
    )


def table(windows: Windows) -> str:
    """A block for each number of streams: the medians of each way, and what it keeps of the straight one."""
    lines = [
        f"  {'':<22}{'TTFT p50':>11}{'p99':>11}{'tokens/s':>11}{'min - max':>19}{'kept':>8}{'own CPU':>13}"
    ]
    for streams, by in windows.items():
        lines += ["", f"{streams} stream{'s' if streams > 1 else ''}"]
        for name, all_ in by.items():
            of = Figures.of(all_)
            span = f"{of.tokens_per_s_min:,.0f} - {of.tokens_per_s_max:,.0f}"
            lines.append(
                f"  {LABELS[name]:<22}{of.first_p50_s * 1e3:>8.2f} ms{of.first_p99_s * 1e3:>8.2f} ms"
                f"{of.tokens_per_s:>11,.0f}{span:>19}{kept(by, name):>8.3f}"
                f"{of.cpu_s_per_token * 1e6:>7.1f} us/tok"
            )
    return "\n".join(lines)


def ratios(windows: Windows, way: str = "gateway") -> dict[str, float]:
    """What `way` adds at one stream, and what it keeps at the largest number of them.

    Each round is compared with itself and the median of the rounds is taken: a machine that is slower for a
    while is so for both. The 99th percentile is of all rounds together.
    """
    alone = windows[min(windows)]
    added_s = median(
        percentile(one.first_s, 50) - percentile(straight.first_s, 50)
        for one, straight in zip(alone[way], alone["direct"], strict=True)
    )
    slow_s, straight_slow_s = (
        percentile([first_s for one in alone[name] for first_s in one.first_s], 99)
        for name in (way, "direct")
    )
    return {
        "added_ttft_p50_ms": round(1e3 * added_s, 2),
        "added_ttft_p99_ms": round(1e3 * (slow_s - straight_slow_s), 2),
        "tokens_ratio": round(kept(windows[max(windows)], way), 3),
    }


def kept(by: Mapping[str, Sequence[Window]], way: str) -> float:
    """The tokens/s of `way` by those of the straight one, the median of the rounds."""
    return median(
        (one.tokens / one.wall_s) / (straight.tokens / straight.wall_s)
        for one, straight in zip(by[way], by["direct"], strict=True)
    )


def others(*all_: Windows) -> float:
    """How many cores were busy, on average, with what is not measured."""
    windows = [one for found in all_ for by in found.values() for ways in by.values() for one in ways]
    return sum(one.other_cores * one.wall_s for one in windows) / sum(one.wall_s for one in windows)


def verdicts(found: Mapping[str, float]) -> list[str]:
    """Each goal and whether it is met, a line each."""
    lines = []
    for name, (sign, goal) in GOALS.items():
        met = found[name] <= goal if sign == "<=" else found[name] >= goal
        lines.append(f"{name} {found[name]:g}, goal {sign} {goal:g}: {'met' if met else 'missed'}")
    return lines


async def run(options: argparse.Namespace, environ: Mapping[str, str], logs: Path) -> dict[str, object]:
    """`compare`: nothing else is on the loop."""
    return compare(options, environ, logs)


def compare(options: argparse.Namespace, environ: Mapping[str, str], logs: Path) -> dict[str, object]:
    """Both workers: the tables are printed, the line of JSON is returned."""
    environ = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", **environ}
    streams = {1: options.requests, options.streams: 2 * options.streams}
    first = next(prompts(random.Random(0), 1, options))  # noqa: S311
    (logs / "real").mkdir()
    settings = {**as_settings(flags()), "MODEL_NAME": str(Path(options.model).absolute())}
    with ways([sys.executable, "-m", "gateway"], settings, environ, logs / "real", first) as found:
        real = measure(found, options, "vLLM", streams)
    print(f"\n{Path(options.model).name}, vLLM\n{table(real)}", flush=True)

    (logs / "paced").mkdir()
    settings = {"MODEL_NAME": MODEL_ID, "PACE_TOKENS_PER_S": str(AS_FAST_AS_IT_GOES)}
    options.max_tokens = options.paced_tokens
    command = [sys.executable, "-m", "bench.paced", "local-worker"]
    with ways(command, settings, environ, logs / "paced", first) as found:
        paced = measure(found, options, "paced", streams)
    print(f"\nno model, as fast as Python goes\n{table(paced)}\n")
    print("\n".join(verdicts(ratios(real))))
    if (busy := others(real, paced)) > QUIET_CORES:
        print(f"not a quiet machine: others took {busy:.2f} cores meanwhile; measure again")
    return {
        **ratios(real),
        "streams": options.streams,
        "peers": {name: ratios(real, name) for name in real[1] if name not in {"direct", "gateway"}},
        "paced": {name: ratios(paced, name) for name in paced[1] if name != "direct"},
        "other_cores": round(busy, 2),
        "model": Path(options.model).name,
        "rounds": options.rounds,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="python -m bench.gateway_path", description=__doc__)
    command.add_argument(
        "--model", default=environ.get("MODEL_NAME", "tests/tinychat/model"), help="a folder"
    )
    command.add_argument("--rounds", type=int, default=15)
    command.add_argument("--streams", type=int, default=32)
    command.add_argument("--requests", type=int, default=20, help="of a window with one stream")
    command.add_argument("--max-tokens", type=int, default=64, help="of each answer of vLLM, never fewer")
    command.add_argument("--paced-tokens", type=int, default=500, help="of each answer without a model")
    command.add_argument("--prompt-words", type=int, default=40)
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the last line of standard output is its result as JSON."""
    return carry_out(run, parser(os.environ).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
