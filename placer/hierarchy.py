"""Hierarchy: experts divided into units of equal size, outermost level first; the ground of grouping methods.

Partitioners outside know neither slots nor several levels: here are the levels for them, a graph in their form,
and the last moves that give every group exactly its size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.errors import InvalidInput
from placer.layer import Ints, Layer

MOST_WEIGHT = 1 << 30  # of all edges or nets together: partitioners count cuts in int32


def top_down(layer: Layer, divide: Callable[[Ints, Ints], Ints]) -> npt.NDArray[np.int32]:
    """Slots from dividing the experts level by level, outermost first, into units of equal size.

    Parameters
    ----------
    layer : Layer
    divide : callable
        ``divide(members, sizes)`` gets m experts, ascending, and the sizes of their groups, which add up to m and
        differ by at most one, larger ones first; it returns the group (m,) of each expert.

    Returns
    -------
    (num_slots,) int32
        In the order of `Layer.slots`; empty slots are spread evenly.

    Examples
    --------
    >>> from placer import Problem, Topology, Trace
    >>> trace = Trace(topk_idx=np.array([[[0, 2]], [[1, 3]]]), num_experts=4)
    >>> problem = Problem.from_trace(trace, Topology.load("dgx-h100").with_shape("1x2x1"), max_load=None)
    >>> top_down(problem.layer(0), lambda members, sizes: members % len(sizes)).tolist()
    [0, 2, 1, 3]
    """
    units = [np.arange(layer.num_experts)]
    room = layer.num_slots
    for size in layer.sizes[::-1].tolist():
        inner: list[Ints] = []
        for members in units:
            sizes = np.full(room // size, len(members) // (room // size))
            sizes[: len(members) % len(sizes)] += 1
            group = divide(members, sizes) if len(members) else members
            inner += [members[group == g] for g in range(len(sizes))]
        units, room = inner, size
    rows = np.full((len(units), room), -1, np.int32)
    for row, members in zip(rows, units, strict=True):
        row[: len(members)] = members
    return layer.slots(layer.occupant(rows.ravel()))


def top_down_by_pairs(layer: Layer, divide: Callable[[Ints, Ints], Ints]) -> npt.NDArray[np.int32]:
    """`top_down` for a division that looks at co-activation only.

    Parameters
    ----------
    layer : Layer
    divide : callable
        ``divide(pairs, sizes)`` as in `top_down`, with the co-activation (m, m) of the experts in their place.

    Returns
    -------
    (num_slots,) int32

    Examples
    --------
    >>> from placer import Problem, Topology, Trace
    >>> from placer.solvers.greedy import grow
    >>> trace = Trace(topk_idx=np.array([[[0, 2]], [[1, 3]]]), num_experts=4)
    >>> problem = Problem.from_trace(trace, Topology.load("dgx-h100").with_shape("1x2x1"), max_load=None)
    >>> top_down_by_pairs(problem.layer(0), grow).tolist()
    [0, 2, 1, 3]
    """
    return top_down(layer, lambda members, sizes: divide(layer.pairs[np.ix_(members, members)], sizes))


def obvious(sizes: Ints) -> Ints | None:
    """The division where all are alike: one group that holds anything, or none that holds more than one.

    Parameters
    ----------
    sizes : (n,) int64
        Sizes of the groups, larger ones first.

    Returns
    -------
    (m,) int64 or None
        None where there is a choice to make.

    Examples
    --------
    >>> obvious(np.array([3, 0])).tolist(), obvious(np.array([1, 1, 0])).tolist(), obvious(np.array([2, 1]))
    ([0, 0, 0], [0, 1], None)
    """
    if sizes.max() > 1 and (sizes > 0).sum() > 1:
        return None
    return np.repeat(np.arange(len(sizes)), sizes)


def adjacency(pairs: Ints, most: int = MOST_WEIGHT) -> tuple[Ints, Ints, Ints]:
    """A co-activation graph as partitioners read it.

    Parameters
    ----------
    pairs : (m, m) int64
        Symmetric weights, zero diagonal.
    most : int
        What the weights may add up to; beyond, they are scaled down (see `narrowed`).

    Returns
    -------
    start : (m + 1,) int64
    neighbour, weight : (start[m],) int64
        Edges of expert e are ``start[e]:start[e + 1]``, each stored at both ends, each weight at least 1.

    Examples
    --------
    >>> [part.tolist() for part in adjacency(np.array([[0, 5, 0], [5, 0, 2], [0, 2, 0]]))]
    [[0, 1, 3, 4], [1, 0, 2, 1], [5, 5, 2, 2]]
    """
    expert, neighbour = np.nonzero(pairs)
    start = np.searchsorted(expert, np.arange(len(pairs) + 1))
    return start, neighbour, narrowed(pairs[expert, neighbour], most)


def narrowed(weights: Ints, most: int) -> Ints:
    """Positive weights scaled down, where need be, to add up to about `most`; none below 1.

    Examples
    --------
    >>> narrowed(np.array([1, 2, 3]), 6).tolist(), narrowed(np.array([1, 8000, 16000]), 24).tolist()
    ([1, 2, 3], [1, 8, 16])
    """
    total = int(weights.sum())
    return weights if total <= most else np.maximum(1, np.rint(weights * (most / total)).astype(np.int64))


def evened(group: Ints, sizes: Ints, pairs: Ints) -> Ints:
    """Groups of exactly the given sizes, by moves that lose the least co-activation, one after the other.

    Parameters
    ----------
    group : (m,) int64
        Group of each expert, of any sizes.
    sizes : (n,) int64
        Sizes wanted, m in all, the largest for the group that holds the most.
    pairs : (m, m) int64
        Tokens that use both experts, symmetric, zero diagonal.

    Returns
    -------
    (m,) int64
        A move takes an expert from a group with too many to one with too few; ties go to the lower expert, then
        to the lower group.

    Examples
    --------
    >>> pairs = np.array([[0, 9, 1, 1], [9, 0, 1, 1], [1, 1, 0, 2], [1, 1, 2, 0]])
    >>> evened(np.array([0, 0, 0, 1]), np.array([2, 2]), pairs).tolist()
    [0, 0, 1, 1]
    """
    group = group.copy()
    held = np.bincount(group, minlength=len(sizes))
    wanted = np.empty_like(held)
    wanted[np.argsort(-held, kind="stable")] = np.sort(sizes)[::-1]
    while (held != wanted).any():
        bond = pairs @ (group[:, None] == np.arange(len(sizes)))
        loss = (bond[np.arange(len(group)), group][:, None] - bond).astype(np.float64)
        loss[held[group] <= wanted[group]] = np.inf
        loss[:, held >= wanted] = np.inf
        expert, to = divmod(int(loss.argmin()), len(sizes))
        held[group[expert]] -= 1
        held[to] += 1
        group[expert] = to
    return group


def partitioner(package: str, method: str) -> Any:
    """The package behind a method, imported when the method is used.

    Raises
    ------
    InvalidInput
        When it is not installed.

    Examples
    --------
    >>> partitioner("no_such_package", "metis")
    Traceback (most recent call last):
    placer.errors.InvalidInput: method metis needs the package no_such_package: pip install 'placer[partition]'
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InvalidInput(
            f"method {method} needs the package {package}: pip install 'placer[partition]'"
        ) from error
