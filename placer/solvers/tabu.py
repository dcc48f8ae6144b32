"""Fewest touched units within the load caps, by tabu search over swaps on the exact objective.

Idea: many starts (contiguous, load-only, hierarchical, random) go through tabu search on pairs, which is fast; the
best of them continue on the exact number of touched units, all levels at once, and make an elite. Rounds cross
two of the elite (whole units inherited in turn) or shuffle a few units of one, search again, and keep what is
better, until that stops paying, or for as many rounds as are asked for. Where contiguous experts keep the caps,
a split by sequence decides first whether searching beats them on unseen tokens at all (gate groups often make
them unbeatable). Large traces are searched on every n-th token first and then on all of them.

Complexity per swap: E^2/2 evaluations of O(levels), and about 2 T k / E tokens visited to apply one.
Wins on every trace tried once co-activation is not uniform; where routing is uniform there is nothing to win.

References: Glover 1989, doi:10.1287/ijoc.1.3.190; crossing whole parts as in Galinier and Hao, "Hybrid
Evolutionary Algorithms for Graph Coloring", 1999, doi:10.1023/A:1009823419804.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.layer import Layer, Occupant
from placer.search import descend
from placer.search.variation import crossed, hierarchical, random_start, shuffled
from placer.solvers import Placed

needs = frozenset({"routes"})
handles = frozenset({"caps", "levels", "pins"})

RANDOM_STARTS = 12
ELITE = 8  # starts that go on to the exact search
CROSSED = 0.5  # share of rounds that cross two of the elite; the others shuffle one
SAMPLE = 25_000  # distinct expert sets searched at first; a random sample of 20k is nearly as good as 100k
STEPS, PATIENCE = 600, 150  # swaps of one exact search, and swaps without a new best that end it
PAIR_STEPS, PAIR_PATIENCE = 300, 50  # the same on pairs, from every start
QUICK = 15  # the same, for the first exact search from every start
STALL = 40  # rounds without a new best after which to stop, unless rounds are asked for
SAMPLE_STALL, FINAL_STALL = 12, 4  # the same with more sets than SAMPLE, and on all tokens after a sample

OUT_OF_TIME = "time ran out before the search: a quick arrangement is returned"

Key = tuple[float, float]


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """The best arrangement found from several starts, or contiguous experts where they generalise better."""
    start = fallback(layer, initial)
    if len(layer.levels) == 0 or not layer.load.any():
        return Placed(slots=layer.slots(start))
    if clock.expired:
        return Placed(slots=layer.slots(start), notes=(OUT_OF_TIME,))
    kept = contiguous(layer, rng)
    if kept is not None:
        return kept
    best, rounds = search(layer, start, rng=rng, clock=clock)
    return Placed(slots=layer.slots(best), claim=layer.cost(best), rounds=rounds)


def contiguous(layer: Layer, rng: np.random.Generator) -> Placed | None:
    """Contiguous experts, where they keep the caps and no search beats them on unseen tokens."""
    linear = layer.linear()
    if layer.rules is not None and not layer.rules.keeps(linear):
        return None
    if layer.excess(linear) > 0 or searching_pays(layer, rng):
        return None
    return Placed(
        slots=layer.slots(linear), notes=("contiguous experts kept: no search beat them on unseen tokens",)
    )


def fallback(layer: Layer, initial: npt.NDArray[np.int32] | None) -> Occupant:
    """The best that takes next to no time: `initial`, contiguous experts, load packing, a short search on pairs."""
    options = [layer.linear()]
    if initial is not None and np.bincount(initial[initial >= 0]).max() == 1:
        options.insert(0, layer.occupant(initial))
    options = [layer.repaired(option) for option in options]
    if all(layer.excess(option) > 0 for option in options):
        options.append(layer.reference)
    best = min(options, key=lambda option: quality(layer, option))
    options.append(descend(layer, best, exact=False, steps=200, rng=np.random.default_rng(0))[0])
    return min(best, options[-1], key=lambda option: quality(layer, option))


def quality(layer: Layer, occupant: Occupant) -> Key:
    """(excess, cost): the smaller the better."""
    return layer.excess(occupant), layer.cost(occupant)


def searching_pays(layer: Layer, rng: np.random.Generator) -> bool:
    """Whether a search on one half of the sequences beats contiguous experts on the other half."""
    if layer.key is None or len(layer.key) < 2:
        return True
    fit, unseen = layer.split()
    linear = layer.linear()
    bar = unseen.cost(linear)
    for start in (linear, random_start(layer, rng)):
        found, _ = descend(fit, start, exact=False, steps=PAIR_STEPS, patience=PAIR_PATIENCE, rng=rng)
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
    """Starts, elite, rounds; on a sample of the tokens first where there are many.

    Returns the best arrangement and the rounds run; `met` collects what every exact search ended with.
    """
    small = layer.sample(SAMPLE)
    elite = _Elite(small, met if small is layer and met is not None else [])
    best = _Best(layer, start)
    for begin in _arranged_by_pairs(small, _starts(layer, small, start, rng), rng, clock):
        if clock.expired and elite.members:
            return best.occupant, 0
        arranged, _ = descend(small, begin, exact=True, steps=STEPS, patience=QUICK, rng=rng)
        if elite.add(arranged):
            best.offer(_polished(layer, small, arranged, rng))
    for _, member in tuple(elite.members):
        if clock.expired:
            return best.occupant, 0
        if elite.add(_searched(small, member, rng)):
            best.offer(_polished(layer, small, elite.members[0][1], rng))
    patience = STALL if len(layer.distinct[0]) <= SAMPLE else SAMPLE_STALL
    rounds = _rounds(layer, small, elite, best, patience, 0, rng, clock)
    if small is not layer and clock.allows(rounds):
        whole = _Elite(layer, met if met is not None else [])
        for _, member in elite.members:
            if clock.expired:
                break
            whole.add(_polished(layer, small, member, rng))
            best.offer(whole.members[0][1])
        rounds = _rounds(layer, layer, whole, best, FINAL_STALL, rounds, rng, clock)
    return best.occupant, rounds


def _starts(layer: Layer, small: Layer, start: Occupant, rng: np.random.Generator) -> Iterator[Occupant]:
    """What to begin from: given, contiguous, load-only, one level at a time, random."""
    yield from (start, layer.linear(), layer.reference)
    yield from hierarchical(small, rng)
    for _ in range(RANDOM_STARTS):
        yield random_start(layer, rng)


def _arranged_by_pairs(
    layer: Layer, starts: Iterator[Occupant], rng: np.random.Generator, clock: Clock
) -> list[Occupant]:
    """The starts after tabu search on pairs, the best first; at least one."""
    found: list[tuple[Key, int, Occupant]] = []
    for number, begin in enumerate(starts):
        if clock.expired and found:
            break
        arranged, _ = descend(layer, begin, exact=False, steps=PAIR_STEPS, patience=PAIR_PATIENCE, rng=rng)
        found.append((quality(layer, arranged), number, arranged))
    return [arranged for _, _, arranged in sorted(found, key=lambda entry: entry[:2])]


def _searched(layer: Layer, start: Occupant, rng: np.random.Generator) -> Occupant:
    return descend(layer, start, exact=True, steps=STEPS, patience=PATIENCE, rng=rng)[0]


def _rounds(
    layer: Layer,
    small: Layer,
    elite: _Elite,
    best: _Best,
    patience: int,
    done: int,
    rng: np.random.Generator,
    clock: Clock,
) -> int:
    """Vary the elite until `patience` rounds bring no new best, or for the rounds asked for; returns all done."""
    stalled = 0
    asked = clock.rounds is not None and small is layer
    while (asked or stalled < patience) and clock.allows(done):
        members = [member for _, member in elite.members]
        if len(members) > 1 and rng.random() < CROSSED:
            one, other = rng.choice(len(members), 2, replace=False)
            begin = crossed(small, members[one], members[other], rng)
        else:
            begin = shuffled(small, members[rng.integers(len(members))], rng)
        found = _searched(small, begin, rng)
        done, stalled = done + 1, stalled + 1
        if elite.add(found):
            stalled = 0
            best.offer(_polished(layer, small, found, rng))
    return done


def _polished(layer: Layer, small: Layer, occupant: Occupant, rng: np.random.Generator) -> Occupant:
    """The arrangement after a search on all tokens, where it was found on a sample."""
    if small is layer:
        return occupant
    return descend(layer, occupant, exact=True, steps=STEPS, patience=30, rng=rng)[0]


class _Best:
    """The best arrangement offered so far."""

    def __init__(self, layer: Layer, occupant: Occupant) -> None:
        self.layer, self.occupant, self.key = layer, occupant, quality(layer, occupant)

    def offer(self, occupant: Occupant) -> None:
        key = quality(self.layer, occupant)
        if key < self.key:
            self.occupant, self.key = occupant, key


class _Elite:
    """A few good arrangements of different quality, the best first."""

    def __init__(self, layer: Layer, met: list[Occupant]) -> None:
        self.layer, self.met = layer, met
        self.members: list[tuple[Key, Occupant]] = []

    def add(self, occupant: Occupant) -> bool:
        """Take an arrangement in; whether it is the new best."""
        self.met.append(occupant)
        key = quality(self.layer, occupant)
        if any(key == other for other, _ in self.members):
            return False
        self.members = sorted([*self.members, (key, occupant)], key=lambda entry: entry[0])[:ELITE]
        return self.members[0][0] == key
