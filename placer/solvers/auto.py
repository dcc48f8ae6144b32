"""The best of the methods in the time given.

Idea: contiguous experts stay where no search beats them on unseen tokens; else `cpsat` on layers small enough for its
proof, and `tabu` on all others, where recombining what it met has gained nothing on any recorded trace
(``python -m benchmarks.ablation``). Spare slots bring in copies: those of `placer.copies`, which are chosen for traffic
within the load caps, or `eplb`'s where these cost less. With counts only, the better of `eplb` and `lpt` balances load.

Wins wherever one does not want to choose. Complexity: that of the methods it runs.
References: see the methods.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from placer import copies
from placer.clock import Clock
from placer.layer import Layer, Occupant
from placer.solvers import Method, Placed, cpsat, eplb, linear, lpt, method
from placer.tables import judged

needs = frozenset({"load"})
handles = frozenset({"caps", "copies", "levels", "pins"})

START, SHARE = 4, 0.3  # rounds of search for where copies begin, and of the time that it may take
NEAR = 1.05  # copies of other methods are judged unless a sample of tokens costs so much more than with ours

NO_TIME = "time ran out before copies were searched for: a longer --time-limit finds better ones"
NONE_FOUND = "spare slots stay empty: no copies were found that cost less within the caps"
SPARE_UNUSED = (
    "spare slots stay empty: copies within constraints take a trace, load in tokens, and 2 to 64 servers "
    "(or GPUs of one)"
)


def place(layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: Occupant | None = None) -> Placed:
    """Run what suits the layer and return the best."""
    if layer.topk is None and layer.rules is None:
        return _balanced(layer, rng, clock)
    spare = layer.num_slots > layer.num_experts
    single = replace(layer, copies=False) if spare else layer  # whose caps can be met without copies
    begun, searched = clock, copies.suits(layer)
    if searched and clock.rounds is None:
        begun = replace(clock, rounds=START, deadline=time.monotonic() + SHARE * clock.remaining)
    placed = _single(single).place(single, rng=rng, clock=begun, initial=initial)
    if not spare:
        return placed
    if layer.rules is not None and not searched:
        return replace(placed, notes=(*placed.notes, SPARE_UNUSED))
    if clock.expired:
        return replace(placed, notes=(*placed.notes, NO_TIME)) if searched else placed
    return _with_copies(layer, placed, rng, clock)


def _single(layer: Layer) -> Method:
    """The method for a layer without copies."""
    if layer.rules is not None:
        return method("lpt" if layer.topk is None else "tabu")
    return method("cpsat" if cpsat.provable(layer) else "tabu")


def _balanced(layer: Layer, rng: np.random.Generator, clock: Clock) -> Placed:
    """The load method that leaves the busiest units less to do: above the caps, then over the mean."""
    named = {"eplb": eplb.place(layer, rng=rng, clock=clock), "lpt": lpt.place(layer, rng=rng, clock=clock)}
    best = min(named, key=lambda name: layer.judge(named[name].slots))
    note = f"counts only, traffic unknown: {best} leaves the busiest units the least load"
    return replace(named[best], notes=(*named[best].notes, note))


def _with_copies(layer: Layer, placed: Placed, rng: np.random.Generator, clock: Clock) -> Placed:
    """The best of a placement without copies, ours and those of `eplb` and `linear`."""
    best, (value, table) = placed.slots, judged(layer, placed.slots)
    runs = 0
    searched = copies.suits(layer)
    for found, judgement in copies.finds(layer, best, value, rng=rng, clock=clock) if searched else ():
        runs += 1
        if judgement[0] < value and (layer.rules is None or layer.rules.keeps(found)):
            best, (value, table) = found, judgement
    for other in _others(layer, best, value[0] > 0, rng, clock) if layer.rules is None else ():
        if (judgement := judged(layer, other))[0] < value:
            best, (value, table) = other, judgement
    kept = placed if best is placed.slots else Placed(slots=best)
    notes = placed.notes
    if searched and (runs == 0 or kept is placed):
        notes = (*notes, NO_TIME if runs == 0 else NONE_FOUND)
    return replace(kept, table=table, rounds=placed.rounds + runs, notes=notes)


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
