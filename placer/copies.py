"""Copies: experts on several servers, so that fewer tokens leave theirs and no unit is overloaded.

Idea: what servers hold is annealed as a whole: swaps of two experts, and other experts in slots that are empty or
hold a copy. The cost is exact for the dispatch rule, touched servers other than the home's, plus penalties: for load
above the caps, and for the variance of a server's load on unseen tokens, estimated from parts of the trace, because
experts that are used together are hot together. Copies share load evenly in the search, or under ``cover`` as its
kernel counts them, put right from chunk to chunk by what the rule really does. Each server's experts are then arranged
on its GPUs (`placer.gpus`). Runs get longer from one to the next, and each starts hot.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.gpus import on_gpus, part_loads
from placer.layer import Floats, Ints, Layer

Slots = npt.NDArray[np.int32]

SAMPLE = 3_000  # distinct expert sets that the hot part of a run sees
CHUNKS, FINAL = 12, 3  # parts of a run, and those of them at its end that see all tokens
MOVES = 12  # proposals of a chunk in the first run, for each slot
RUNS, LONGER = 4, 8  # runs at most, unless rounds are asked for, and how much longer each is than the last
FITTING = 0.8  # of the time left, at most, goes to a run, by what the last one took
HASTE = 0.5  # of the time left, at most, goes to the chunks of a run that see a sample: moves are fewer where need be
HOT, COLD = 0.12, 2.4e-3  # temperatures: touched units, as a share of the tokens of a mean expert
CHOICE = 4  # moves drawn at a time, of which the best by pairs is tried
PENALTY, STEEPER, FLATTER = 1.0, 1.5, 1.2  # touched units for a token above a cap, and how that is adapted
STEEPEST, FLATTEST = 3.0, 0.3
HEADROOM = 0.01  # over the mean, at least, that a cap is taken to leave
LIGHT = 0.1  # quantile of the load of experts that are put beside a hot one
BIASED = 4  # chunks after which load is put right under `cover`
REPAIRS = 6  # chunks at the end, at most, that bring load below the cap
WITHIN = 0.999  # of the cap, which the search aims at


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
        Asked between chunks; a run counts from where it has seen all tokens.
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
    """What servers hold after one run; None where the clock ran out before all tokens were seen."""
    content = _shared(layer, start)
    level = layer.unit_slots.index(start.shape[1])
    loads, penalty, bias = _loads(layer), PENALTY, np.zeros(len(content))
    begun = time.monotonic()
    for chunk in range(CHUNKS + REPAIRS):
        if clock.expired:
            return content if chunk >= CHUNKS - FINAL else None
        if chunk == 1 and clock.rounds is None:  # else the same rounds are the same work
            takes = (CHUNKS - FINAL) * (time.monotonic() - begun)
            moves = max(layer.num_slots, int(min(moves, moves * HASTE * clock.remaining / takes)))
        seen = small if chunk < CHUNKS - FINAL else layer
        hot, cold = (HOT * (COLD / HOT) ** (min(x, CHUNKS) / CHUNKS) for x in (chunk, chunk + 1))
        draws = rng.random((moves, 2 + 2 * CHOICE))
        over, crowd, load = _anneal(layer, seen, content, loads, bias, penalty, (hot, cold), draws)
        last = chunk >= CHUNKS - 1
        if layer.rule == "cover" and (last or (seen is small and chunk >= BIASED)):
            true = seen.counts(_dealt(layer, content)).load[level][: len(content)]
            bias = (true - load) * (layer.load.sum() / seen.load.sum())
            over = float(np.maximum(true - layer.caps[level], 0.0).sum()) if last else over
        if last and over + crowd == 0:
            break
        penalty = min(penalty * STEEPER, STEEPEST) if over + crowd > 0 else max(penalty / FLATTER, FLATTEST)
    return content


def _shared(layer: Layer, start: Ints) -> Ints:
    """The start, and in empty slots copies of experts that are too hot for a GPU: no single move gains by these."""
    content = start.copy()
    number = np.bincount(content[content >= 0], minlength=layer.num_experts)
    beside = (layer.slots_per_rank - 1) * float(np.quantile(layer.load, LIGHT))
    limit = float(layer.caps[0]) - beside
    while (layer.load / number).max() > limit:
        expert = int((layer.load / number).argmax())
        load = np.where(content >= 0, (layer.load / number)[content], 0.0).sum(axis=1)
        full = (content >= 0).all(axis=1) | (content == expert).any(axis=1)
        if full.all():
            break
        unit = int(np.where(full, np.inf, load).argmin())
        content[unit, int((content[unit] < 0).argmax())] = expert
        number[expert] += 1
    return content


def _loads(layer: Layer) -> Floats:
    """Load of every expert, and under a cap that in parts of the trace, (num_experts, 1 + parts)."""
    parts = np.zeros((0, layer.num_experts)) if layer.max_load is None else part_loads(layer)
    return np.ascontiguousarray(np.vstack([layer.load, parts]).T)


def _price_of_unevenness(layer: Layer, units: int, parts: int) -> float:
    """Touched units for a squared token of the parts' loads.

    Unseen load varies by twice the variance of the mean of parts: once as they were fitted, once as they are scored.
    Its price rises with its deviation, up to that of a token above the cap where the deviation is as large as the
    headroom that the cap leaves.
    """
    if layer.max_load is None or parts < 2:
        return 0.0
    mean = float(layer.load.sum()) / units
    variance = 2.0 / (parts * (parts - 1))
    return 0.5 * PENALTY * variance / (max(HEADROOM, layer.max_load - 1.0) * mean)


def _anneal(
    layer: Layer,
    seen: Layer,
    content: Ints,
    loads: Floats,
    bias: Floats,
    penalty: float,
    heat: tuple[float, float],
    draws: Floats,
) -> tuple[float, float, Floats]:
    """One chunk of a run, on the tokens of `seen`: load above the caps of units and GPUs that is left, that of units.

    `bias` is added to the load of units; `heat` are temperatures, in tokens of a mean expert.
    """
    from placer.search.copies import RULES, anneal_copies

    seen_load, width = float(seen.load.sum()), content.shape[1]
    share = seen_load / float(layer.load.sum())
    _, over, crowd, load = anneal_copies(
        RULES["nearest" if layer.rule == "table" else layer.rule],
        content,
        *seen.distinct,
        *seen.uses,
        layer.pairs[: layer.num_experts, : layer.num_experts].astype(np.float64),
        loads * share,
        bias * share,
        WITHIN * float(layer.caps[layer.unit_slots.index(width)]) * share,
        width // layer.slots_per_rank,
        WITHIN * float(layer.caps[0]) * share,
        penalty,
        _price_of_unevenness(layer, len(content), loads.shape[1] - 1) / share,
        heat[0] * seen_load / layer.num_experts,
        heat[1] * seen_load / layer.num_experts,
        draws,
    )
    return float(over), float(crowd), load


def _dealt(layer: Layer, content: Ints) -> Slots:
    """Slots from what units hold, the experts of each dealt to its GPUs in turn."""
    ranks = content.shape[1] // layer.slots_per_rank
    last = layer.num_experts
    ordered = np.sort(np.where(content < 0, last, content), axis=1)
    dealt = ordered.reshape(len(content), layer.slots_per_rank, ranks).transpose(0, 2, 1)
    flat = dealt.ravel()
    return np.where(flat == last, -1, flat).astype(np.int32)


def _on_gpus(layer: Layer, small: Layer, content: Ints, rng: np.random.Generator) -> Slots:
    """Slots from what servers hold: each server's experts on its GPUs."""
    if content.shape[1] == layer.slots_per_rank:
        return _dealt(layer, content)
    return on_gpus(layer, small, content, rng)
