"""Split: how evenly the tokens of each expert could be shared out over its copies.

A dispatch rule decides which copy serves a token, and so how much of an expert's load each copy takes. Whatever the
rule, no unit can be less busy than under the best split, a small linear program over the copies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from placer.errors import InvalidInput
from placer.placement import Placement
from placer.topology import REPORTED

Floats = npt.NDArray[np.float64]


def best_split(placement: Placement, load: npt.NDArray[Any]) -> dict[str, dict[str, float]]:
    """Busiest unit over mean under the best split of every layer, each level on its own.

    Parameters
    ----------
    placement : Placement
    load : (num_layers, num_experts)
        Tokens that use each expert.

    Returns
    -------
    dict of dict
        For "gpu", "server" and "rack": ``max_over_mean``, mean over layers, and ``worst_layer``. One split need
        not reach all three.

    Raises
    ------
    InvalidInput
        When the load does not belong to the placement.

    Examples
    --------
    >>> placement = Placement(
    ...     physical_to_logical=np.array([[0, 1, 0, 2]]), num_experts=3, shape=(1, 2, 1))
    >>> best_split(placement, np.array([[8, 2, 4]]))["gpu"]
    {'max_over_mean': 1.0, 'worst_layer': 1.0}
    """
    heat = np.asarray(load, np.float64)
    if heat.shape != (placement.num_layers, placement.num_experts):
        raise InvalidInput(
            f"load: found shape {heat.shape}, "
            f"expected {(placement.num_layers, placement.num_experts)} (layer, expert)"
        )
    racks, servers, gpus = placement.shape
    found = {}
    for name, units in zip(REPORTED, (racks * servers * gpus, racks * servers, racks), strict=True):
        over = []
        for slots, row in zip(placement.physical_to_logical, heat, strict=True):
            mean = float(row.sum()) / units
            over.append(least_load(slots, row, units) / mean if mean > 0 else 1.0)
        found[name] = {"max_over_mean": float(np.mean(over)), "worst_layer": float(np.max(over))}
    return found


def least_load(slots: npt.NDArray[Any], load: npt.NDArray[Any], num_units: int) -> float:
    """Load of the busiest unit of one layer when each expert's tokens are split over its copies at best.

    Solved exactly as a linear program: minimise m where the shares of an expert add up to its load and those in a
    unit to m at most. Tokens are taken as divisible.

    Parameters
    ----------
    slots : (num_slots,) integer
        Expert of each slot, -1 = empty.
    load : (num_experts,)
        Tokens that use each expert.
    num_units : int
        Units that the slots are divided into, in order: GPUs, servers or racks.

    Raises
    ------
    InvalidInput
        When the slots do not divide by the units, an expert with load has no slot, or a load is negative.

    Examples
    --------
    Two GPUs that share expert 0:

    >>> slots = np.array([0, 1, 0, 2])
    >>> least_load(slots, np.array([8.0, 2.0, 4.0]), 2), least_load(slots, np.array([1.0, 2.0, 9.0]), 2)
    (7.0, 9.0)
    """
    held, heat = np.asarray(slots), np.asarray(load, np.float64)
    if num_units < 1 or held.ndim != 1 or len(held) % num_units:
        raise InvalidInput(f"slots: found shape {held.shape}, expected a multiple of the {num_units} units")
    if not (heat.min(initial=0.0) >= 0.0 and np.isfinite(heat).all()):
        raise InvalidInput(f"load: found {heat.min()} to {heat.max()}, expected numbers of at least 0")
    unit_of = np.arange(len(held)) // (len(held) // num_units)
    holds = np.zeros((len(heat), num_units), bool)
    holds[held[held >= 0], unit_of[held >= 0]] = True
    places = holds.sum(axis=1)
    if (heat[places == 0] > 0).any():
        expert = int(np.flatnonzero((places == 0) & (heat > 0))[0])
        raise InvalidInput(f"expert {expert}: found no slot, expected one for its load of {heat[expert]:g}")
    fixed: Floats = heat[places == 1] @ holds[places == 1]
    free = np.flatnonzero((places > 1) & (heat > 0))
    if not len(free):
        return float(fixed.max(initial=0.0))
    return _shared(holds[free], heat[free], fixed)


def _shared(holds: npt.NDArray[np.bool_], load: Floats, fixed: Floats) -> float:
    """The least load of the busiest unit, from experts with a choice of units and what is fixed on each."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    scale = (load.sum() + fixed.sum()) / len(fixed)
    expert, unit = np.nonzero(holds)
    shares, ones = np.arange(len(expert)), np.ones(len(expert))
    size = len(expert) + 1  # the last variable is the busiest unit's load
    rows, columns = np.append(unit, np.arange(len(fixed))), np.append(shares, np.full(len(fixed), size - 1))
    solved = linprog(
        np.eye(1, size, size - 1)[0],
        A_ub=coo_array(
            (np.append(ones, np.full(len(fixed), -1.0)), (rows, columns)), shape=(len(fixed), size)
        ),
        b_ub=-fixed / scale,
        A_eq=coo_array((ones, (expert, shares)), shape=(len(load), size)),
        b_eq=load / scale,
        method="highs",
    )
    if solved.status != 0:
        raise RuntimeError(f"the best split was not found: {solved.message}")
    return float(max(solved.fun, 1.0) * scale)
