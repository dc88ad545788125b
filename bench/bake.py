"""`make bench-bake`: a start from a bake, from the same model unbaked, and of vLLM's own server.

As on a machine that has just been given the image: no cache is there but what was baked. Each round
starts every variant once, and each next round in the opposite order.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import coldstart_figures as figures
from bench.coldstart import FLAGS, Run, ending, environment, named, planned
from bench.overhead import describe_machine, describe_versions
from bench.schedule import turns
from bench.start import MODEL_ID, VARIANTS, Case, Variant
from builder.console import Console
from builder.fetch import fetch
from builder.seal import seal
from builder.warm import warm
from handler.manifest import MODEL
from handler.settings import DEFAULT_MODEL
from judge.servers import as_settings

COMPILED = {"ENFORCE_EAGER": "false"}
BAKES: Mapping[str, Mapping[str, str]] = {"baked": {}, "baked-compiled": COMPILED}
"""What each bake is made with beside the flags of all."""
BAKED_FROM = {"baked": "unbaked", "baked-compiled": "unbaked-compiled"}
WAYS = ("vllm", "vllm-eager", "unbaked", "baked", "unbaked-compiled", "baked-compiled")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the last line of standard output is its result as JSON."""
    command = argparse.ArgumentParser(prog="python -m bench.bake", description=__doc__)
    command.add_argument("--model", default=DEFAULT_MODEL, help="a folder or a Hugging Face id")
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--variants", nargs="+", default=list(WAYS), choices=WAYS)
    options = command.parse_args(argv)
    return ending(lambda: benchmark(options))


class BakedRun(Run):
    """Starts with empty caches, some of them from a bake."""

    def variants(self, names: Sequence[str]) -> dict[str, Variant]:
        """Those called `names`; what they need is baked now."""
        found = {name: VARIANTS[name] for name in names if name in VARIANTS}
        for name in names:
            compiled = "compiled" if name.endswith("compiled") else "eager"
            if name in BAKES:
                settings = {**BAKES[name], "MODEL_NAME": str(self._bake(name))}
                found[name] = Variant(name, f"baked, {compiled}", "worker", settings=settings)
            elif name not in VARIANTS:
                settings = dict(COMPILED) if compiled == "compiled" else {}
                found[name] = Variant(name, f"worker, {compiled}", "worker", settings=settings)
        return {name: found[name] for name in names}

    def caches(self, variant: Variant, folder: Path) -> dict[str, str]:
        """Of a bake the worker finds the caches itself: it is told of an empty home only."""
        if variant.name not in BAKES:
            return super().caches(variant, folder)
        temporary = folder.parent / "tmp"
        temporary.mkdir(exist_ok=True)
        return {"XDG_CACHE_HOME": str(folder), "TMPDIR": str(temporary)}

    def _bake(self, name: str) -> Path:
        out = self.folder / name
        settings = as_settings(["--served-model-name", MODEL_ID, *self.case.flags])
        environ = {**self.case.environ, **settings, **BAKES[name]}
        console = Console(sys.stderr, name)
        fetch(self.case.model, environ=environ, console=console, out=out / MODEL)
        warm(out, environ=environ, console=console)
        seal(out, environ=environ, console=console)
        return out


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, and print what comes out; returns the line of JSON. Raises `StartError`."""
    about = {
        "machine": describe_machine(),
        "versions": describe_versions(),
        "flags": " ".join(FLAGS),
        "rounds": options.rounds,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    failures: list[str] = []
    folder = fetch(options.model, environ=os.environ, console=Console(sys.stderr)).absolute()
    with BakedRun(named(options.model), Case(str(folder), FLAGS, environment(os.environ)), failures) as run:
        variants = run.variants(options.variants)
        ours = next(variant for variant in variants.values() if variant.kind == "worker")
        todo = turns("empty", list(variants.values()), options.rounds)
        run.announce([replace(todo[0], round=0, variant=ours), *todo])
        first = run.starts([replace(todo[0], round=0, variant=ours)])
        run.case = replace(run.case, kv_cache_bytes=planned(first[ours.name]))
        found = run.starts(todo)
    print("", f"{run.name}, no cache but what was baked", figures.table(found, variants), "", sep="\n")
    print("phases, median wall time", figures.side_by_side(found, variants), "", sep="\n")
    ratios = {
        f"{name}_of_{peer}": figures.ratio(found, name, peer)
        for name in BAKES
        for peer in (BAKED_FROM[name], "vllm", "vllm-eager")
    }
    for name, value in ratios.items():
        print(f"{name} {'not measured' if value is None else f'{value:.3f}'}")
    print(*figures.disturbed({"empty": found}), sep="\n", flush=True)
    return {
        **ratios,
        **about,
        "failures": failures,
        "other_cores": figures.other_cores({"empty": found}),
        "results": figures.as_json({"empty": found})["empty"],
    }


if __name__ == "__main__":
    sys.exit(main())
