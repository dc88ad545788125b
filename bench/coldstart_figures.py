"""From cold starts to medians, tables, ratios and the line of JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from bench.start import VARIANTS, Start, Variant

Found = Mapping[str, Sequence[Start]]
"""The starts of each variant in one mode, by its name."""

MODES: Mapping[str, str] = {
    "warm": "caches warm",
    "dropped": "page cache dropped before each start",
    "empty": "caches empty",
    "nopyc": "no .pyc files",
}
GOALS: Mapping[str, float] = {
    "ratio_default": 0.16,
    "ratio_eager": 0.22,
    "ratio_cold_cache": 0.25,
    "ratio_fork": 0.02,
    "memory_ratio": 0.5,
}
"""Ours by vLLM's: none may be larger."""
QUIET_CORES = 0.1
"""Beyond this much work by others the figures are not to be trusted."""

_MIB = 1 << 20


def table(found: Found, variants: Mapping[str, Variant] = VARIANTS) -> str:
    """A line for each variant: median (min - max) of the time to first token, ratios, CPU, memory."""
    lines = [
        _row(
            "",
            ("first token", 12),
            ("min - max", 16),
            ("n", 3),
            ("of vLLM", 9),
            ("of eager", 9),
            ("CPU", 8),
            ("peak", 10),
            ("PSS", 10),
        )
    ]
    for variant, starts in found.items():
        if not starts:
            lines.append(f"  {variants[variant].label:<20}did not start")
            continue
        of = [ratio(found, variant, peer) for peer in ("vllm", "vllm-eager")]
        lines.append(
            _row(
                variants[variant].label,
                (f"{first_s(starts):.2f} s", 12),
                (_spread([start.first_s for start in starts]), 16),
                (str(len(starts)), 3),
                ("" if of[0] is None else f"{of[0]:.3f}", 9),
                ("" if of[1] is None else f"{of[1]:.3f}", 9),
                (f"{median(start.cpu_s for start in starts):.1f} s", 8),
                (f"{_peak_mib(starts):,.0f} MiB", 10),
                (f"{_median_mib(starts, lambda start: start.pss_bytes):,.0f} MiB", 10),
            )
        )
    return "\n".join(lines)


def _row(label: str, *cells: tuple[str, int]) -> str:
    return (f"  {label:<20}" + "".join(f"{text:>{width}}" for text, width in cells)).rstrip()


def phases(starts: Sequence[Start]) -> dict[str, dict[str, float]]:
    """The phases that our worker reports, in their order: medians, and the spread of the wall time.

    Phases overlap and nest, so they do not add up.
    """
    reports = [start.report for start in starts if start.report is not None]
    names = dict.fromkeys(phase["name"] for report in reports for phase in report["phases"])
    found = {}
    for name in names:
        spans = [phase for report in reports for phase in report["phases"] if phase["name"] == name]
        walls_s = [span["end_s"] - span["begin_s"] for span in spans]
        found[name] = {
            "wall_s": round(median(walls_s), 3),
            "wall_min_s": round(min(walls_s), 3),
            "wall_max_s": round(max(walls_s), 3),
            "cpu_s": round(median(span["cpu_s"] for span in spans), 3),
            "major_faults": median(span["major_faults"] for span in spans),
        }
    return found


def side_by_side(found: Found, variants: Mapping[str, Variant]) -> str:
    """The median wall time of each phase, a column for each variant that reports them."""
    of = {name: phases(starts) for name, starts in found.items() if any(start.report for start in starts)}
    widths = {name: max(9, len(variants[name].label) + 2) for name in of}
    lines = [_row("", *((variants[name].label, widths[name]) for name in of))]
    for phase in dict.fromkeys(phase for reported in of.values() for phase in reported):
        walls = [(reported.get(phase, {}).get("wall_s"), widths[name]) for name, reported in of.items()]
        lines.append(
            _row(phase, *(("" if wall is None else f"{wall:.2f} s", width) for wall, width in walls))
        )
    return "\n".join(lines)


def phase_table(starts: Sequence[Start]) -> str:
    """The phases as a table, or nothing where none was reported."""
    lines = [_row("", ("wall", 9), ("min - max", 16), ("CPU", 9), ("faults", 8))]
    lines += [
        _row(
            name,
            (f"{phase['wall_s']:.2f} s", 9),
            (f"{phase['wall_min_s']:.2f} - {phase['wall_max_s']:.2f}", 16),
            (f"{phase['cpu_s']:.2f} s", 9),
            (f"{phase['major_faults']:.0f}", 8),
        )
        for name, phase in phases(starts).items()
    ]
    return "\n".join(lines) if len(lines) > 1 else ""


def facts(starts: Sequence[Start]) -> dict[str, Any]:
    """What our worker says of its last start beside its phases; of rates the median of all starts."""
    reported = [start.report.get("facts", {}) for start in starts if start.report is not None]
    if not reported:
        return {}
    rates = [fact["weights_gb_per_s"] for fact in reported if "weights_gb_per_s" in fact]
    return {**reported[-1], **({"weights_gb_per_s": median(rates)} if rates else {})}


def differing(found: Found) -> Iterator[str]:
    """A line if not all eager variants said the same, and one if the compiled one said something else."""
    compiled = {start.text for start in found.get("vllm", ())}
    eager = {start.text for name, starts in found.items() if name != "vllm" for start in starts}
    if len(eager) > 1:
        yield f"  not all said the same: {sorted(eager)}"
    if eager and compiled - eager:
        yield (
            f"  the compiled model, which rounds otherwise, said {sorted(compiled)}; "
            f"the eager one {sorted(eager)}"
        )


def ratios(found: Mapping[str, Found]) -> dict[str, float | None]:
    """Ours by vLLM's, from the starts in each mode; None for what was not measured."""
    warm, dropped = found.get("warm", {}), found.get("dropped", {})
    memory = [_peak_mib(warm[name]) for name in ("worker", "vllm") if warm.get(name)]
    return {
        "ratio_default": ratio(warm, "worker", "vllm"),
        "ratio_eager": ratio(warm, "worker", "vllm-eager"),
        "ratio_cold_cache": ratio(dropped, "worker", "vllm"),
        "ratio_fork": ratio(warm, "fork", "vllm"),
        "memory_ratio": round(memory[0] / memory[1], 3) if len(memory) == 2 else None,
    }


def verdicts(ratios: Mapping[str, float | None]) -> Iterator[str]:
    """Each goal and whether it is met, a line each."""
    for name, goal in GOALS.items():
        value = ratios[name]
        if value is None:
            yield f"{name}, goal <= {goal:g}: not measured"
        else:
            yield f"{name} {value:.3f}, goal <= {goal:g}: {'met' if value <= goal else 'missed'}"


def disturbed(found: Mapping[str, Found]) -> Iterator[str]:
    """A line if others took enough of the machine for the figures to be wrong."""
    others = other_cores(found)
    if others > QUIET_CORES:
        yield f"not a quiet machine: others took up to {others:.2f} cores during a start; measure again"


def other_cores(found: Mapping[str, Found]) -> float:
    """The most that others took during one start."""
    cores = (
        start.other_cores for starts_of in found.values() for starts in starts_of.values() for start in starts
    )
    return round(max(cores, default=0.0), 2)


def as_json(found: Mapping[str, Found]) -> dict[str, Any]:
    """Every start, by mode and variant; seconds as they were measured, the rest as medians."""
    return {
        mode: {variant: _json(starts) for variant, starts in variants.items() if starts}
        for mode, variants in found.items()
    }


def _json(starts: Sequence[Start]) -> dict[str, Any]:
    return {
        "first_s": [round(start.first_s, 3) for start in starts],
        "first_median_s": round(first_s(starts), 3),
        "cpu_s": round(median(start.cpu_s for start in starts), 2),
        "peak_mib": round(_peak_mib(starts)),
        "pss_mib": round(_median_mib(starts, lambda start: start.pss_bytes)),
        "texts": sorted({start.text for start in starts}),
        **({"phases": phases(starts), "facts": facts(starts)} if starts[-1].report else {}),
    }


def lever_table(found: Found) -> str:
    """A line for each lever: how much longer a start is without it. The name "" is that of all on."""
    lines = [_row("", ("first token", 12), ("min - max", 17), ("n", 4), ("the lever gives", 17))]
    for name, starts in found.items():
        label = f"without {name}" if name else "all levers"
        if not starts:
            lines.append(f"  {label:<20}did not start")
            continue
        gives_s = _gives_s(found, name)
        lines.append(
            _row(
                label,
                (f"{first_s(starts):.2f} s", 12),
                (_spread([start.first_s for start in starts]), 17),
                (str(len(starts)), 4),
                ("" if not name or gives_s is None else f"{gives_s:+.2f} s", 17),
            )
        )
    return "\n".join(lines)


def lever_json(found: Found) -> dict[str, Any]:
    """Of each lever the seconds it gives, and every start without it; `all` is with every lever."""
    return {
        name or "all": {
            "gives_s": _gives_s(found, name) if name else None,
            "first_s": [round(start.first_s, 3) for start in starts],
        }
        for name, starts in found.items()
        if starts
    }


def _gives_s(found: Found, name: str) -> float | None:
    return round(first_s(found[name]) - first_s(found[""]), 3) if found[""] and found[name] else None


def ratio(found: Found, ours: str, theirs: str) -> float | None:
    """The median of `ours` by that of `theirs`; None if one was not measured."""
    if not found.get(ours) or not found.get(theirs):
        return None
    return round(first_s(found[ours]) / first_s(found[theirs]), 4)


def first_s(starts: Sequence[Start]) -> float:
    """The median of the times to first token."""
    return median(start.first_s for start in starts)


def _peak_mib(starts: Sequence[Start]) -> float:
    return _median_mib(starts, lambda start: start.peak_bytes)


def _median_mib(starts: Sequence[Start], of: Callable[[Start], int]) -> float:
    return median(of(start) for start in starts) / _MIB


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.2f} - {max(values):.2f}"
