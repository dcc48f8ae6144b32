"""METIS, the classic graph partitioner: minimises the co-activation cut between groups of equal size.

Idea: multilevel recursive bisection. Heavy edges are contracted until the graph is small, the small graph is cut
in two, and the cut is refined while the graph is expanded again; each half is cut in turn. Top-down over racks,
servers, GPUs; the best of several seeds. METIS leaves groups one or two experts off, so the cheapest moves
make them equal. Its direct k-way mode, 10 % worse on co-activation graphs, which are dense, is not used.
Complexity O(E^2 log N) a level: milliseconds. Wins on speed, and as a start; loses to swap search, since a cut
counts a token's third and fourth companion again, and it sees neither load nor touched units.

References: Karypis and Kumar, doi:10.1137/S1064827595287997. Package pymetis, extra ``partition``.
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

_TRIES = 8


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """Groups by METIS, outermost level first; contiguous experts when time is over.

    Raises
    ------
    InvalidInput
        When pymetis is not installed.
    """
    partitioner("pymetis", "metis")
    if clock.expired:
        return Placed(slots=layer.slots(layer.linear()))
    return Placed(slots=top_down_by_pairs(layer, lambda pairs, sizes: cut(pairs, sizes, rng)))


def cut(pairs: Ints, sizes: Ints, rng: np.random.Generator) -> Ints:
    """Groups of the given sizes: the try that keeps the most co-activation inside its groups.

    Parameters
    ----------
    pairs : (m, m) int64
        Tokens that use both experts, symmetric, zero diagonal.
    sizes : (n,) int64
        Experts of each group, m in all, larger ones first.
    rng : numpy.random.Generator
        Draws the seeds.

    Returns
    -------
    (m,) int64
        Group of each expert.

    Examples
    --------
    >>> import pytest
    >>> _ = pytest.importorskip("pymetis")
    >>> pairs = np.array([[0, 1, 9, 1], [1, 0, 1, 5], [9, 1, 0, 1], [1, 5, 1, 0]])
    >>> group = cut(pairs, np.array([2, 2]), np.random.default_rng(0))
    >>> bool(group[0] == group[2]), bool(group[1] == group[3])
    (True, True)
    """
    group = obvious(sizes)
    if group is not None:
        return group
    tries = [
        evened(_partition(pairs, sizes, seed), sizes, pairs) for seed in rng.integers(2**31, size=_TRIES)
    ]
    inside = [pairs[group[:, None] == group].sum() for group in tries]
    return tries[int(np.argmax(inside))]


def _partition(pairs: Ints, sizes: Ints, seed: int) -> Ints:
    pymetis = partitioner("pymetis", "metis")
    start, neighbour, weight = adjacency(pairs)
    options = pymetis.Options()
    options.seed = int(seed)
    options.ufactor = 1  # a thousandth more than its share, the least that METIS takes
    found = pymetis.part_graph(
        len(sizes),
        pymetis.CSRAdjacency(start, neighbour),
        eweights=weight,
        tpwgts=(sizes / sizes.sum()).tolist(),
        recursive=True,
        options=options,
    )
    return np.array(found.vertex_part, np.int64)
