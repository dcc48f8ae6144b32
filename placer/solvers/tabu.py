"""Fewest touched units within the load caps, by tabu search over swaps on the exact objective.

Idea: several starts (contiguous, load-only, random) go through tabu search on pairs, which is fast; the best
continue on the exact number of touched units, level by level at once. Rounds of shuffling a few units and
searching again follow until they stop paying. Where contiguous experts keep the caps, a split by sequence
decides first whether searching beats them on unseen tokens at all (gate groups often make them unbeatable).
Large traces are searched on every n-th token and polished on all of them.

Complexity per swap: E^2/2 evaluations of O(levels), and about 2 T k / E tokens visited to apply one.
Wins on every trace tried once co-activation is not uniform; where routing is uniform there is nothing to win.

References: Glover 1989, doi:10.1287/ijoc.1.3.190; Lourenco, Martin and Stuetzle, "Iterated Local Search",
2003, doi:10.1007/0-306-48056-5_11.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.layer import Layer, Occupant
from placer.search import descend
from placer.solvers import Placed

needs = frozenset({"routes"})
handles = frozenset({"caps", "levels"})

RANDOM_STARTS = 4
CONTINUED = 3  # starts that go on to the exact search
SAMPLE = 25_000  # tokens searched at first; a random sample of 20k is nearly as good as 100k
STALL = 12  # rounds without a new best after which to stop
SHUFFLED_UNITS, SHUFFLED_EXPERTS = 3, 24

Key = tuple[float, float]


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """The best arrangement found from several starts, or contiguous experts where they generalise better."""
    start = fallback(layer, initial)
    if clock.expired or len(layer.levels) == 0 or not layer.load.any():
        return Placed(slots=layer.slots(start))
    kept = contiguous(layer, rng)
    if kept is not None:
        return kept
    best, rounds = search(layer, start, rng=rng, clock=clock)
    return Placed(slots=layer.slots(best), claim=claim(layer, best), rounds=rounds)


def contiguous(layer: Layer, rng: np.random.Generator) -> Placed | None:
    """Contiguous experts, where they keep the caps and no search beats them on unseen tokens."""
    linear = layer.linear()
    if layer.excess(linear) > 0 or searching_pays(layer, rng):
        return None
    return Placed(
        slots=layer.slots(linear), notes=("contiguous experts kept: no search beat them on unseen tokens",)
    )


def fallback(layer: Layer, initial: npt.NDArray[np.int32] | None) -> Occupant:
    """What to return when there is no time: `initial` or contiguous experts, or load packing for the caps."""
    options = [layer.linear()]
    if initial is not None and np.bincount(initial[initial >= 0]).max() == 1:
        options.insert(0, layer.occupant(initial))
    if all(layer.excess(option) > 0 for option in options):
        options.append(layer.reference)
    return min(options, key=lambda option: quality(layer, option))


def quality(layer: Layer, occupant: Occupant) -> Key:
    """(excess, cost): the smaller the better."""
    return layer.excess(occupant), layer.cost(occupant)


def claim(layer: Layer, occupant: Occupant) -> float:
    """Cost of an arrangement as the compiled tables count it from scratch."""
    from placer.search.tabu import build_exact

    sets, count = layer.distinct
    units = layer.num_slots // int(layer.sizes[0])
    return layer.cost_of(build_exact(sets, count, occupant, layer.sizes, layer.weights_of_levels, units)[3])


def searching_pays(layer: Layer, rng: np.random.Generator) -> bool:
    """Whether a search on one half of the sequences beats contiguous experts on the other half."""
    if layer.key is None or len(layer.key) < 2:
        return True
    fit, unseen = layer.split()
    linear = layer.linear()
    bar = unseen.cost(linear)
    for start in (linear, random_start(layer, rng)):
        found, _ = descend(fit, start, exact=False, rng=rng)
        if unseen.cost(found) < bar:
            return True
        found, _ = descend(fit, found, exact=True, rng=rng)
        if unseen.cost(found) < bar:
            return True
    return False


def search(
    layer: Layer,
    start: Occupant,
    *,
    rng: np.random.Generator,
    clock: Clock,
    met: list[Occupant] | None = None,
) -> tuple[Occupant, int]:
    """Starts, exact search, then rounds of shuffling.

    Returns the best arrangement and the rounds run; `met` collects what every exact search ended with.
    """
    small = layer.sample(SAMPLE)
    best, best_key = start, quality(layer, start)
    pool: list[tuple[Key, int, Occupant]] = []
    starts = [start, layer.linear(), layer.reference]
    starts += [random_start(layer, rng) for _ in range(RANDOM_STARTS)]
    for number, begin in enumerate(starts):
        if clock.expired:
            break
        found, _ = descend(small, begin, exact=False, rng=rng)
        pool.append((quality(small, found), number, found))
    for _, _, begin in sorted(pool, key=lambda entry: entry[:2])[:CONTINUED]:
        if clock.expired:
            break
        found = polished(layer, small, begin, steps=1500, patience=400, rng=rng)
        key = quality(layer, found)
        if met is not None:
            met.append(found)
        if key < best_key:
            best, best_key = found, key
    rounds = stalled = 0
    while stalled < STALL and clock.allows(rounds):
        shuffled = shuffle(layer, best, rng)
        found = polished(layer, small, shuffled, steps=400, patience=150, rng=rng)
        rounds, stalled = rounds + 1, stalled + 1
        key = quality(layer, found)
        if met is not None:
            met.append(found)
        if key < best_key:
            best, best_key, stalled = found, key, 0
    return best, rounds


def polished(
    layer: Layer, small: Layer, start: Occupant, *, steps: int, patience: int, rng: np.random.Generator
) -> Occupant:
    """Exact search on the sample, then on all tokens where there are more."""
    found, _ = descend(small, start, exact=True, steps=steps, patience=patience, rng=rng)
    if small is not layer:
        found, _ = descend(layer, found, exact=True, steps=steps, patience=30, rng=rng)
    return found


def shuffle(layer: Layer, occupant: Occupant, rng: np.random.Generator) -> Occupant:
    """Half of the experts of a few units of one level, permuted among themselves."""
    size = int(rng.choice(layer.sizes))
    units = rng.choice(layer.num_slots // size, min(SHUFFLED_UNITS, layer.num_slots // size), replace=False)
    positions = (units[:, None] * size + np.arange(size)).ravel()
    moved = rng.choice(positions, max(2, min(len(positions) // 2, SHUFFLED_EXPERTS)), replace=False)
    shuffled = occupant.copy()
    shuffled[np.sort(moved)] = occupant[moved]
    return shuffled


def random_start(layer: Layer, rng: np.random.Generator) -> Occupant:
    """Experts anywhere."""
    return rng.permutation(layer.num_slots).astype(np.int32)
