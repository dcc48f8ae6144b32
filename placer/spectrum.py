"""spectrum: the trade of load against traffic, and the cap with the least modelled step time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from placer.errors import InvalidInput
from placer.problem import Problem
from placer.report import Report, format_seconds
from placer.result import Budget, Result
from placer.trace import Trace
from placer.variants import solved

CAPS: tuple[float | None, ...] = (None, 1.25, 1.10, 1.05, 1.02)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One load cap: what was found under it, and what that costs on the trace."""

    max_load: float | None
    result: Result
    report: Report


def spectrum(
    problem: Problem,
    trace: Trace,
    method: str = "auto",
    *,
    caps: Sequence[float | None] = CAPS,
    budget: Budget | None = None,
    evaluation: dict[str, Any] | None = None,
    on_cap: Callable[[float | None], None] | None = None,
    **options: Any,
) -> list[Point]:
    """Solve under several load caps, which share the budget, best modelled step time first.

    Parameters
    ----------
    problem : Problem
        Its own cap is not used.
    trace : Trace
        The trace of the problem; prices each placement.
    method : str
    caps : sequence of float or None
        Loads over mean; None for no cap.
    budget : Budget, optional
        For all caps together; 60 seconds by default.
    evaluation : dict, optional
        Further arguments of `evaluate`.
    on_cap : callable, optional
        Called with each cap before it is solved.
    **options
        Further arguments of `solve`.

    Raises
    ------
    InvalidInput
        When no cap is given.

    Examples
    --------
    >>> import numpy as np
    >>> from placer import Problem, Topology, Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 2]], [[1, 3]]]), num_experts=4)
    >>> topology = Topology.load("dgx-h100").with_shape("1x2x1")
    >>> points = spectrum(Problem.from_trace(trace, topology), trace, "lpt", caps=(None, 1.05))
    >>> [point.report.touched["server"] for point in points]
    [1.0, 1.0]
    """
    if not caps:
        raise InvalidInput("spectrum: found no load cap, expected at least one")
    variants = [{"max_load": cap} for cap in caps]
    found = solved(problem, variants, trace, method, budget=budget, evaluation=evaluation, **options)
    points = []
    for cap in caps:
        if on_cap is not None:
            on_cap(cap)
        result, report = next(found)
        points.append(Point(max_load=cap, result=result, report=report))
    return sorted(points, key=lambda point: point.report.seconds["step"])


def chosen(points: Sequence[Point]) -> Result:
    """The first point's result, which says in its notes what it was chosen from."""
    tried = ", ".join(
        f"{'none' if point.max_load is None else format(point.max_load, 'g')}: "
        f"{format_seconds(point.report.seconds['step'])}"
        for point in points
    )
    best = points[0]
    note = f"load cap {'none' if best.max_load is None else format(best.max_load, 'g')} chosen by step time ({tried})"
    return replace(
        best.result,
        notes=(*best.result.notes, note),
        seconds=sum(point.result.seconds for point in points),
    )
