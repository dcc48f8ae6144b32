"""Fewest touched units within the load caps, by simulated annealing on exact swap changes, then a descent.

Idea: random swaps are accepted when they help, or with a chance that falls with their cost and with time;
temperatures are shares of the mean change of sampled swaps, so that no scale has to be guessed. Load above a cap
is penalised. A short tabu search finishes every run; each round anneals again from the best, cooler at first.

Complexity: steps x O(levels), and about 2 T k / E tokens for every accepted swap.
Wins over tabu search on many small units (16 servers and more) given time; loses where seconds count.

References: Kirkpatrick, Gelatt and Vecchi 1983, doi:10.1126/science.220.4598.671.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.layer import Layer, Occupant
from placer.search import descend
from placer.solvers import Placed, tabu

needs = frozenset({"routes"})
handles = frozenset({"caps", "levels"})

STEPS_PER_PAIR = 20  # proposals of a run for each pair of experts
HOT, COLD = 0.5, 0.005  # temperatures as shares of the mean absolute change
STALL = 3  # runs without a new best after which to stop
PENALTY = 1.0  # touched units that a token above a cap costs


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """The best of several annealing runs, or contiguous experts where they generalise better."""
    best = tabu.fallback(layer, initial)
    if len(layer.levels) == 0 or not layer.load.any():
        return Placed(slots=layer.slots(best))
    if clock.expired:
        return Placed(slots=layer.slots(best), notes=(tabu.OUT_OF_TIME,))
    kept = tabu.contiguous(layer, rng)
    if kept is not None:
        return kept
    small = layer.sample(tabu.SAMPLE)
    key = tabu.quality(layer, best)
    current, rounds, stalled = best, 0, 0
    while stalled < STALL and clock.allows(rounds):
        found = annealed(small, current, HOT if rounds == 0 else HOT / 4, rng)
        found, _ = descend(small, found, exact=True, steps=400, patience=60, rng=rng)
        if small is not layer:
            found, _ = descend(layer, found, exact=True, steps=400, patience=30, rng=rng)
        rounds, stalled = rounds + 1, stalled + 1
        if tabu.quality(layer, found) < key:
            best, key, stalled = found, tabu.quality(layer, found), 0
        current = best
    return Placed(slots=layer.slots(best), claim=layer.cost(best), rounds=rounds)


def annealed(layer: Layer, start: Occupant, hot: float, rng: np.random.Generator) -> Occupant:
    """One annealing run from `start`."""
    from placer.search.annealing import anneal

    sets, count = layer.distinct
    first, uses = layer.uses
    steps = STEPS_PER_PAIR * layer.num_slots * (layer.num_slots - 1) // 2
    best, _, _ = anneal(
        start,
        layer.expert_load,
        sets,
        count,
        first,
        uses,
        layer.sizes,
        layer.weights_of_levels,
        layer.caps[list(layer.levels)],
        layer.num_slots // int(layer.sizes[0]),
        PENALTY,
        rng.integers(0, layer.num_slots, (steps, 2)),
        1.0 - rng.random(steps),
        hot,
        COLD,
        layer.idle_table(layer.levels),
    )
    found: Occupant = best
    return found
