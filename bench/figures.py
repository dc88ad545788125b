"""From what was measured to the figures, the table and the line of JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

LABELS: Mapping[str, str] = {
    "vllm": "vLLM's own server",
    "worker": "worker alone",
    "gateway": "gateway + worker",
}
"""What the paths to the model are called; the first is the peer, each next one hop more of ours."""

GOALS: Mapping[str, tuple[str, float]] = {
    "ttft_ratio": ("<=", 1.05),
    "tokens_ratio": (">=", 1.0),
    "gateway_tokens_ratio": (">=", 0.9),
}


@dataclass(frozen=True, slots=True)
class Window:
    """One server, measured for some seconds in one round with so many streams."""

    path: str
    streams: int
    first_s: Sequence[float]
    """Time to the first text of each answer."""
    tokens: int
    wall_s: float
    cpu_s: float
    """What the server took, all its processes together."""
    other_cores: float = 0.0
    """How many cores were busy on average with what is neither server nor load generator."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One path at one number of streams: each field is the median of the rounds."""

    first_p50_s: float
    first_p99_s: float
    tokens_per_s: float
    tokens_per_s_min: float
    tokens_per_s_max: float
    cpu_s_per_token: float
    cores: float

    @classmethod
    def of(cls, windows: Sequence[Window]) -> Figures:
        """The figures of the rounds in `windows`, of which there is at least one."""
        speeds = [window.tokens / window.wall_s for window in windows]
        return cls(
            first_p50_s=median(percentile(window.first_s, 50) for window in windows),
            first_p99_s=median(percentile(window.first_s, 99) for window in windows),
            tokens_per_s=median(speeds),
            tokens_per_s_min=min(speeds),
            tokens_per_s_max=max(speeds),
            cpu_s_per_token=median(window.cpu_s / window.tokens for window in windows),
            cores=median(window.cpu_s / window.wall_s for window in windows),
        )


Results = Mapping[int, Mapping[str, Figures]]
"""By the number of streams, then by path."""


def percentile(values: Iterable[float], percent: float) -> float:
    """The percentile of `values`, of which there is at least one; between two of them linear."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    return below + (above - below) * (place - math.floor(place))


def results(windows: Iterable[Window]) -> Results:
    """The figures of every path and number of streams in `windows`."""
    grouped: dict[int, dict[str, list[Window]]] = {}
    for window in windows:
        grouped.setdefault(window.streams, {}).setdefault(window.path, []).append(window)
    return {
        streams: {path: Figures.of(paths[path]) for path in LABELS}
        for streams, paths in sorted(grouped.items())
    }


def table(results: Results) -> str:
    """A block per number of streams: the three paths, what the gateway adds, and the ratios."""
    lines = [_row("", "TTFT p50", "p99", "tokens/s", "min - max", "CPU/token", "cores")]
    for streams, paths in results.items():
        peer, worker, gateway = (paths[path] for path in LABELS)
        lines += ["", f"{streams} stream{'s' if streams > 1 else ''}"]
        lines += [_measured(LABELS[path], figures) for path, figures in paths.items()]
        lines.append(_difference("the gateway adds", gateway, worker))
        lines.append(_ratios("worker / vLLM", worker, peer))
        lines.append(_ratios("gateway / vLLM", gateway, peer))
    return "\n".join(lines)


def _measured(label: str, of: Figures) -> str:
    span = f"{of.tokens_per_s_min:,.0f} - {of.tokens_per_s_max:,.0f}"
    return _row(
        label,
        f"{of.first_p50_s * 1e3:.1f} ms",
        f"{of.first_p99_s * 1e3:.1f} ms",
        f"{of.tokens_per_s:,.1f}",
        span,
        f"{of.cpu_s_per_token * 1e3:.3f} ms",
        f"{of.cores:.2f}",
    )


def _difference(label: str, one: Figures, other: Figures) -> str:
    return _row(
        label,
        f"{(one.first_p50_s - other.first_p50_s) * 1e3:+.1f} ms",
        f"{(one.first_p99_s - other.first_p99_s) * 1e3:+.1f} ms",
        f"{(one.tokens_per_s / other.tokens_per_s - 1) * 100:+.1f} %",
        "",
        f"{(one.cpu_s_per_token - other.cpu_s_per_token) * 1e3:+.3f} ms",
        f"{one.cores - other.cores:+.2f}",
    )


def _ratios(label: str, one: Figures, other: Figures) -> str:
    def ratio(field: Callable[[Figures], float]) -> str:
        return f"{field(one) / field(other):.3f}"

    return _row(
        label,
        ratio(lambda figures: figures.first_p50_s),
        ratio(lambda figures: figures.first_p99_s),
        ratio(lambda figures: figures.tokens_per_s),
        "",
        ratio(lambda figures: figures.cpu_s_per_token),
        ratio(lambda figures: figures.cores),
    )


def _row(label: str, *cells: str) -> str:
    widths = (11, 11, 11, 17, 12, 7)
    return (
        f"  {label:<18}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    ).rstrip()


def ratios(results: Results) -> dict[str, float]:
    """Ours by vLLM's at the largest number of streams."""
    paths = results[max(results)]
    peer, worker, gateway = (paths[path] for path in LABELS)
    found = {
        "ttft_ratio": worker.first_p50_s / peer.first_p50_s,
        "tokens_ratio": worker.tokens_per_s / peer.tokens_per_s,
        "gateway_tokens_ratio": gateway.tokens_per_s / peer.tokens_per_s,
        "gateway_ttft_ratio": gateway.first_p50_s / peer.first_p50_s,
        "ttft_p99_ratio": worker.first_p99_s / peer.first_p99_s,
        "gateway_ttft_p99_ratio": gateway.first_p99_s / peer.first_p99_s,
    }
    return {name: round(value, 3) for name, value in found.items()}


def verdicts(ratios: Mapping[str, float]) -> list[str]:
    """Each goal and whether it is met, a line each."""
    lines = []
    for name, (sign, goal) in GOALS.items():
        met = ratios[name] <= goal if sign == "<=" else ratios[name] >= goal
        lines.append(f"{name} {ratios[name]:.3f}, goal {sign} {goal:g}: {'met' if met else 'missed'}")
    return lines


def line(windows: Sequence[Window], facts: Mapping[str, object]) -> dict[str, object]:
    """The line of JSON: the ratios, `facts`, and the figures of every number of streams."""
    found = results(windows)
    return {
        **ratios(found),
        "streams": max(found),
        **facts,
        "other_cores": round(max(window.other_cores for window in windows), 2),
        "results": {
            str(streams): {path: _json(figures) for path, figures in paths.items()}
            for streams, paths in found.items()
        },
    }


def _json(figures: Figures) -> dict[str, float]:
    return {
        "ttft_p50_ms": round(figures.first_p50_s * 1e3, 2),
        "ttft_p99_ms": round(figures.first_p99_s * 1e3, 2),
        "tokens_per_s": round(figures.tokens_per_s, 1),
        "cpu_ms_per_token": round(figures.cpu_s_per_token * 1e3, 4),
    }
