"""Spectral grouping: minimises the normalised cut of the co-activation graph, relaxed, then rounded.

Idea: the leading eigenvectors of the normalised co-activation matrix give every expert a point, close to
those it is chosen with. Balanced k-means cuts that space: centres alternate with an optimal assignment of
experts to places (Hungarian method), so groups are equal. Top-down over racks, servers, GPUs; best of tries.
Complexity O(E^3) a level and round of k-means. Wins on few large groups with a clear block structure; loses
to swap search on many small ones, where eigenvectors carry little, and it does not see load.

References: GRACE-MoE, arXiv:2509.25041 (hierarchical grouping). Ng, Jordan, Weiss, "On spectral clustering",
NIPS 2001; von Luxburg, doi:10.1007/s11222-007-9033-z. Balanced k-means: Malinen and Franti,
doi:10.1007/978-3-662-44415-3_4.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.hierarchy import top_down_by_pairs
from placer.layer import Floats, Ints, Layer
from placer.solvers import Placed

needs = frozenset({"pairs"})
handles = frozenset({"levels"})

_TRIES = 8
_ROUNDS = 20  # of k-means; it settles in about five


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """Groups by spectral embedding, outermost level first."""
    return Placed(slots=top_down_by_pairs(layer, partial(cut, rng=rng)))


def cut(pairs: Ints, sizes: Ints, rng: np.random.Generator) -> Ints:
    """Groups of the given sizes: the try that keeps the most co-activation inside its groups.

    Parameters
    ----------
    pairs : (m, m) int64
        Tokens that use both experts, symmetric, zero diagonal.
    sizes : (n,) int64
        Experts of each group, m in all.
    rng : numpy.random.Generator
        Draws the first centres.

    Returns
    -------
    (m,) int64
        Group of each expert.

    Examples
    --------
    >>> pairs = np.array([[0, 1, 9, 1], [1, 0, 1, 5], [9, 1, 0, 1], [1, 5, 1, 0]])
    >>> group = cut(pairs, np.array([2, 2]), np.random.default_rng(0))
    >>> bool(group[0] == group[2]), bool(group[1] == group[3])
    (True, True)
    """
    held = int((sizes > 0).sum())  # fewer than all units where there are more units than experts
    if held < 2:
        return np.zeros(len(pairs), np.int64)
    points = embedding(pairs, held)
    tries = [_balanced_k_means(points, sizes[:held], rng) for _ in range(_TRIES)]
    inside = [pairs[group[:, None] == group].sum() for group in tries]
    return tries[int(np.argmax(inside))]


def embedding(pairs: Ints, dimensions: int) -> Floats:
    """Rows of the leading eigenvectors of ``D^-1/2 pairs D^-1/2``, scaled to length one.

    Parameters
    ----------
    pairs : (m, m) int64
        Symmetric weights; an expert without any gets degree 0 and no pull.
    dimensions : int
        Eigenvectors to keep, at most m.

    Returns
    -------
    (m, dimensions) float64

    Examples
    --------
    >>> np.abs(embedding(np.array([[0, 2], [2, 0]]), 1)).tolist()
    [[1.0], [1.0]]
    """
    degree = pairs.sum(axis=1).astype(np.float64)
    scale = np.divide(1.0, np.sqrt(degree), out=np.zeros_like(degree), where=degree > 0)
    points = np.linalg.eigh(scale[:, None] * pairs * scale)[1][:, -dimensions:]
    length = np.linalg.norm(points, axis=1, keepdims=True)
    unit: Floats = np.divide(points, length, out=np.zeros_like(points), where=length > 1e-12)
    return unit


def _balanced_k_means(points: Floats, sizes: Ints, rng: np.random.Generator) -> Ints:
    from scipy.optimize import linear_sum_assignment

    seat = np.repeat(np.arange(len(sizes)), sizes)
    centres = points[rng.choice(len(points), len(sizes), replace=False)]
    group = np.full(len(points), -1)
    for _ in range(_ROUNDS):
        distance = ((points[:, None] - centres) ** 2).sum(axis=2)
        before, group = group, seat[linear_sum_assignment(distance[:, seat])[1]]
        if (group == before).all():
            break
        centres = np.stack([points[group == g].mean(axis=0) for g in range(len(sizes))])
    return group
