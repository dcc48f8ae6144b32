"""Groups: placements that keep gate groups whole, as a permutation of a checkpoint has to.

A gate that picks groups first (DeepSeek-V3: 8 groups of 32 experts, 4 of them a token) knows its groups by the numbers
of their experts. A map at run time may tear them apart, but where experts are renumbered in the checkpoint, each
stretch of as many slots must hold one group. Which group comes where decides what crosses the links between units
that hold whole groups; it is searched first, on groups in place of experts. Inside its stretch an expert may stand
anywhere.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.errors import InvalidInput
from placer.layer import Layer
from placer.rules import Rules

ROUNDS = 8  # of the search for the order of groups, which are few


def check_groups(num_experts: int, num_slots: int, num_groups: int) -> None:
    """Refuse what cannot keep groups whole.

    Raises
    ------
    InvalidInput
        When experts have no groups, or there are slots to spare.
    """
    if num_groups == 1:
        raise InvalidInput("whole groups: found a trace without gate groups, expected num_groups in its meta")
    if num_slots > num_experts:
        spare = num_slots - num_experts
        raise InvalidInput(f"whole groups: found {spare} spare slots, expected as many slots as experts")


def group_sets(layer: Layer) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """Distinct sets of groups that tokens use, (n, num_groups) with -1 for none, and the tokens of each, (n,)."""
    sets, count = layer.distinct
    used = np.zeros((len(sets), layer.num_groups), bool)
    rows, columns = np.nonzero(sets >= 0)
    used[rows, sets[rows, columns] // (layer.num_experts // layer.num_groups)] = True
    kinds, inverse = np.unique(used, axis=0, return_inverse=True)
    tokens = np.bincount(inverse.ravel(), weights=count, minlength=len(kinds)).astype(np.int64)
    return np.sort(np.where(kinds, np.arange(layer.num_groups), -1), axis=1).astype(np.int16), tokens


def in_whole_groups(layer: Layer) -> Rules:
    """Rules that keep each gate group in a stretch of slots of its own, groups well ordered.

    Examples
    --------
    Groups (0, 1) and (4, 5) are used together, and so are the other two; a server holds two groups:

    >>> from placer import Problem, Topology, Trace
    >>> ids = np.array([[[0, 5]], [[1, 4]], [[2, 7]], [[3, 6]]])
    >>> trace = Trace(topk_idx=ids, num_experts=8, num_groups=4, topk_groups=2)
    >>> layer = Problem.from_trace(trace, Topology.load("dgx-h100").with_shape("1x2x2")).layer(0)
    >>> in_whole_groups(layer).start.tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    width = layer.num_experts // layer.num_groups
    first = np.argsort(_order(layer, width)) * width  # slot of each group's stretch
    low = np.repeat(first, width).astype(np.int32)
    start = np.empty(layer.num_slots, np.int32)
    start[low + np.arange(layer.num_slots) % width] = np.arange(layer.num_slots)
    return Rules(
        num_experts=layer.num_experts,
        low=low,
        high=low + np.int32(width),
        shut=np.zeros(layer.num_slots, bool),
        apart=(),
        start=start,
    )


def _order(layer: Layer, width: int) -> npt.NDArray[np.int64]:
    """The group of each stretch, (num_groups,): searched on the levels whose units hold whole groups."""
    from placer.solvers import tabu

    wide = [i for i, slots in enumerate(layer.unit_slots) if slots % width == 0 and slots > width]
    if layer.topk is None or not any(layer.unit_slots[i] < layer.num_slots for i in wide):
        return np.arange(layer.num_groups)
    sets, tokens = group_sets(layer)
    topk = np.repeat(sets, tokens, axis=0)
    coarse = replace(
        layer,
        num_experts=layer.num_groups,
        num_ranks=layer.num_groups,
        slots_per_rank=1,
        unit_ranks=tuple(layer.unit_slots[i] // width for i in wide),
        seconds=tuple(layer.seconds[i] for i in wide),
        server_ranks=layer.unit_slots[wide[0]] // width,
        load=np.bincount(topk[topk >= 0], minlength=layer.num_groups),
        activations=layer.heat.reshape(-1, width).sum(axis=1),  # what caps count
        pair_counts=None,
        topk=topk,
        key=None,
        step=None,
        num_groups=1,
        speeds=(),
        rules=None,
    )
    best, _ = tabu.search(
        coarse, coarse.reference, rng=np.random.default_rng(0), clock=Clock.start(rounds=ROUNDS)
    )
    order: npt.NDArray[np.int64] = coarse.slots(best).astype(np.int64)
    return order
