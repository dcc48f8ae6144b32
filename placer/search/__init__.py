"""Compiled search: counting, exact swap tables, tabu, load balance.

Every kernel is cached on disk after its first compilation and releases the GIL, so layers run on threads.
The kernel modules import numba (a quarter of a second), so they are imported where they are used.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from placer.layer import Layer, Occupant


def descend(
    layer: Layer,
    start: Occupant,
    *,
    exact: bool,
    steps: int = 2000,
    patience: int = 400,
    rng: np.random.Generator,
) -> tuple[Occupant, float]:
    """The best arrangement within the caps that tabu search finds from `start`.

    Parameters
    ----------
    layer : Layer
    start : (num_slots,) int32
        Occupant array; left as it is. Where it breaks the layer's rules, it is repaired first.
    exact : bool
        Search on touched units; otherwise on pairs cut, which is several times faster and nearly as good.
    steps, patience : int
        Swaps at most, and swaps without a new best after which to stop.
    rng : numpy.random.Generator
        Draws how long moved experts rest, and how a start is repaired.

    Returns
    -------
    occupant : (num_slots,) int32
        The best arrangement within the caps and the layer's rules; from a start above the caps, the one with the
        least excess.
    value : float
        Its touched units, or pairs cut, weighted by `layer.weights_of_levels`.
    """
    from placer.search.tabu import tabu

    start = layer.repaired(start, rng)
    if len(layer.levels) == 0 or not layer.load.any():
        return start, math.nan
    if exact:
        sets, count = layer.distinct
        first, uses = layer.uses
        pairs = np.zeros((1, 1), np.int64)
    else:
        sets, count = np.zeros((0, 2), np.int16), np.zeros(0, np.int64)
        first, uses = np.zeros(1, np.int64), np.zeros(0, np.int32)
        pairs = layer.pairs
    tenure = max(2, layer.num_slots // 8)  # mean swaps for which a moved expert rests
    best, value, _ = tabu(
        start.astype(np.int32),
        layer.expert_load,
        exact,
        sets,
        count,
        first,
        uses,
        pairs,
        layer.sizes,
        layer.weights_of_levels,
        layer.caps[list(layer.levels)],
        layer.num_slots // int(layer.sizes[0]),
        patience,
        rng.integers(tenure // 2 + 1, tenure + tenure // 2 + 2, (steps, 2)),
        None if layer.rules is None else layer.rules.compiled,
        layer.idle_table(layer.levels),
    )
    return best, float(value)


def bit_masks(rows: npt.NDArray[np.signedinteger[Any]], items: int) -> npt.NDArray[np.uint64]:
    """Rows of items as bit masks of 64 items a word, (n, words); -1 = none.

    Examples
    --------
    >>> bit_masks(np.array([[0, 2], [-1, 1]]), 3).tolist()
    [[5], [2]]
    """
    masks = np.zeros((len(rows), -(-items // 64)), np.uint64)
    for column in rows.T:
        held = np.flatnonzero(column >= 0)
        item = column[held].astype(np.uint64)
        masks[held, (item >> np.uint64(6)).astype(np.int64)] |= np.uint64(1) << (item & np.uint64(63))
    return masks
