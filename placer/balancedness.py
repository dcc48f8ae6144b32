"""Balancedness: how much busier than the mean the busiest units are, from loads alone."""

from __future__ import annotations

import numpy as np

from placer.placement import Placement
from placer.problem import Problem
from placer.speeds import in_time
from placer.topology import REPORTED


def busiest(problem: Problem, placement: Placement) -> dict[str, dict[str, float]]:
    """Busiest unit over mean of each level, as `placer.Report.load` has it, where the tokens are not known.

    Exact under the dispatch rules "nearest" and "spread"; under others copies are taken to share an expert's load.

    Parameters
    ----------
    problem : Problem
        Counts-only or not.
    placement : Placement
        Of the problem's experts, layers and shape.

    Returns
    -------
    dict of dict
        For "gpu", "server" and "rack": ``max_over_mean``, mean over layers, and ``worst_layer``; 1.0 without load.

    Examples
    --------
    >>> from placer import Topology
    >>> from placer.counts import Counts
    >>> counts = Counts(load=np.array([[6, 2, 1, 1]]))
    >>> problem = Problem.from_counts(counts, Topology.load("dgx-h100").with_shape("1x1x2"))
    >>> placement = Placement(physical_to_logical=np.array([[0, 1, 2, 3]]), num_experts=4, shape=(1, 1, 2))
    >>> busiest(problem, placement)["gpu"]
    {'max_over_mean': 1.6, 'worst_layer': 1.6}
    """
    found: dict[str, list[float]] = {name: [] for name in REPORTED}
    for index, slots in enumerate(placement.physical_to_logical):
        load = problem.layer(index).expected_load(slots)
        for name, heats in found.items():
            level = problem.topology.index(name)
            ranks = problem.topology.unit_sizes[level]
            units = load[level, : problem.num_ranks // ranks]
            slowest = float(in_time(units, problem.topology.speeds, ranks).max())
            heats.append(slowest / float(units.mean()) if units.any() else 1.0)
    return {
        name: {"max_over_mean": float(np.mean(heats)), "worst_layer": max(heats)}
        for name, heats in found.items()
    }
