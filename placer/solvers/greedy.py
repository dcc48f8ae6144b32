"""Equal groups grown around seeds: minimises, greedily, the co-activation between groups.

Idea: grow groups to full size, one after the other. The first starts at the heaviest pair, each further one
at the expert least connected to all placed ones; a group takes the expert with the highest mean co-activation
with its members. Top-down: racks are filled first, then the servers in them, then their GPUs.
Complexity O(levels * E^2). Wins as an instant start on routers with clusters; loses to any swap search, for
the last group gets what is left over, to linear where gate groups are the clusters, and it ignores load.

References: Occult, Luo et al., ICML 2025, arXiv:2505.13345.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.layer import Ints, Layer
from placer.solvers import Placed

needs = frozenset({"pairs"})
handles = frozenset({"levels"})


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """Groups by co-activation, outermost level first; ties go to the lower expert."""
    return Placed(slots=top_down(layer, grow))


def top_down(layer: Layer, divide: Callable[[Ints, Ints], Ints]) -> npt.NDArray[np.int32]:
    """Slots from dividing the experts level by level, outermost first, into units of equal size.

    Parameters
    ----------
    layer : Layer
    divide : callable
        ``divide(pairs, sizes)`` gets the co-activation (m, m) of m experts and the sizes of their groups,
        which add up to m and differ by at most one, and returns the group (m,) of each expert.

    Returns
    -------
    (num_slots,) int32
        In the order of `Layer.slots`.
    """
    units = [np.arange(layer.num_experts)]
    room = layer.num_slots
    for size in layer.sizes[::-1].tolist():
        inner: list[Ints] = []
        for members in units:
            sizes = np.full(room // size, len(members) // (room // size))
            sizes[: len(members) % len(sizes)] += 1
            group = divide(layer.pairs[np.ix_(members, members)], sizes) if len(members) else members
            inner += [members[group == g] for g in range(len(sizes))]
        units, room = inner, size
    rows = np.full((len(units), room), -1, np.int32)
    for row, members in zip(rows, units, strict=True):
        row[: len(members)] = members
    return layer.slots(layer.occupant(rows.ravel()))


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
