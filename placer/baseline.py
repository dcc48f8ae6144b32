"""Baselines: what results are held against, arranged without a search and without a score."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import numpy as np

from placer.clock import Clock
from placer.errors import Infeasible
from placer.placement import Placement
from placer.problem import Problem
from placer.solution import placed_rows, provenance, usable
from placer.tables import fitted_table


def baseline_placement(problem: Problem) -> Placement:
    """Contiguous experts, with copies in the spare slots where memory allows: what results are compared to.

    Constraints are not kept.
    """
    problem = replace(problem, constraints=None, whole_groups=False, load_model="tokens")
    with contextlib.suppress(Infeasible):  # copies take memory
        return arranged(problem, "linear")
    layers = [problem.layer(index) for index in range(problem.num_layers)]
    # Where even these do not fit they are compared to all the same.
    unlimited = replace(problem, gpu_memory=math.inf)
    return placed_rows(unlimited, [layer.slots(layer.linear()) for layer in layers], [None], {})


def arranged(problem: Problem, name: str, seed: int = 0) -> Placement:
    """What `solve` returns for a method that does not search, without the score of its layers: that may take seconds.

    Raises
    ------
    InvalidInput
        As `solve`.
    Infeasible
        When the experts and their copies do not fit into memory.
    """
    chosen = usable(problem, name)
    rows, tables = [], []
    for index in range(problem.num_layers):
        layer = problem.layer(index, copies="copies" in chosen.handles)
        placed = chosen.place(layer, rng=np.random.default_rng([seed, index]), clock=Clock.start())
        fits = placed.table is None and layer.rule == "table" and layer.topk is not None
        rows.append(placed.slots)
        tables.append(fitted_table(layer, placed.slots) if fits else placed.table)
    return placed_rows(problem, rows, tables, provenance(problem, name, seed))
