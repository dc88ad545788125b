"""`make bench-coldstart`: from the start of a process to its first streamed token, beside vLLM's server.

One model, the same flags, one prompt: each round starts every variant once, and each next round in
the opposite order. docs/benchmarks.md says what is measured and what came out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from bench import coldstart_figures as figures
from bench.overhead import describe_machine, describe_versions
from bench.schedule import Outlook, Turn, first_turns, turns
from bench.servers import NOT_OURS_TO_GIVE
from bench.start import VARIANTS, Case, NotStarted, Parent, Start, Variant, drop_page_cache, start
from builder.console import Console
from builder.fetch import fetch
from handler.errors import StartError
from handler.levers import LEVERS, Lever
from handler.settings import DEFAULT_MODEL

TINY = Path(__file__).parents[1] / "tests" / "tinychat" / "model"
FLAGS = ("--max-model-len", "1024", "--max-num-seqs", "64", "--seed", "0")
LINGER_S = 1.0
"""A start that fills the caches lives a little longer: our worker writes the last one when it is ready."""
SHORT = Path("/tmp")  # noqa: S108 - a new folder is made in it
"""Where the caches and logs of a run lie, because the path of a socket must be short."""
NOT_WARM = ("LEVERS_OFF", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
"""What a shell may hold and what would make a start slower than it is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the last line of standard output is its result as JSON."""
    options = parser().parse_args(argv)

    def run() -> dict[str, Any]:
        console = Console(sys.stderr)
        models = {name: fetch(name, environ=os.environ, console=console) for name in options.models}
        return benchmark({named(name): folder.absolute() for name, folder in models.items()}, options)

    return ending(run)


def ending(run: Callable[[], dict[str, Any]]) -> int:
    """Print what `run` returns as JSON; returns an exit code, 1 if something in it did not start."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the servers are ended
    try:
        result = run()
    except StartError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result))
    return 1 if result["failures"] else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(prog="python -m bench.coldstart", description=__doc__)
    command.add_argument(
        "--models",
        nargs="+",
        default=[DEFAULT_MODEL, str(TINY)],
        metavar="MODEL",
        help="folders or Hugging Face ids; the goals are those of the first",
    )
    add_common(command, rounds=5, variants=list(VARIANTS), modes=list(figures.MODES))
    command.add_argument(
        "--levers", action="store_true", help="measure what each lever of our worker gives, and no peer"
    )
    return command


def add_common(
    command: argparse.ArgumentParser, *, rounds: int, variants: list[str], modes: list[str]
) -> None:
    """The options that all benchmarks of starts have; the arguments are their defaults."""
    command.add_argument("--rounds", type=int, default=rounds)
    command.add_argument("--variants", nargs="+", default=variants, choices=VARIANTS)
    command.add_argument("--modes", nargs="+", default=modes, choices=figures.MODES)
    command.add_argument(
        "flags", nargs="*", metavar="FLAG", help="more flags of vLLM for all, after a lone --"
    )


def named(model: str) -> str:
    """What to call `model` in a table: a Hugging Face id as it is, of a folder the end."""
    folder = Path(model)
    return "/".join(folder.absolute().parts[-2:]) if folder.is_dir() else model


def benchmark(models: Mapping[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Measure each of `models`, folders by name, and print what comes out; returns the line of JSON."""
    about = {
        "machine": describe_machine(),
        "versions": describe_versions(),
        "flags": " ".join([*FLAGS, *options.flags]),
        "rounds": options.rounds,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    results: dict[str, Any] = {}
    failures: list[str] = []
    for name, folder in models.items():
        case = Case(str(folder), (*FLAGS, *options.flags), environment(os.environ))
        with Run(name, case, failures) as run:
            results[name] = levers(run, options) if options.levers else compare(run, options)
    first: dict[str, Any] = next(iter(results.values()))
    headline = {name: first.get("ratios", {}).get(name) for name in figures.GOALS}
    return {**headline, **about, "failures": failures, "results": results}


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without what would make one server differ from another; nothing is asked of a network."""
    kept = {
        name: value
        for name, value in environ.items()
        if name not in NOT_OURS_TO_GIVE and name not in NOT_WARM
    }
    return {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **kept}


def caches(folder: Path) -> dict[str, str]:
    """Every cache that a start may read or write, in `folder`."""
    return {
        "XDG_CACHE_HOME": str(folder),
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "CUDA_CACHE_PATH": str(folder / "cuda"),
        "FLASHINFER_WORKSPACE_BASE": str(folder / "flashinfer"),
        "DG_JIT_CACHE_DIR": str(folder / "deep_gemm"),
    }


Make = Callable[[Variant, Case, Mapping[str, str], Path, float], Start]
"""What makes one start, as `bench.start.start` does."""


class Run:
    """The starts of one model; its caches and logs are in a folder, which stays if a start fails."""

    def __init__(
        self, name: str, case: Case, failures: list[str], make: Make = start, place: Path = SHORT
    ) -> None:
        self.name = name
        self.case = case
        self._make = make
        self._failures = failures
        self._failed_before = len(failures)
        self._outlook = Outlook()
        self._todo: list[Turn] = []
        self._number = 0
        self.folder = Path(tempfile.mkdtemp(prefix="firsttoken-coldstart-", dir=place))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._failures) == self._failed_before:
            shutil.rmtree(self.folder, ignore_errors=True)

    def announce(self, todo: Sequence[Turn]) -> None:
        """Say how much there is to do."""
        self._todo = list(todo)
        minutes = self._outlook.left_s(todo) / 60
        print(f"{self.name}: {len(todo)} starts, {minutes:.0f} min on two cores", file=sys.stderr, flush=True)

    def starts(self, turns: Sequence[Turn]) -> dict[str, list[Start]]:
        """Make `turns` in their order: the starts by variant. One that fails is missing, and was told."""
        found: dict[str, list[Start]] = {turn.variant.name: [] for turn in turns}
        with ExitStack() as stack:
            parent = self._warm_parent(stack) if any(turn.variant.kind == "fork" for turn in turns) else None
            for turn in turns:
                began_s = time.monotonic()
                try:
                    made = self._start(turn, parent)
                except NotStarted as error:
                    self._failed(turn.variant.name, turn.mode, error)
                    said = f"did not start: {error}"
                else:
                    self._outlook.note(turn, time.monotonic() - began_s)
                    found[turn.variant.name].append(made)
                    said = f"{made.first_s:.2f} s, {made.peak_bytes / (1 << 20):,.0f} MiB"
                self._tell(turn, said)
        return found

    def caches(self, variant: Variant, folder: Path) -> dict[str, str]:  # noqa: ARG002 - for who bakes
        """The environment in which a start of `variant` has its caches in `folder`."""
        return caches(folder)

    def _start(self, turn: Turn, parent: Parent | None) -> Start:
        if turn.variant.kind == "fork":
            if parent is None:
                raise NotStarted("there is no warm parent")
            return parent.start()
        self._number += 1
        own = self.folder / f"{self._number}-{turn.variant.name or 'all'}"
        own.mkdir()
        environ = self.caches(
            turn.variant, own / "caches" if turn.mode == "empty" else self.folder / "caches"
        )
        if turn.mode == "nopyc":
            environ |= {"PYTHONPYCACHEPREFIX": str(own / "pyc"), "PYTHONDONTWRITEBYTECODE": "1"}
        if turn.mode == "dropped":
            drop_page_cache()
        made = self._make(turn.variant, self.case, environ, own / "log", 0.0 if turn.round else LINGER_S)
        shutil.rmtree(own, ignore_errors=True)  # a compiler that was ended may still write there
        return made

    def _warm_parent(self, stack: ExitStack) -> Parent | None:
        """A warm parent that has made a worker, which taught it what to import; None if it can't."""
        print("  a warm parent, and a worker that it learns from", file=sys.stderr, flush=True)
        parent = Parent(self.case, caches(self.folder / "caches"), self.folder)
        stack.callback(parent.close)
        try:
            parent.start()
        except NotStarted as error:
            self._failed("fork", "warm", error)
            print(f"  did not start: {error}", file=sys.stderr, flush=True)
            return None
        return parent

    def _failed(self, variant: str, mode: str, error: NotStarted) -> None:
        self._failures.append(f"{variant}, {mode}: {error}")

    def _tell(self, turn: Turn, said: str) -> None:
        self._todo.remove(turn)
        number = f"round {turn.round}" if turn.round else "first"
        left = f"{len(self._todo)} left, {self._outlook.left_s(self._todo) / 60:.0f} min"
        name = turn.variant.label
        print(f"  {turn.mode:<8}{number:<9}{name:<21}{said}  ({left})", file=sys.stderr, flush=True)


def compare(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Every mode of one model, printed as it ends; returns what the line of JSON holds of it."""
    ours = VARIANTS["worker"]
    variants = [VARIANTS[name] for name in options.variants]
    modes = possible(options.modes)
    others = first_turns([variant for variant in variants if variant != ours])
    measured = {mode: turns(mode, variants, options.rounds) for mode in modes}
    run.announce([*first_turns([ours]), *others, *(turn for todo in measured.values() for turn in todo)])

    first = run.starts(first_turns([ours]))
    run.case = replace(run.case, kv_cache_bytes=planned(first[ours.name]))
    first |= run.starts(others)
    if run.case.kv_cache_bytes:
        size_mib = run.case.kv_cache_bytes / (1 << 20)
        print(f"\n{run.name}: KV cache {size_mib:,.0f} MiB, planned by our worker, given to vLLM's server")
    found: dict[str, dict[str, list[Start]]] = {}
    for mode, todo in measured.items():
        found[mode] = run.starts([turn for turn in todo if first.get(turn.variant.name) != []])
        print("", f"{run.name}, {figures.MODES[mode]}", figures.table(found[mode]), sep="\n")
        print(*figures.differing(found[mode]), sep="\n", flush=True)
        for variant, starts in found[mode].items():
            if reported := figures.phase_table(starts):
                label = f"{run.name}, {figures.MODES[mode]}: phases of {VARIANTS[variant].label}"
                said = ", ".join(f"{fact} {value}" for fact, value in figures.facts(starts).items())
                print(label, reported, f"  {said}", "", sep="\n", flush=True)
    ratios = figures.ratios(found)
    print(*figures.verdicts(ratios), *figures.disturbed(found), sep="\n", flush=True)
    return {
        "ratios": ratios,
        "kv_cache_bytes": run.case.kv_cache_bytes,
        "other_cores": figures.other_cores(found),
        "modes": figures.as_json(found),
    }


def levers(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """What each lever gives: the worker with all of them, and with one switched off, in turn."""
    result: dict[str, Any] = {}
    groups = lever_groups(LEVERS)
    able = {shown: group for shown, group in groups.items() if possible([shown])}
    todo = {
        shown: (
            first_turns(variants[:1]) if mode != "empty" else [],
            turns(mode, variants, options.rounds),
        )
        for shown, (mode, variants) in able.items()
    }
    run.announce([turn for first, measured in todo.values() for turn in (*first, *measured)])
    for shown, (first, measured) in todo.items():
        run.starts(first)
        found = run.starts(measured)
        label = figures.MODES.get(shown, "the model compiled, caches warm")
        print("", f"{run.name}, {label}", figures.lever_table(found), sep="\n")
        print(*figures.disturbed({shown: found}), sep="\n", flush=True)
        result[shown] = figures.lever_json(found)
    return {"levers": result}


def lever_groups(levers: Mapping[str, Lever]) -> dict[str, tuple[str, list[Variant]]]:
    """How the levers are measured together: by what they show in, the mode, and the worker with and without.

    The first variant, which has no name, has every lever.
    """
    groups: dict[str, tuple[str, list[Variant]]] = {}
    for lever in levers.values():
        shown = lever.shows_in
        settings = {"ENFORCE_EAGER": "false"} if shown == "compiled" else {}
        everything = Variant("", "all levers", "worker", settings=settings)
        _, variants = groups.setdefault(shown, ("warm" if shown == "compiled" else shown, [everything]))
        without = {**settings, "LEVERS_OFF": lever.name}
        variants.append(Variant(lever.name, f"without {lever.name}", "worker", settings=without))
    return groups


def possible(modes: Sequence[str]) -> list[str]:
    """`modes` without the one that this machine does not allow, which is told."""
    if "dropped" in modes and (why := drop_page_cache()):
        print(f"left out, what is measured with a dropped page cache: {why}", flush=True)
        return [mode for mode in modes if mode != "dropped"]
    return list(modes)


def planned(starts: Sequence[Start]) -> int | None:
    """The size of the KV cache that our worker planned, in bytes; None if it planned none."""
    size_bytes = figures.facts(starts).get("kv_cache_bytes")
    return size_bytes if isinstance(size_bytes, int) else None


if __name__ == "__main__":
    sys.exit(main())
