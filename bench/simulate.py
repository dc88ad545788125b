"""Ranks scaling policies on a trace: `python -m bench.simulate`.

The gateway's own queue and policy on a virtual clock, workers as assumed (`bench.simulator.Replica`): what it
shows is how policies compare, not what a machine does. Prints a table and ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from bench import traces
from bench.policies import ranked
from bench.simulator import Door, Outcome, Replica, Simulation
from bench.traces import Arrival, BadTrace, Sizes

HEAD = ("policy", "p50 wait", "p99 wait", "p99 first token", "GPU-hours", "starts", "most", "refused", "late")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what `argv` asks for; returns the exit code."""
    args = _parser().parse_args(argv)
    replica = Replica(
        args.cold_start, args.slots, args.prefill, args.token_ms / 1e3, args.token_more_ms / 1e3
    )
    door = Door(args.queue_limit, args.queue_timeout)
    sizes = Sizes(args.prompt, args.output)
    try:
        if args.trace in traces.KINDS:
            trace = traces.generated(args.trace, args.rate, args.hours * 3600, args.seed, sizes)
        else:
            trace = traces.read(Path(args.trace))
    except BadTrace as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 65
    except OSError as error:
        kinds = ", ".join(traces.KINDS)
        print(f"simulate: {args.trace} is none of {kinds}, and no file: {error.strerror}", file=sys.stderr)
        return 65
    if args.write:
        traces.write(args.write, trace)
    began_s = time.monotonic()
    mean = mean_workers(trace, replica)
    most = args.max_workers or max(2, 2 * mean)
    policies = ranked(most, replica.slots, mean)
    chosen = {name: make for name, make in policies.items() if args.policy in name}
    if not chosen:
        print(f"simulate: --policy {args.policy} is in no name of {', '.join(policies)}", file=sys.stderr)
        return 64
    found = {
        name: figures(Simulation(trace, make(), replica, most=most, door=door).run())
        for name, make in chosen.items()
    }
    length_s = trace[-1].at_s if trace else 0.0
    print(
        f"{len(trace)} requests in {length_s / 3600:.2f} h, {args.trace}, seed {args.seed}; {replica}; {door}"
    )
    print(table(found))
    print(f"simulated in {time.monotonic() - began_s:.1f} s", file=sys.stderr)
    if args.svg:
        args.svg.write_text(picture(found))
    given = {"trace": args.trace, "seed": args.seed, "requests": len(trace), "max_workers": most}
    print(json.dumps({**given, "replica": asdict(replica), "door": asdict(door), "policies": found}))
    return 0


def mean_workers(trace: Sequence[Arrival], replica: Replica) -> int:
    """How many full workers the trace would keep busy if it came evenly; at least one."""
    busy_s = sum(map(replica.busy_s, trace)) / replica.slots
    return max(1, math.ceil(busy_s / max(1.0, trace[-1].at_s if trace else 1.0)))


def figures(outcome: Outcome) -> dict[str, Any]:
    """What is told of a run. Of nobody answered there is no wait: null."""
    return {
        "wait_p50_s": percentile(outcome.waits_s, 50),
        "wait_p99_s": percentile(outcome.waits_s, 99),
        "ttft_p99_s": percentile(outcome.ttft_s, 99),
        "gpu_hours": round(outcome.worker_s / 3600, 3),
        "cold_starts": outcome.cold_starts,
        "most_workers": outcome.most_workers,
        "refused": outcome.refused,
        "late": outcome.late,
    }


def percentile(values: Sequence[float], share: int) -> float | None:
    """The least value that `share` percent of `values` do not exceed, to a millisecond."""
    if not values:
        return None
    return round(sorted(values)[max(0, math.ceil(len(values) * share / 100) - 1)], 3)


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as a table of Markdown."""

    def seconds(value: float | None) -> str:
        return "" if value is None else f"{value:.2f} s"

    rows = [
        (
            name,
            *(seconds(one[what]) for what in ("wait_p50_s", "wait_p99_s", "ttft_p99_s")),
            f"{one['gpu_hours']:.2f}",
            *(str(one[what]) for what in ("cold_starts", "most_workers", "refused", "late")),
        )
        for name, one in found.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *rows))


WIDTH, HEIGHT, EDGE = 760, 420, 60
WAIT_LOW_S = 0.01
FONT = 'font-family="system-ui, sans-serif" font-size="11"'


def picture(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Each policy as a point: GPU-hours to the right, p99 wait upwards (by powers of ten), as an SVG."""
    points = {name: one for name, one in found.items() if one["wait_p99_s"] is not None}
    hours_most = max((one["gpu_hours"] for one in points.values()), default=1.0) or 1.0
    waits = [max(WAIT_LOW_S, one["wait_p99_s"]) for one in points.values()]
    low, high = math.log10(WAIT_LOW_S), math.ceil(math.log10(max([1.0, *waits])))

    def x(hours: float) -> float:
        return EDGE + hours / hours_most * (WIDTH - 5 * EDGE)

    def y(wait_s: float) -> float:
        share = (math.log10(max(WAIT_LOW_S, wait_s)) - low) / (high - low)
        return HEIGHT - EDGE - share * (HEIGHT - 2 * EDGE)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" {FONT}>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{EDGE}" y="{EDGE / 2}">p99 wait</text>',
        f'<text x="{WIDTH - 4 * EDGE}" y="{HEIGHT - EDGE / 3}" text-anchor="end">GPU-hours</text>',
    ]
    for power in range(int(low), high + 1):
        at = y(10.0**power)
        parts.append(f'<line x1="{EDGE}" x2="{WIDTH - 4 * EDGE}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{EDGE - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g} s</text>')
    for hours in (0.0, hours_most / 2, hours_most):
        below = f'x="{x(hours):.1f}" y="{HEIGHT - EDGE + 16}"'
        parts.append(f'<text {below} text-anchor="middle">{hours:.4g}</text>')
    taken: list[float] = []
    for name, one in sorted(points.items(), key=lambda item: y(item[1]["wait_p99_s"])):
        at_x, at_y = x(one["gpu_hours"]), y(one["wait_p99_s"])
        label_y = at_y
        while any(abs(label_y - other) < 13 for other in taken):
            label_y += 1
        taken.append(label_y)
        colour = "#4269d0" if name.startswith("ours") else "#ff725c"
        told = f"{one['gpu_hours']:g} GPU-hours, p99 wait {one['wait_p99_s']:g} s"
        where = f'cx="{at_x:.1f}" cy="{at_y:.1f}" r="5" fill="{colour}"'
        parts.append(f"<circle {where}><title>{escape(told)}</title></circle>")
        parts.append(f'<text x="{at_x + 9:.1f}" y="{label_y + 4:.1f}">{escape(name)}</text>')
    return "".join([*parts, "</svg>\n"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.simulate", description=__doc__)
    of_day = Sizes()
    replica, door = Replica(), Door()
    parser.add_argument(
        "--trace", default="diurnal", help=f"one of {', '.join(traces.KINDS)}, or a CSV file; %(default)s"
    )
    parser.add_argument(
        "--rate", type=_positive, default=1.157, help="requests a second on average; %(default)s"
    )
    parser.add_argument("--hours", type=_positive, default=24.0, help="of a generated trace; %(default)s")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompt", type=_positive, default=of_day.prompt, help="median tokens; %(default)s")
    parser.add_argument("--output", type=_positive, default=of_day.output, help="median tokens; %(default)s")
    parser.add_argument(
        "--cold-start", type=_positive, default=replica.cold_start_s, help="seconds; %(default)s"
    )
    parser.add_argument("--slots", type=_count, default=replica.slots, help="requests at once; %(default)s")
    parser.add_argument(
        "--prefill", type=_positive, default=replica.prefill_per_s, help="tokens/s; %(default)s"
    )
    parser.add_argument("--token-ms", type=_positive, default=replica.token_s * 1e3, help="%(default)s")
    parser.add_argument(
        "--token-more-ms",
        type=float,
        default=replica.token_more_s * 1e3,
        help="for each beside it; %(default)s",
    )
    parser.add_argument("--max-workers", type=_count, help="if not given: twice what would do on average")
    parser.add_argument("--queue-limit", type=int, default=door.queue_limit)
    parser.add_argument("--queue-timeout", type=_positive, default=door.queue_timeout_s)
    parser.add_argument("--policy", default="", help="only those whose names have this in them")
    parser.add_argument("--svg", type=_file, metavar="FILE", help="a picture of the ranking")
    parser.add_argument("--write", type=_file, metavar="FILE", help="the trace, as CSV")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():  # known before what takes minutes
        raise argparse.ArgumentTypeError(f"{path.parent} is no folder")
    return path


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `... | head` has seen enough; nor does Python's end say more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
