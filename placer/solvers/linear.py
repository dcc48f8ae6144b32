"""Experts in order, contiguous ranks: what every stack does by default; spare slots take copies in order.

Idea: rank r holds the experts r * E/R up to (r + 1) * E/R. With spare slots, slot s holds expert s mod E, the
initial map of serving stacks with redundant experts.
Wins when gate groups already keep a token's experts together. Complexity O(slots).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.layer import Layer
from placer.solvers import Placed

needs = frozenset[str]()
handles = frozenset({"copies"})


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """Contiguous experts; copies 0, 1, 2, ... in the slots behind the last expert."""
    slots = np.arange(layer.num_slots, dtype=np.int32) % layer.num_experts
    return Placed(slots=_without_duplicates(layer, slots))


def _without_duplicates(layer: Layer, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Empty every slot that repeats an expert of its own rank (more slots per rank than experts)."""
    rows = slots.reshape(layer.num_ranks, -1).copy()
    for row in rows:
        _, first = np.unique(row, return_index=True)
        kept = row[np.sort(first)]
        row[:] = -1
        row[: len(kept)] = kept
    return rows.ravel()
