"""Text and tables as a terminal shows them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TextIO

from handler.plain import plain


def shown_on(out: TextIO) -> Callable[[str], str]:
    """What to make of text that goes to `out`: a terminal gets it plain, a program as it is."""
    return plain if out.isatty() else str


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
