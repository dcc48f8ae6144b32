"""Variants of a problem: solved one after the other within one budget, and priced on the trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from placer.evaluation import evaluate
from placer.problem import Problem
from placer.report import Report
from placer.result import Budget, Event, Result
from placer.solution import solve
from placer.trace import Trace


def solved(
    problem: Problem,
    variants: Sequence[Mapping[str, Any]],
    trace: Trace,
    method: str,
    *,
    budget: Budget | None = None,
    evaluation: Mapping[str, Any] | None = None,
    on_event: Callable[[Event], None] | None = None,
    **options: Any,
) -> Iterator[tuple[Result, Report]]:
    """What is found for each variant, and what that costs on the trace; each is solved when it is asked for.

    Parameters
    ----------
    problem : Problem
    variants : sequence of mapping
        Fields of the problem that change, and their values.
    trace : Trace
        The trace of the problem; prices each placement.
    method : str
    budget : Budget, optional
        For all of them together, in equal shares of its seconds; 60 seconds by default.
    evaluation : mapping, optional
        Further arguments of `evaluate`.
    on_event : callable, optional
        As for `solve`; the label of an event says which variant it is of.
    **options
        Further arguments of `solve`.

    Yields
    ------
    Result, Report

    Examples
    --------
    >>> import numpy as np
    >>> from placer import Problem, Topology, Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 2]], [[1, 3]]]), num_experts=4)
    >>> problem = Problem.from_trace(trace, Topology.load("dgx-h100").with_shape("1x2x1"), max_load=None)
    >>> variants = [{"slots_per_rank": 2}, {"slots_per_rank": 4}]
    >>> [report.remote["server"] for _, report in solved(problem, variants, trace, "linear")]
    [1.0, 0.0]
    """
    whole = budget or Budget()
    share = replace(whole, seconds=None if whole.seconds is None else whole.seconds / len(variants))
    for variant in variants:
        told = labelled(on_event, named(variant))
        result = solve(replace(problem, **variant), method, budget=share, on_event=told, **options)
        yield result, evaluate(result.placement, trace, problem.topology, **(evaluation or {}))


def labelled(on_event: Callable[[Event], None] | None, label: str) -> Callable[[Event], None] | None:
    """A listener whose events carry a label.

    Examples
    --------
    >>> labelled(None, "max load 1.05") is None
    True
    """
    if on_event is None:
        return None
    return lambda event: on_event(replace(event, label=label))


def named(variant: Mapping[str, Any]) -> str:
    """What changes in a variant, in words.

    Examples
    --------
    >>> named({"max_load": None}), named({"slots_per_rank": 9}), named({"max_load": 1.05, "load_margin": 0.0})
    ('max load none', '9 slots a GPU', 'max load 1.05, load margin 0')
    """
    words = []
    for field, value in variant.items():
        shown = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        words.append(
            f"{shown} slots a GPU" if field == "slots_per_rank" else f"{field.replace('_', ' ')} {shown}"
        )
    return ", ".join(words)
