"""Equal groups grown around seeds: minimises, greedily, the co-activation between groups.

Idea: grow groups to full size, one after the other. The first starts at the heaviest pair, each further one
at the expert least connected to all placed ones; a group takes the expert with the highest mean co-activation
with its members. Top-down: racks are filled first, then the servers in them, then their GPUs.
Complexity O(levels * E^2). Wins as an instant start on routers with clusters; loses to any swap search, for
the last group gets what is left over, to linear where gate groups are the clusters, and it ignores load.

References: Occult, Luo et al., ICML 2025, arXiv:2505.13345.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.hierarchy import top_down_by_pairs
from placer.layer import Ints, Layer
from placer.solvers import Placed

needs = frozenset({"pairs"})
handles = frozenset({"levels"})


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """Groups by co-activation, outermost level first; ties go to the lower expert."""
    return Placed(slots=top_down_by_pairs(layer, grow))


def grow(pairs: Ints, sizes: Ints) -> Ints:
    """Groups of the given sizes, grown one after the other.

    Parameters
    ----------
    pairs : (m, m) int64
        Tokens that use both experts, symmetric, zero diagonal.
    sizes : (n,) int64
        Experts of each group, m in all.

    Returns
    -------
    (m,) int64
        Group of each expert.

    Examples
    --------
    >>> pairs = np.array([[0, 1, 9, 1], [1, 0, 1, 5], [9, 1, 0, 1], [1, 5, 1, 0]])
    >>> grow(pairs, np.array([2, 2])).tolist()
    [0, 1, 0, 1]
    """
    group = np.full(len(pairs), -1)
    placed = np.zeros(len(pairs), np.int64)  # co-activation with all placed experts
    for g, size in enumerate(sizes.tolist()):
        wanted = -placed if g else pairs.max(axis=1)
        bond = np.zeros(len(pairs), np.int64)  # and with the group; its mean ranks candidates as its sum does
        for _ in range(size):
            free = np.flatnonzero(group < 0)
            expert = free[wanted[free].argmax()]
            group[expert] = g
            bond += pairs[expert]
            wanted = bond
        placed += bond
    return group
