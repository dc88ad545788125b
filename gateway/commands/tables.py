"""Text and tables as a terminal shows them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: str) -> str:
    """`text` without what a terminal would obey: whoever wrote it, the model has only repeated it."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def table(rows: Sequence[Sequence[object]], *, right: Collection[str] = ()) -> str:
    """`rows`, the first of which has the names of the columns; those in `right` have numbers."""
    cells = [[plain(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numbers = [name in right for name in cells[0]]
    return "".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        + "\n"
        for row in cells
    )
