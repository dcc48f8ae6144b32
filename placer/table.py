"""Plain text tables: columns that line up, on a terminal and in a log file alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def aligned(
    header: Sequence[str], rows: Iterable[Sequence[str | None]], *, left: Sequence[int] = (0,)
) -> str:
    """Lay out a table in plain text.

    Parameters
    ----------
    header : sequence of str
        Names of the columns.
    rows : iterable of sequences
        Cells as text, as many as columns; None is shown as ``-``.
    left : sequence of int
        Columns that are flush left; the others are flush right, as numbers want to be.

    Returns
    -------
    str
        Lines without trailing blanks, joined by newlines.

    Examples
    --------
    >>> print(aligned(["method", "load"], [["linear", "1.21"], ["lpt", None]]))
    method  load
    linear  1.21
    lpt        -
    """
    cells = [list(header), *([("-" if cell is None else cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        parts = [
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)
