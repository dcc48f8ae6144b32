"""New arrangements out of old ones: random, hierarchical, shuffled and crossed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placer.layer import Layer, Occupant
from placer.search import descend

SHUFFLED_UNITS = (2, 4)
SHUFFLED_EXPERTS = 24


def random_start(layer: Layer, rng: np.random.Generator) -> Occupant:
    """Experts anywhere."""
    return rng.permutation(layer.num_slots).astype(np.int32)


def hierarchical(layer: Layer, rng: np.random.Generator) -> list[Occupant]:
    """Arrangements by pairs that see one level first: outermost first (top-down), and servers first.

    Top-down settles the racks, then the servers within them, and so on; servers-first settles the servers and
    then lets all levels move. One level: none.
    """
    if len(layer.levels) < 2:
        return []
    starts = []
    for first in dict.fromkeys((layer.levels[-1], _server_level(layer))):
        alone = replace(layer, seconds=tuple(s if i == first else 0.0 for i, s in enumerate(layer.seconds)))
        starts.append(descend(alone, random_start(layer, rng), exact=False, rng=rng)[0])
    return starts


def _server_level(layer: Layer) -> int:
    server = layer.server_ranks * layer.slots_per_rank
    return next((level for level in layer.levels if layer.unit_slots[level] == server), layer.levels[0])


def shuffled(layer: Layer, occupant: Occupant, rng: np.random.Generator) -> Occupant:
    """Half of the experts of a few units of one level, permuted among themselves."""
    size = int(rng.choice(layer.sizes))
    number = min(int(rng.integers(SHUFFLED_UNITS[0], SHUFFLED_UNITS[1] + 1)), layer.num_slots // size)
    units = rng.choice(layer.num_slots // size, number, replace=False)
    positions = (units[:, None] * size + np.arange(size)).ravel()
    moved = rng.choice(positions, max(2, min(len(positions) // 2, SHUFFLED_EXPERTS)), replace=False)
    changed = occupant.copy()
    changed[np.sort(moved)] = occupant[moved]
    return changed


def crossed(layer: Layer, one: Occupant, other: Occupant, rng: np.random.Generator) -> Occupant:
    """A child that inherits whole units from two parents in turn, fullest first; experts left over go anywhere.

    Units are servers, or those of the largest level where there is one server; units inherited from a parent
    keep their inner order.
    """
    size = layer.unit_slots[_server_level(layer)]
    parents = [one.reshape(-1, size), other.reshape(-1, size)]
    free = np.ones(layer.num_slots, bool)
    child = np.full((layer.num_slots // size, size), -1, np.int32)
    turn = int(rng.integers(2))
    for row in child:
        kept = free[parents[turn]]
        fullness = kept.sum(axis=1)
        unit = int(rng.choice(np.flatnonzero(fullness == fullness.max())))
        row[kept[unit]] = parents[turn][unit][kept[unit]]
        free[row[row >= 0]] = False
        turn = 1 - turn
    child[child < 0] = rng.permutation(np.flatnonzero(free))
    return child.ravel()
