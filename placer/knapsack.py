"""knapsack: one choice for every layer, within a number of copies and the memory of the GPUs.

The multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11,
doi:10.1007/978-3-540-24777-7), with a row more for every GPU that could overflow; solved by CP-SAT.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from placer.errors import Infeasible, NoPlacement

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

GRAIN = 2.0**40  # whole numbers that the spread of a sum over the layers is counted in
DETERMINISTIC_SECONDS = 20.0  # of CP-SAT for each aim: the same on every machine


def knapsack(
    excess: Floats,
    cost: Floats,
    copies: Ints,
    limit: int,
    *,
    held: Ints | None = None,
    room: Ints | None = None,
) -> Ints:
    """The choice of every layer with the least excess, of those the least cost, of those the fewest copies.

    One aim after another; sums are exact to a part in `GRAIN` of what they could differ by.

    Parameters
    ----------
    excess, cost : (layers, choices) float64
        Of every choice that a layer has; infinite costs fill up the rows of layers with fewer.
    copies : (layers, choices) int64
    limit : int
        Copies over all layers, at most.
    held : (layers, choices, num_ranks) int64, optional
        Experts on every GPU.
    room : (num_ranks,) int64, optional
        Experts that a GPU can hold, over all layers.

    Returns
    -------
    (layers,) int64

    Raises
    ------
    Infeasible
        When no choice keeps to the limits.
    NoPlacement
        When none was found in time.

    Examples
    --------
    Eight copies save most in the second layer; four each would leave 13:

    >>> cost = np.array([[9.0, 5.0, 4.0], [9.0, 8.0, 2.0]])
    >>> copies = np.array([[0, 4, 8], [0, 4, 8]])
    >>> knapsack(np.zeros_like(cost), cost, copies, 8).tolist()
    [0, 2]
    """
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    known = np.argwhere(np.isfinite(cost))
    at = tuple(known.T)
    picks = [model.new_bool_var("") for _ in known]
    for layer in range(len(cost)):
        model.add_exactly_one(pick for pick, (row, _) in zip(picks, known, strict=True) if row == layer)

    def total(amounts: Ints) -> Any:
        return cp_model.LinearExpr.weighted_sum(picks, amounts[at].tolist())

    model.add(total(copies) <= limit)
    if held is not None and room is not None:
        for rank, most in enumerate(room.tolist()):
            model.add(total(held[:, :, rank]) <= most)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.catch_sigint_signal = False  # Ctrl-C belongs to the caller
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = DETERMINISTIC_SECONDS
    chosen = np.empty(0, bool)
    for aim in (_whole(excess, cost), _whole(cost, cost), copies):
        model.minimize(total(aim))
        status = solver.solve(model)
        if status == cp_model.INFEASIBLE:
            raise Infeasible(
                f"copies: found no choice of at most {limit} for every layer that fits into memory"
            )
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            if len(chosen):
                break
            raise NoPlacement(f"copies: found no choice of at most {limit} in time")
        chosen = np.array([solver.boolean_value(pick) for pick in picks])
        model.add(total(aim) <= int(aim[at][chosen].sum()))
        model.clear_hints()
        for pick, value in zip(picks, chosen.tolist(), strict=True):
            model.add_hint(pick, value)
    picked: Ints = known[chosen, 1].astype(np.int64)
    return picked


def _whole(amounts: Floats, cost: Floats) -> Ints:
    """Amounts above each layer's least as whole numbers, of which the layers' greatest add up to `GRAIN`."""
    real = np.isfinite(cost)
    least = np.where(real, amounts, np.inf).min(axis=1, keepdims=True)
    above = np.where(real, amounts - least, 0.0)
    most = float(above.max(axis=1).sum())
    return np.rint(above * (GRAIN / most if most else 0.0)).astype(np.int64)
