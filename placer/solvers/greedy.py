"""Equal groups grown around seeds: minimises, greedily, the co-activation between groups.

Idea: grow groups to full size, one after the other. The first starts at the heaviest pair, each further one
at the expert least connected to all placed ones; a group takes the expert with the highest mean co-activation
with its members. Top-down: racks are filled first, then the servers in them, then their GPUs. Spare slots are filled
one by one, each with a copy of the expert that is used most together with what its server holds (its GPU, where there
is one server). Complexity O(levels * E^2 + spare * servers * E). Wins as an instant start on routers with clusters;
loses to any swap search, for the last group gets what is left over, to linear where gate groups are the clusters, and
it ignores load.

References: Occult, Luo et al., ICML 2025, arXiv:2505.13345.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.hierarchy import top_down_by_pairs
from placer.layer import Ints, Layer, Occupant
from placer.solvers import Placed

needs = frozenset({"pairs"})
handles = frozenset({"copies", "levels"})


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """Groups by co-activation, outermost level first; ties go to the lower expert."""
    return Placed(slots=copied(layer, top_down_by_pairs(layer, grow)))


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


def copied(layer: Layer, slots: Occupant) -> Occupant:
    """The slots of a layer, its empty ones filled with copies as far as servers (GPUs of the only one) lack experts.

    Parameters
    ----------
    layer : Layer
    slots : (num_slots,) int32

    Returns
    -------
    (num_slots,) int32

    Examples
    --------
    Expert 1 is used with 2 and 3, so the second GPU gets a copy of it, and the first one of its other companions:

    >>> from placer import Problem, Topology, Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 1]], [[1, 2]], [[1, 2]], [[1, 3]]]), num_experts=4)
    >>> layer = Problem.from_trace(trace, Topology.load("dgx-h100").with_shape("1x2x1"), slots_per_gpu=3).layer(0)
    >>> copied(layer, np.array([0, 1, -1, 2, 3, -1], np.int32)).tolist()
    [0, 1, 2, 2, 3, 1]
    """
    alone = layer.server_ranks == layer.num_ranks
    units = slots.reshape(-1, layer.slots_per_rank * (1 if alone else layer.server_ranks)).copy()
    pairs = layer.pairs[: layer.num_experts, : layer.num_experts]
    bond = np.stack([pairs[held[held >= 0]].sum(axis=0) for held in units])  # with what a unit holds
    for held, row in zip(units, bond, strict=True):
        row[held[held >= 0]] = -1
    bond[(units >= 0).all(axis=1)] = -1
    while bond.max() >= 0:
        unit, expert = divmod(int(bond.argmax()), layer.num_experts)
        units[unit, int((units[unit] < 0).argmax())] = expert
        bond[unit] = np.where(bond[unit] < 0, -1, bond[unit] + pairs[expert])
        bond[unit, expert] = -1
        if (units[unit] >= 0).all():
            bond[unit] = -1
    return units.ravel()
