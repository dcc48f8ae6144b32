"""The best of the methods in the time given.

Idea: contiguous experts stay where no search beats them on unseen tokens; else `cpsat` on layers small enough for its
proof, and `tabu` on all others, where recombining what it met has gained nothing on any recorded trace
(``python -m benchmarks.ablation``). Spare slots bring in `eplb`, whose copies are kept
where they cost less within the caps. With counts only, `eplb` balances load.

Wins wherever one does not want to choose. Complexity: that of the methods it runs.
References: see the methods.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.layer import Layer
from placer.solvers import Placed, cpsat, eplb, tabu

needs = frozenset({"load"})
handles = frozenset({"caps", "copies", "levels"})


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """Run what suits the layer and return the best."""
    if layer.topk is None:
        return eplb.place(layer, rng=rng, clock=clock, initial=initial)
    place_single = cpsat.place if cpsat.provable(layer) else tabu.place
    placed = place_single(layer, rng=rng, clock=clock, initial=initial)
    if layer.num_slots > layer.num_experts and not clock.expired:
        copied = eplb.place(layer, rng=rng, clock=clock, initial=initial)
        if layer.score(copied.slots) < layer.score(placed.slots):
            return replace(copied, rounds=placed.rounds)
    return placed
