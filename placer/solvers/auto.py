"""The best of the methods in the time given.

Idea: contiguous experts stay where no search beats them on unseen tokens; else `cpsat` on layers small enough for its
proof, and `tabu` on all others, where recombining what it met has gained nothing on any recorded trace
(``python -m benchmarks.ablation``). Spare slots bring in copies: those of `placer.copies`, which are chosen for traffic
within the load caps, or `eplb`'s where these cost less. With counts only, `eplb` balances load.

Wins wherever one does not want to choose. Complexity: that of the methods it runs.
References: see the methods.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from placer import copies
from placer.clock import Clock
from placer.layer import Layer
from placer.solvers import Placed, cpsat, eplb, linear, tabu
from placer.tables import judged

needs = frozenset({"load"})
handles = frozenset({"caps", "copies", "levels"})

START = 4  # rounds of search for where copies begin


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """Run what suits the layer and return the best."""
    if layer.topk is None:
        return eplb.place(layer, rng=rng, clock=clock, initial=initial)
    copied = layer.num_slots > layer.num_experts and copies.suits(layer)
    place_single = cpsat.place if cpsat.provable(layer) else tabu.place
    few = replace(clock, rounds=START) if copied and clock.rounds is None else clock
    placed = place_single(layer, rng=rng, clock=few, initial=initial)
    if layer.num_slots == layer.num_experts or clock.expired:
        return placed
    options = [placed, eplb.place(layer, rng=rng, clock=clock), linear.place(layer, rng=rng, clock=clock)]
    runs = 0
    if copied:
        slots, runs = copies.with_copies(layer, placed.slots, rng=rng, clock=clock)
        options.append(Placed(slots=slots))
    values = [judged(layer, option.slots) for option in options]
    best = min(range(len(options)), key=lambda at: values[at][0][:2])
    return replace(options[best], table=values[best][1], rounds=placed.rounds + runs)
