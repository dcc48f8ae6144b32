"""Copies: experts on several servers, so that fewer tokens leave theirs and no unit is overloaded.

Idea: what servers hold is annealed as a whole: swaps of two experts, and other experts in slots that are empty or
hold a copy. The cost is exact for the dispatch rule, touched servers other than the home's, plus penalties: for load
above the caps, and for the variance of load on unseen tokens, estimated from parts of the trace: of servers, because
experts that are used together are hot together, and of single experts, because copies divide it. Copies share load
evenly in the search, or under ``cover`` as its kernel counts them, put right from chunk to chunk by what the rule
really does. No move takes an expert where the layer's rules do not let it stand. Each server's experts are then
arranged on its GPUs (`placer.gpus`). Runs get longer from one to the next, and each starts hot.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.gpus import lightened, on_gpus, part_loads
from placer.layer import Floats, Ints, Layer
from placer.rules import Rules
from placer.tables import judged

Slots = npt.NDArray[np.int32]
Score = tuple[float, float, float]  # see `Layer.judge`

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
TOGETHER, ALONE = (
    0.25,
    5.0,
)  # prices of variance: see below; chosen on quarters of traces, scored on other quarters
BOLDER = (
    0.125  # of these prices are left after a run that found nothing cheaper than a placement without copies
)
HEADROOM = 0.01  # over the mean, at least, that a cap is taken to leave
LIGHT = 0.1  # quantile of the load of experts that are put beside a hot one
BIASED = 4  # chunks after which load is put right under `cover`
REPAIRS = 6  # chunks at the end, at most, that bring load below the cap
WITHIN = 0.999  # of the cap, which the search aims at


def suits(layer: Layer) -> bool:
    """Whether there are slots to spare, tokens to see, and few enough servers for the compiled search.

    Under the rule ``table`` all tokens of one server take the same copy, so one server has no use for others. What
    copies do to activations is not defined.
    """
    from placer.search.dispatch import RULES, UNITS

    units = layer.num_slots // _width(layer)
    rules = {*RULES, "table"} if layer.num_ranks > layer.server_ranks else {*RULES}
    useful = layer.num_slots > layer.num_experts and layer.topk is not None and bool(layer.load.any())
    return useful and layer.activations is None and layer.rule in rules and 1 < units <= UNITS


def finds(
    layer: Layer, slots: Slots, least: Score, *, rng: np.random.Generator, clock: Clock
) -> Iterator[tuple[Slots, tuple[Score, Slots | None]]]:
    """Slots with copies in the spare ones, as `judged`, those of every run; they may break rules about GPUs.

    Parameters
    ----------
    layer : Layer
        One that `suits`, its caps those that copies can meet.
    slots : (num_slots,) int32
        Where runs begin: every expert once, and the rules kept.
    least : tuple of float
        What these are `judged`; runs that only even out load and find nothing better care less for it from then on.
    rng : numpy.random.Generator
    clock : Clock
        Asked between chunks; a run counts from where it has seen all tokens.
    """
    small = layer.sample(SAMPLE)
    machine = _Machine.of(layer)
    runs, moves, risk, better = 0, MOVES * layer.num_slots, 1.0, False
    while clock.allows(runs) and (clock.rounds is not None or runs < RUNS) and moves > MOVES:
        begun = time.monotonic()
        content = _annealed(layer, small, machine, machine.content(slots), risk, moves, rng, clock)
        if content is None:
            return
        runs += 1
        found = _on_gpus(layer, small, content, rng)
        judgement = judged(layer, found)
        if judgement[0][0] > 0:
            lighter = lightened(layer, found)
            if (other := judged(layer, lighter))[0] < judgement[0]:
                found, judgement = lighter, other
        yield found, judgement
        better |= judgement[0] < least
        risk *= 1.0 if better else BOLDER
        longer = float(LONGER)
        if clock.rounds is None:  # else the same rounds are the same work
            longer = min(longer, FITTING * clock.remaining / max(1e-3, time.monotonic() - begun))
        moves = min(int(moves * longer), MOVES * layer.num_slots * LONGER ** (RUNS - 1))


def _width(layer: Layer) -> int:
    """Slots of a unit that holds an expert once: a server, or a GPU where there is one server."""
    server = layer.server_ranks * layer.slots_per_rank
    return server if server < layer.num_slots else layer.slots_per_rank


@dataclass(frozen=True, kw_only=True, eq=False)
class _Machine:
    """Units and GPUs as the kernel sees them.

    Parameters
    ----------
    width : int
        Slots of a unit.
    level : int
        That of units.
    idle : (units,) float64
        How far below the level's cap that of each unit is.
    gpu_idle, room : (units, GPUs of a unit) float64 and int64
        The same for GPUs, and the slots of GPUs that are not shut.
    seat : (num_experts,) int64
        GPU of its unit on which an expert has to stand, or -1.
    shut : (units, width) bool
    limits : tuple or None
        See `placer.search.copies.may_take`.
    """

    width: int
    level: int
    idle: Floats
    gpu_idle: Floats
    room: Ints
    seat: Ints
    shut: npt.NDArray[np.bool_]
    limits: tuple[Any, ...] | None

    @classmethod
    def of(cls, layer: Layer) -> _Machine:
        """The machine of a layer, its units those that hold an expert once."""
        width, each = _width(layer), layer.slots_per_rank
        shut = np.zeros(layer.num_slots, bool) if layer.rules is None else layer.rules.shut
        level, ranks = layer.unit_slots.index(width), width // each
        room = (~shut).reshape(-1, each).sum(axis=1).reshape(-1, ranks)
        gpus = np.count_nonzero(room, axis=1)
        return cls(
            width=width,
            level=level,
            idle=layer.idle(level),
            gpu_idle=layer.idle(0).reshape(-1, ranks),
            room=room,
            seat=_seats(layer, ranks),
            shut=shut.reshape(-1, width),
            limits=None if layer.rules is None else (*_limits(layer.rules, width), gpus),
        )

    def content(self, slots: Slots) -> Ints:
        """What units hold: -1 for an empty slot, or `CLOSED`."""
        from placer.search.copies import CLOSED

        rows = slots.reshape(-1, self.width).astype(np.int64)
        return np.where(self.shut, CLOSED, rows)

    def free(self, content: Ints, expert: int) -> npt.NDArray[np.bool_]:
        """Units that have an empty slot for another copy of an expert, (units,)."""
        from placer.search.copies import hold, may_take

        free = (content == -1).any(axis=1) & ~(content == expert).any(axis=1)
        if self.limits is None:
            return np.asarray(free, bool)
        where, number = (np.zeros(len(self.limits[0]), kind) for kind in (np.uint64, np.int64))
        hold(content, where, number)
        taken = [may_take(expert, unit, -1, -1, where, self.limits) for unit in range(len(content))]
        return np.asarray(free & np.array(taken), bool)


def _seats(layer: Layer, ranks: int) -> Ints:
    """GPU of its unit, of so many `ranks`, on which each expert has to stand, or -1."""
    seats = np.full(layer.num_experts, -1)
    if layer.rules is not None:
        low, high = (ends[: layer.num_experts] for ends in (layer.rules.low, layer.rules.high))
        pinned = high - low <= layer.slots_per_rank
        seats[pinned] = low[pinned] // layer.slots_per_rank % ranks
    return seats


def _limits(rules: Rules, width: int) -> tuple[Any, ...]:
    """Units that may hold each expert, as masks, and its partners with the units that they may not share, as CSR."""
    units = np.arange(len(rules.low) // width)
    low, high = rules.low[: rules.num_experts, None], rules.high[: rules.num_experts, None]
    inside = (low < (units + 1) * width) & (high > units * width)
    allowed = (inside.astype(np.uint64) << units.astype(np.uint64)).sum(axis=1, dtype=np.uint64)
    _, _, _, _, first, partner, span = rules.compiled
    return allowed, first, partner.astype(np.int64), span.astype(np.int64) // width


def _annealed(
    layer: Layer,
    small: Layer,
    machine: _Machine,
    start: Ints,
    risk: float,
    moves: int,
    rng: np.random.Generator,
    clock: Clock,
) -> Ints | None:
    """What servers hold after one run; None where the clock ran out before all tokens were seen.

    `risk` times the prices of variance are taken.
    """
    content = _shared(layer, machine, start)
    loads, penalty, bias = _loads(layer), PENALTY, np.zeros(len(content))
    uneven, alone = _prices_of_variance(layer, loads, len(content))
    prices = risk * uneven, risk * alone
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
        over, crowd, load = _anneal(
            layer, seen, machine, content, loads, bias, (penalty, *prices), (hot, cold), draws
        )
        last = chunk >= CHUNKS - 1
        if layer.rule == "cover" and (last or (seen is small and chunk >= BIASED)):
            true = seen.counts(_dealt(layer, content)).load[machine.level][: len(content)]
            bias = (true - load) * (layer.load.sum() / seen.load.sum())
            limit = layer.caps[machine.level] - machine.idle
            over = float(np.maximum(true - limit, 0.0).sum()) if last else over
        if last and over + crowd == 0:
            break
        penalty = min(penalty * STEEPER, STEEPEST) if over + crowd > 0 else max(penalty / FLATTER, FLATTEST)
    return content


def _shared(layer: Layer, machine: _Machine, start: Ints) -> Ints:
    """The start, and in empty slots copies of experts that are too hot for a GPU: no single move gains by these."""
    content = start.copy()
    number = np.bincount(content[content >= 0], minlength=layer.num_experts)
    beside = (layer.slots_per_rank - 1) * float(np.quantile(layer.load, LIGHT))
    limit = float(layer.caps[0]) - beside
    movable = np.ones(layer.num_experts, bool)
    while (share := np.where(movable, layer.load / number, 0.0)).max() > max(0.0, limit):
        expert = int(share.argmax())
        free = machine.free(content, expert)
        if not free.any():
            movable[expert] = False
            continue
        load = np.where(content >= 0, (layer.load / number)[content], 0.0).sum(axis=1)
        unit = int(np.where(free, load, np.inf).argmin())
        content[unit, int((content[unit] == -1).argmax())] = expert
        number[expert] += 1
    return content


def _loads(layer: Layer) -> Floats:
    """Load of every expert, and under a cap that in parts of the trace, (num_experts, 1 + parts)."""
    parts = np.zeros((0, layer.num_experts)) if layer.max_load is None else part_loads(layer)
    return np.ascontiguousarray(np.vstack([layer.load, parts]).T)


def _prices_of_variance(layer: Layer, loads: Floats, units: int) -> tuple[float, Floats]:
    """Touched units for a squared token of the parts' loads of units, and for each expert while it stands alone.

    Unseen load varies by twice the variance of the mean of parts: once as they were fitted, once as they are scored.
    The price of that of a unit rises with its deviation, up to `TOGETHER` times that of a token above the cap where
    the deviation is as large as the headroom that the cap leaves; and `ALONE` times for the part of a GPU's variance
    that copies divide, that of its single experts.
    """
    parts = loads[:, 1:]
    number = parts.shape[1]
    if layer.max_load is None or number < 2:
        return 0.0, np.zeros(len(loads))
    headroom, total = max(HEADROOM, layer.max_load - 1.0), float(layer.load.sum())
    squared = 0.5 * PENALTY * 2.0 / (number * (number - 1))  # for the sum over parts
    deviations = ((parts - parts.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    alone: Floats = ALONE * squared * deviations / (headroom * total / layer.num_ranks)
    return TOGETHER * squared / (headroom * total / units), alone


def _anneal(
    layer: Layer,
    seen: Layer,
    machine: _Machine,
    content: Ints,
    loads: Floats,
    bias: Floats,
    prices: tuple[float, float, Floats],
    heat: tuple[float, float],
    draws: Floats,
) -> tuple[float, float, Floats]:
    """One chunk of a run, on the tokens of `seen`: load above the caps of units and GPUs that is left, that of units.

    `bias` is added to the load of units; `prices` are that of a token above a cap and those of variance; `heat` are
    temperatures, in tokens of a mean expert.
    """
    from placer.search.copies import anneal_copies
    from placer.search.dispatch import RULES

    seen_load = float(seen.load.sum())
    share = seen_load / float(layer.load.sum())
    penalty, uneven, alone = prices
    _, over, crowd, load = anneal_copies(
        RULES["nearest" if layer.rule == "table" else layer.rule],
        content,
        *seen.distinct,
        *seen.uses,
        layer.pairs[: layer.num_experts, : layer.num_experts].astype(np.float64),
        loads * share,
        (bias + machine.idle) * share,
        WITHIN * float(layer.caps[machine.level]) * share,
        machine.gpu_idle * share,
        machine.room,
        machine.seat,
        WITHIN * float(layer.caps[0]) * share,
        penalty,
        uneven / share,
        alone * share,
        heat[0] * seen_load / layer.num_experts,
        heat[1] * seen_load / layer.num_experts,
        draws,
        machine.limits,
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
