"""The table that a search ends with: what was found, beside the placements that anyone could have made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from placer.report import format_seconds
from placer.table import aligned

if TYPE_CHECKING:
    from placer.placement import Placement
    from placer.problem import Problem
    from placer.report import Report
    from placer.trace import Trace

PEER = "eplb"  # what serving stacks run by themselves


@dataclass(frozen=True, kw_only=True)
class Row:
    """A placement, and what it costs on the trace.

    Parameters
    ----------
    name : str
    placement : Placement
    report : Report
    seconds : float or None
        Wall seconds of its search and its bound; None where that is not known.
    """

    name: str
    placement: Placement
    report: Report
    seconds: float | None = None


def peers(problem: Problem, trace: Trace, linear: Row, **pricing: Any) -> list[Row]:
    """Placements to hold a result against: contiguous experts, and EPLB's in as many slots.

    EPLB keeps neither constraints nor load caps. Where it cannot run, or gives contiguous experts too, `linear` is
    alone.

    Parameters
    ----------
    problem : Problem
    trace : Trace
        The trace of the problem.
    linear : Row
        Contiguous experts.
    **pricing
        Further arguments of `placer.evaluate`.
    """
    from placer.baseline import arranged
    from placer.errors import PlacerError
    from placer.evaluation import evaluate

    free = replace(problem, constraints=None, load_model="tokens")
    try:
        found = arranged(free, PEER)
        if found.digest == linear.placement.digest:
            return [replace(linear, name=f"{linear.name}, {PEER}")]
        report = evaluate(found, trace, problem.topology, **pricing)
    except PlacerError:
        return [linear]
    return [linear, Row(name=PEER, placement=found, report=report)]


def summary(rows: Sequence[Row], level: str) -> str:
    """A line for each placement, and one for what the last of them gains on each of the others.

    Parameters
    ----------
    rows : sequence of Row
        The last is the one that was searched for.
    level : str
        The level whose traffic decides; with copies its remote units count.

    Returns
    -------
    str
        A plain table. Negative changes are better, in every column.
    """
    found = rows[-1]
    word = "remote" if any(row.placement.has_copies for row in rows) else "touched"
    levels = dict.fromkeys(("gpu", level))

    def numbers(row: Row) -> list[float]:
        loads = [row.report.load[each]["max_over_mean"] for each in levels]
        return [getattr(row.report, word)[level], *loads, row.report.seconds["step"]]

    lines = [
        [
            row.name,
            *(f"{number:.3f}" for number in numbers(row)[:-1]),
            format_seconds(numbers(row)[-1]),
            None if row.seconds is None else f"{row.seconds:.1f} s",
        ]
        for row in rows
    ]
    for row in rows[:-1]:
        pairs = zip(numbers(row), numbers(found), strict=True)
        lines.append([f"against {row.name}", *(_change(old, new) for old, new in pairs), ""])
    header = ["", f"{word}.{level}", *(f"load.{each}" for each in levels), "step", "time"]
    return aligned(header, lines)


def _change(old: float, new: float) -> str | None:
    return f"{100.0 * (new / old - 1.0):+.1f} %" if old else None
