"""A cold start as a waterfall: in a terminal, or as a picture.

Reads the JSON line that a worker logs at its start (`Phases.report()`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any
from xml.sax.saxutils import escape

from handler.errors import UsageError

Report = Mapping[str, Any]

_LINE = re.compile(r"cold start (\{.*\})")


def find(lines: Iterable[str]) -> Report:
    """The last report in `lines`: a worker's log, or the JSON alone. Raises `UsageError`."""
    found: Report | None = None
    for line in lines:
        match = _LINE.search(line)
        text = match.group(1) if match else line.strip()
        if not text.startswith("{"):
            continue
        try:
            value = json.loads(text)
        except ValueError:
            continue
        if isinstance(value, dict) and {"total_s", "phases"} <= value.keys():
            found = value
    if found is None:
        raise UsageError(
            "no cold start in the input; a worker logs one line with `cold start {...}` when it is ready"
        )
    return found


def held_by(phase: Mapping[str, Any]) -> str:
    """What held a phase up: `cpu`, `disk` or `waiting` (a GPU, a network, another process)."""
    wall_s = phase["end_s"] - phase["begin_s"]
    if phase.get("cpu_s", 0.0) >= 0.7 * wall_s:
        return "cpu"
    return "disk" if phase.get("major_faults", 0) > 100 else "waiting"


def waterfall(report: Report, *, width: int = 80) -> str:
    """The phases of `report`, a line each, on a time axis `width` characters wide in all."""
    phases = report["phases"]
    total_s = report["total_s"] or max((phase["end_s"] for phase in phases), default=0.0)
    label = max((len(phase["name"]) for phase in phases), default=0)
    room = max(10, width - label - 34)
    lines = [f"{'':{label}} {'wall s':>7} {'cpu s':>7} {'faults':>7}  held by"]
    for phase in phases:
        wall_s = phase["end_s"] - phase["begin_s"]
        at = round(room * phase["begin_s"] / total_s) if total_s else 0
        length = max(1, round(room * wall_s / total_s)) if total_s else 1
        bar = " " * min(at, room - 1) + "█" * min(length, room - min(at, room - 1))
        cpu_s, faults = phase.get("cpu_s", 0.0), phase.get("major_faults", 0)
        lines.append(
            f"{phase['name']:{label}} {wall_s:7.2f} {cpu_s:7.2f} {faults:7d}  {held_by(phase):7} {bar}"
        )
    lines.append(f"first token after {total_s:.2f} s")
    lines += [f"{name}: {value}" for name, value in report.get("facts", {}).items()]
    return "\n".join(lines)


_ROW, _LEFT, _WIDE, _TOP = 22, 190, 560, 34
_COLOURS = {"cpu": "#4269d0", "disk": "#efb118", "waiting": "#9498a0"}


def svg(report: Report) -> str:
    """The phases of `report` as an SVG document."""
    phases = report["phases"]
    total_s = report["total_s"] or max((phase["end_s"] for phase in phases), default=1.0)
    height = _TOP + _ROW * len(phases) + 30
    rows = []
    for index, phase in enumerate(phases):
        wall_s = phase["end_s"] - phase["begin_s"]
        name, wide = escape(phase["name"]), max(1.5, _WIDE * wall_s / total_s)
        x, y = _LEFT + _WIDE * phase["begin_s"] / total_s, _TOP + _ROW * index
        used = f"{phase.get('cpu_s', 0):.2f} s CPU, {phase.get('major_faults', 0)} major faults"
        rows.append(
            f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{name}</text>'
            f'<rect x="{x:.1f}" y="{y + 3}" width="{wide:.1f}" height="{_ROW - 8}" '
            f'fill="{_COLOURS[held_by(phase)]}"><title>{name}: {wall_s:.2f} s wall, {used}</title></rect>'
            f'<text x="{_LEFT + _WIDE + 8}" y="{y + 14}">{wall_s:.2f} s</text>'
        )
    legend = "".join(
        f'<rect x="{_LEFT + 90 * index}" y="{height - 20}" width="10" height="10" fill="{colour}"/>'
        f'<text x="{_LEFT + 90 * index + 15}" y="{height - 11}">{name}</text>'
        for index, (name, colour) in enumerate(_COLOURS.items())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDE + 80}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/>'
        f'<text x="{_LEFT}" y="20" font-weight="bold">first token after {total_s:.2f} s</text>'
        + "".join(rows)
        + legend
        + "</svg>\n"
    )
