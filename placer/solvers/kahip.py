"""KaHIP, a high-quality graph partitioner: minimises the co-activation cut between groups of equal size.

Idea: multilevel like `metis`, with stronger refinement: maximum flows and localised searches between neighbouring
groups (KaFFPa, preset eco, no imbalance allowed). Top-down over racks, servers, GPUs; the best of several
seeds, which beats one run of the dearer preset strong. Where sizes differ, the cheapest moves even them out.
Complexity: refinement dominates; a try takes 0.1 s for 64 experts in 8 groups, 5 s for 256 in 32.
Wins nothing yet: `metis` left 0.5 to 3.5 % fewer touched units on every trace tried, these graphs being small and
dense. Loses to swap search as `metis` does, for a cut counts a token's third and fourth companion again, and
it sees neither load nor touched units.

References: Sanders and Schulz, "Think Locally, Act Globally", doi:10.1007/978-3-642-38527-8_16. Package kahip,
extra ``partition``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.hierarchy import adjacency, evened, obvious, partitioner, top_down_by_pairs
from placer.layer import Ints, Layer
from placer.solvers import Placed

needs = frozenset({"pairs"})
handles = frozenset({"levels"})

_TRIES = 4
_ECO = 1  # kahip.ECO
_HEAVY = 1 << 16  # mean weight of a vertex at most; gain queues grow with it, and 2^20 takes seconds


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """Groups by KaHIP, outermost level first; contiguous experts when time is over.

    Raises
    ------
    InvalidInput
        When kahip is not installed.
    """
    partitioner("kahip", "kahip")
    if clock.expired:
        return Placed(slots=layer.slots(layer.linear()))
    return Placed(slots=top_down_by_pairs(layer, lambda pairs, sizes: cut(pairs, sizes, rng, clock)))


def cut(pairs: Ints, sizes: Ints, rng: np.random.Generator, clock: Clock) -> Ints:
    """Groups of the given sizes: the try that keeps the most co-activation inside its groups.

    Parameters
    ----------
    pairs : (m, m) int64
        Tokens that use both experts, symmetric, zero diagonal.
    sizes : (n,) int64
        Experts of each group, m in all, larger ones first.
    rng : numpy.random.Generator
        Draws the seeds.
    clock : Clock
        After the first try, none begins once time is over.

    Returns
    -------
    (m,) int64
        Group of each expert.

    Examples
    --------
    >>> import pytest
    >>> _ = pytest.importorskip("kahip")
    >>> pairs = np.array([[0, 1, 9, 1], [1, 0, 1, 5], [9, 1, 0, 1], [1, 5, 1, 0]])
    >>> group = cut(pairs, np.array([2, 2]), np.random.default_rng(0), Clock())
    >>> bool(group[0] == group[2]), bool(group[1] == group[3])
    (True, True)
    """
    group = obvious(sizes)
    if group is not None:
        return group
    tries: list[Ints] = []
    for seed in rng.integers(2**31, size=_TRIES):
        if tries and clock.expired:
            break
        tries.append(evened(_partition(pairs, len(sizes), seed), sizes, pairs))
    inside = [pairs[group[:, None] == group].sum() for group in tries]
    return tries[int(np.argmax(inside))]


def _partition(pairs: Ints, groups: int, seed: int) -> Ints:
    kahip = partitioner("kahip", "kahip")
    start, neighbour, weight = (part.tolist() for part in adjacency(pairs, _HEAVY * len(pairs)))
    vertices = [1] * len(pairs)
    _, group = kahip.kaffpa(vertices, start, weight, neighbour, groups, 0.0, True, int(seed), _ECO)
    return np.array(group, np.int64)
