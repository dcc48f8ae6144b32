"""The best of the methods in the time given.

Idea: contiguous experts stay where no search beats them on unseen tokens; else `cpsat` on layers small enough for its
proof, and `tabu` on all others, where recombining what it met has gained nothing on any recorded trace
(``python -m benchmarks.ablation``). Spare slots bring in copies: those of `placer.copies`, which are chosen for traffic
within the load caps, or `eplb`'s where these cost less. With counts only, `eplb` balances load.

Wins wherever one does not want to choose. Complexity: that of the methods it runs.
References: see the methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from placer import copies
from placer.clock import Clock
from placer.layer import Layer, Occupant
from placer.solvers import Placed, cpsat, eplb, linear, tabu
from placer.tables import judged

needs = frozenset({"load"})
handles = frozenset({"caps", "copies", "levels"})

START = 4  # rounds of search for where copies begin
NEAR = 1.05  # copies of other methods are judged unless a sample of tokens costs so much more than with ours


def place(layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: Occupant | None = None) -> Placed:
    """Run what suits the layer and return the best."""
    if layer.topk is None:
        return eplb.place(layer, rng=rng, clock=clock, initial=initial)
    spare = layer.num_slots > layer.num_experts
    single = replace(layer, copies=False) if spare else layer  # whose caps can be met without copies
    place_single = cpsat.place if cpsat.provable(single) else tabu.place
    few = replace(clock, rounds=START) if spare and copies.suits(layer) and clock.rounds is None else clock
    placed = place_single(single, rng=rng, clock=few, initial=initial)
    return placed if not spare or clock.expired else _with_copies(layer, placed, rng, clock)


def _with_copies(layer: Layer, placed: Placed, rng: np.random.Generator, clock: Clock) -> Placed:
    """The best of a placement without copies, ours and those of `eplb` and `linear`."""
    best, (value, table) = placed.slots, judged(layer, placed.slots)
    runs = 0
    for found in copies.finds(layer, best, rng=rng, clock=clock) if copies.suits(layer) else ():
        runs += 1
        if (judgement := judged(layer, found))[0] < value:
            best, (value, table) = found, judgement
    for other in _others(layer, best, value[0] > 0, rng, clock):
        if (judgement := judged(layer, other))[0] < value:
            best, (value, table) = other, judgement
    kept = placed if best is placed.slots else Placed(slots=best)
    return replace(kept, table=table, rounds=placed.rounds + runs)


def _others(
    layer: Layer, best: Occupant, heavy: bool, rng: np.random.Generator, clock: Clock
) -> Iterator[Occupant]:
    """Other methods' copies: those that may cost less than the best, or all while that is too `heavy`."""
    small = layer.sample(copies.SAMPLE)
    enough = NEAR * judged(small, best)[0][1]
    for other in (eplb, linear):
        slots = other.place(layer, rng=rng, clock=clock).slots
        if heavy or judged(small, slots)[0][1] <= enough:
            yield slots
