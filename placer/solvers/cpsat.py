"""Fewest touched units, proved: a search, then set partition over whole unit contents.

Idea: the cost of a partition is the sum of what its contents cost, so the best partition is the cheapest choice of
contents that holds every expert once (see `placer.bounds.columns` and `placer.master`). Where one level decides and
no slot is spare, a proof closes in on the search's result from below, and replaces it where it comes upon
something better. Elsewhere, the contents of servers that a tabu search met are recombined: a column is then the
experts of one server and how they stand inside it, its cost weighted over the levels within. Nothing worse than the
search's best is ever returned.

The textbook model (expert-to-server and token-touches-server booleans) has a root bound of one server per
token and is not used. Complexity: that of the proof, which takes the time it gets.
Wins on units of up to eight experts, where it is a proof.

References: Barnhart et al., "Branch-and-Price", 1998, doi:10.1287/opre.46.3.316; OR-Tools CP-SAT.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from placer.bounds import Partition, prove
from placer.clock import Clock
from placer.layer import Layer, Occupant
from placer.master import cheapest
from placer.solvers import Placed, tabu

needs = frozenset({"routes"})
handles = frozenset({"caps", "levels"})

EASY_CONTENTS = 700_000  # a proof over so many possible contents takes a few seconds at most


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """Tabu search, then the best recombination of the contents it met, or of all contents there are."""
    best = tabu.fallback(layer, initial)
    if len(layer.levels) == 0 or not layer.load.any():
        return Placed(slots=layer.slots(best))
    if clock.expired:
        return Placed(slots=layer.slots(best), notes=(tabu.OUT_OF_TIME,))
    met: list[Occupant] = []
    half = replace(clock, deadline=time.monotonic() + clock.remaining / 2)
    best, rounds = tabu.search(layer, best, rng=rng, clock=half, met=met)
    if clock.expired:
        return Placed(slots=layer.slots(best), claim=layer.cost(best), rounds=rounds)
    if not one_level(layer):
        best = min(recombined(layer, best, met, clock), best, key=lambda option: tabu.quality(layer, option))
        return Placed(slots=layer.slots(best), claim=layer.cost(best), rounds=rounds)
    level = layer.levels[0]
    size = layer.unit_slots[level]
    partition = Partition.of_layer(layer, size, cap=float(layer.caps[level]))
    proof = prove(partition, layer.positions(best) // size, clock=clock)
    found = np.argsort(proof.unit_of_item, kind="stable").astype(np.int32)
    best = min(best, found, key=lambda option: tabu.quality(layer, option))
    return Placed(
        slots=layer.slots(best),
        claim=layer.cost(best),
        bound=min(layer.cost_of(proof.bound), layer.cost(best)),
        bound_method=proof.method,
        rounds=rounds,
    )


def one_level(layer: Layer) -> bool:
    """Whether one level alone decides the cost, and copies cannot lower it below any partition's."""
    return len(layer.levels) == 1 and layer.num_slots == layer.num_experts


def provable(layer: Layer) -> bool:
    """Whether a proof will take a few seconds at most."""
    return one_level(layer) and math.comb(layer.num_slots, int(layer.sizes[0])) <= EASY_CONTENTS


def recombined(layer: Layer, best: Occupant, met: list[Occupant], clock: Clock) -> Occupant:
    """The cheapest partition into server contents that were met."""
    width = _width(layer)
    contents = np.unique(np.concatenate([option.reshape(-1, width) for option in [best, *met]]), axis=0)
    contents = contents[_within_caps(layer, contents)]
    contents, cost = _cheapest_of_equal(contents, _cost(layer, contents))
    held = best.reshape(-1, width)
    known = float(_cost(layer, held).sum())
    grain = 1.0 if np.array_equal(cost, np.round(cost)) else known / 2**30
    if not _within_caps(layer, held).all():
        known = float(cost.sum())  # anything within the caps is better
    choice = cheapest(
        contents,
        np.floor(cost / grain),
        layer.num_slots,
        layer.num_slots // width,
        known=math.ceil(known / grain),
        clock=clock,
    )
    return best if choice.chosen is None else contents[choice.chosen].ravel().astype(np.int32)


def _width(layer: Layer) -> int:
    """Slots of the master's unit: the server, or where there is one server only, the largest level."""
    server = layer.server_ranks * layer.slots_per_rank
    return server if server in layer.sizes else int(layer.sizes[-1])


def _within_caps(layer: Layer, contents: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    load = layer.expert_load[contents]
    fits = np.ones(len(contents), bool)
    for level in layer.levels:
        size = layer.unit_slots[level]
        if size <= contents.shape[1]:
            heat = load.reshape(len(contents), -1, size).sum(axis=2)
            fits &= (heat <= layer.caps[level]).all(axis=1)
    return fits


def _cost(layer: Layer, contents: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Tokens that touch each content, plus those that touch the units inside it, by `weights_of_levels`."""
    from placer.search import bit_masks
    from placer.search.counting import count_covered

    sets, count = layer.distinct
    tokens = bit_masks(sets, layer.num_slots)
    cost = np.zeros(len(contents))
    for size, weight in zip(layer.sizes.tolist(), layer.weights_of_levels, strict=True):
        if size <= contents.shape[1]:
            units = contents.reshape(-1, size)
            covered = count_covered(tokens, count, bit_masks(units, layer.num_slots))
            cost += weight * covered.reshape(len(contents), -1).sum(axis=1)
    return cost


def _cheapest_of_equal(
    contents: npt.NDArray[np.int32], cost: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """One column per set of experts: its cheapest inner arrangement."""
    order = np.argsort(cost, kind="stable")
    _, first = np.unique(np.sort(contents[order], axis=1), axis=0, return_index=True)
    keep = order[np.sort(first)]
    return contents[keep], cost[keep]
