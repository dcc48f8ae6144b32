"""Copies: experts on several servers, so that fewer tokens leave theirs and no unit is overloaded.

Idea: what servers hold is annealed as a whole: swaps of two experts, and other experts in slots that are empty or
hold a copy. The cost is exact for the dispatch rule, touched servers other than the home's, plus a penalty for load
above the caps. Copies share load evenly in the search, or under ``cover`` as its kernel counts them; there the cap is
adapted at the end of a run to what the rule really does. Each server's experts are then arranged on its GPUs by tabu
search. Runs get longer from one to the next, and each starts hot.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.layer import Floats, Ints, Layer
from placer.search import descend

Slots = npt.NDArray[np.int32]

SAMPLE = 3_000  # distinct expert sets that the hot part of a run sees
CHUNKS, FINAL = 12, 5  # parts of a run, and those of them at its end that see all tokens
MOVES = 12  # proposals of a chunk in the first run, for each slot
RUNS, LONGER = 4, 8  # runs at most, unless rounds are asked for, and how much longer each is than the last
FITTING = 0.8  # of the time left may be taken by a run, by what the last one took
HOT, COLD = 2e-2, 3e-4  # temperatures: touched units, as a share of the tokens
CHOICE = 4  # moves drawn at a time, of which the best by pairs is tried
PENALTY, STEEPER, FLATTER = 1.0, 1.5, 1.2  # touched units for a token above a cap, and how that is adapted
STEEPEST, FLATTEST = 3.0, 0.3
REPAIRS = 6  # chunks at the end, at most, that bring load below the cap
WITHIN = 0.999  # of the cap, which the search aims at
ABOVE = 1.01  # and no less than this times the mean, near which nothing can be moved


def suits(layer: Layer) -> bool:
    """Whether there are slots to spare, tokens to see, and few enough servers for the compiled search.

    Under the rule ``table`` all tokens of one server take the same copy, so one server has no use for others.
    """
    from placer.search.copies import RULES, UNITS

    units = layer.num_slots // _width(layer)
    rules = {*RULES, "table"} if layer.num_ranks > layer.server_ranks else {*RULES}
    useful = layer.num_slots > layer.num_experts and layer.topk is not None and bool(layer.load.any())
    return useful and layer.rule in rules and 1 < units <= UNITS


def finds(layer: Layer, slots: Slots, *, rng: np.random.Generator, clock: Clock) -> Iterator[Slots]:
    """Slots with copies in the spare ones, those of every run.

    Parameters
    ----------
    layer : Layer
        One that `suits`, its caps those that copies can meet.
    slots : (num_slots,) int32
        Where runs begin: every expert once.
    rng : numpy.random.Generator
    clock : Clock
        Asked between chunks; a run that is cut short does not count.
    """
    small = layer.sample(SAMPLE)
    start = slots.reshape(-1, _width(layer)).astype(np.int64)
    runs, moves = 0, MOVES * layer.num_slots
    while clock.allows(runs) and (clock.rounds is not None or runs < RUNS) and moves > MOVES:
        begun = time.monotonic()
        content = _annealed(layer, small, start, moves, rng, clock)
        if content is None:
            return
        runs += 1
        yield _on_gpus(layer, small, content, rng)
        longer = float(LONGER)
        if clock.rounds is None:  # else the same rounds are the same work
            longer = min(longer, FITTING * clock.remaining / max(1e-3, time.monotonic() - begun))
        moves = min(int(moves * longer), MOVES * layer.num_slots * LONGER ** (RUNS - 1))


def _width(layer: Layer) -> int:
    """Slots of a unit that holds an expert once: a server, or a GPU where there is one server."""
    server = layer.server_ranks * layer.slots_per_rank
    return server if server < layer.num_slots else layer.slots_per_rank


def _annealed(
    layer: Layer, small: Layer, start: Ints, moves: int, rng: np.random.Generator, clock: Clock
) -> Ints | None:
    """What servers hold after one run; None where the clock ran out."""
    content, width = start.copy(), start.shape[1]
    level, limits = layer.unit_slots.index(width), layer.caps
    mean = float(layer.load.sum()) / len(content)
    aim, least = WITHIN * limits[level], min(WITHIN * limits[level], mean * ABOVE)
    penalty, over = PENALTY, 0.0
    for chunk in range(CHUNKS + REPAIRS):
        if clock.expired:
            return None
        if chunk >= CHUNKS and over == 0:
            break
        seen = small if chunk < CHUNKS - FINAL else layer
        hot, cold = (HOT * (COLD / HOT) ** (min(x, CHUNKS) / CHUNKS) for x in (chunk, chunk + 1))
        draws = rng.random((moves, 2 + 2 * CHOICE))
        over = _anneal(layer, seen, content, (aim, limits[0]), penalty, (hot, cold), draws)
        if chunk >= CHUNKS - 1 and layer.rule == "cover":  # whose loads the search knows approximately
            busiest = float(layer.counts(_dealt(layer, content)).load[level].max())
            over = max(0.0, busiest - limits[level])
            aim = max(aim * min(1.0, limits[level] / busiest), least)
        penalty = min(penalty * STEEPER, STEEPEST) if over > 0 else max(penalty / FLATTER, FLATTEST)
    return content


def _anneal(
    layer: Layer,
    seen: Layer,
    content: Ints,
    caps_of: tuple[float, float],
    penalty: float,
    heat: tuple[float, float],
    draws: Floats,
) -> float:
    """One chunk of a run, on the tokens of `seen`: the load above the cap that is left.

    `caps_of` are those of a unit and of one copy; `heat` are temperatures per token.
    """
    from placer.search.copies import RULES, anneal_copies

    share = float(seen.load.sum()) / max(1.0, float(layer.load.sum()))
    tokens = len(seen.tokens)
    _, over = anneal_copies(
        RULES["nearest" if layer.rule == "table" else layer.rule],
        content,
        *seen.distinct,
        *seen.uses,
        layer.pairs[: layer.num_experts, : layer.num_experts].astype(np.float64),
        layer.load * share,
        caps_of[0] * share,
        caps_of[1] * share,
        penalty,
        heat[0] * tokens,
        heat[1] * tokens,
        draws,
    )
    return float(over)


def _dealt(layer: Layer, content: Ints) -> Slots:
    """Slots from what units hold, the experts of each dealt to its GPUs in turn."""
    ranks = content.shape[1] // layer.slots_per_rank
    last = layer.num_experts
    ordered = np.sort(np.where(content < 0, last, content), axis=1)
    dealt = ordered.reshape(len(content), layer.slots_per_rank, ranks).transpose(0, 2, 1)
    flat = dealt.ravel()
    return np.where(flat == last, -1, flat).astype(np.int32)


def _on_gpus(layer: Layer, small: Layer, content: Ints, rng: np.random.Generator) -> Slots:
    """Slots from what servers hold: each server's experts on its GPUs, within the caps and for few touched ones."""
    ranks = content.shape[1] // layer.slots_per_rank
    if ranks == 1:
        return _dealt(layer, content)
    rows = [_arranged(layer, small, row, content, ranks, rng) for row in content]
    return np.concatenate(rows).astype(np.int32)


def _arranged(
    layer: Layer, small: Layer, row: Ints, content: Ints, ranks: int, rng: np.random.Generator
) -> Slots:
    members = row[row >= 0]
    if len(members) == 0:
        return np.full(len(row), -1, np.int32)
    number = np.bincount(content[content >= 0], minlength=layer.num_experts)
    place = np.full(layer.num_experts + 1, -1, np.int32)  # the last one is for -1
    place[members] = np.arange(len(members))
    topk = place[small.tokens]
    topk = topk[(topk >= 0).sum(axis=1) > 1]
    heat = (layer.load[members] / number[members]).round().astype(np.int64)
    mean = heat.sum() / ranks
    limit = float(layer.caps[0])
    part = Layer(
        index=layer.index,
        num_experts=len(members),
        num_ranks=ranks,
        slots_per_rank=layer.slots_per_rank,
        unit_ranks=(1,),
        seconds=layer.seconds[:1],
        server_ranks=1,
        rule="nearest",
        max_load=max(1.0, limit / mean) if mean and math.isfinite(limit) else None,
        margin=0.0,
        load=heat,
        topk=topk,
    )
    arranged, _ = descend(part, part.reference, exact=True, steps=200, patience=50, rng=rng)
    local = part.slots(arranged)
    return np.where(local >= 0, members[np.maximum(local, 0)], -1).astype(np.int32)
