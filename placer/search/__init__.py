"""Compiled search: counting, exact swap tables, tabu, load balance.

Every kernel is cached on disk after its first compilation and releases the GIL, so layers run on threads.
The kernel modules import numba (a quarter of a second), so they are imported where they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from placer.layer import Layer, Occupant


def descend(
    layer: Layer,
    start: Occupant,
    *,
    exact: bool,
    steps: int = 2000,
    patience: int = 400,
    seed: int = 0,
) -> Occupant:
    """The best arrangement within the caps that tabu search finds from `start`.

    Parameters
    ----------
    layer : Layer
    start : (num_slots,) int32
        Occupant array; left as it is.
    exact : bool
        Search on touched units; otherwise on pairs cut, which is several times faster and nearly as good.
    steps, patience : int
        Swaps at most, and swaps without a new best after which to stop.
    seed : int
        Of the rests of moved experts.

    Returns
    -------
    (num_slots,) int32
        The best arrangement within the caps; from a start above the caps, the one with the least excess.
    """
    from placer.search.tabu import tabu

    if len(layer.levels) == 0 or not layer.load.any():
        return start
    if exact:
        sets, count = layer.distinct
        first, uses = layer.uses
        pairs = np.zeros((1, 1), np.int64)
    else:
        sets, count = np.zeros((0, 2), np.int16), np.zeros(0, np.int64)
        first, uses = np.zeros(1, np.int64), np.zeros(0, np.int32)
        pairs = layer.pairs
    best: Occupant = tabu(
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
        steps,
        patience,
        max(2, layer.num_slots // 8),
        seed,
    )[0]
    return best
