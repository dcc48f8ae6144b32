"""GPUs: where in its server an expert stands, once it is settled what each server holds.

Idea: links inside a server are fast, so balance decides wherever load is capped: experts that are hot together are
kept apart, although they attract each other at the level of servers. Minimised is the expected square of a GPU's unseen
load: that of its mean, plus twice the variance of the mean, as estimated from parts of the trace (once for the error of
fitting, once for that of scoring). It is a sum over pairs of experts on one GPU, so tabu search on pairs does it.
Without a cap, each server's experts are arranged for few touched GPUs instead.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.errors import NoPlacement
from placer.layer import Floats, Ints, Layer
from placer.rules import Rules, feasible
from placer.search import descend
from placer.tables import fitted_table

Slots = npt.NDArray[np.int32]

EVEN = ("nearest", "spread")  # dispatch rules under which copies share load evenly
SEEN = 25_000  # distinct expert sets that say what falls to each server, where that is not an even share
TRIALS = 32  # that are judged for one step, when a GPU has to be relieved
PARTS = 64  # of the trace, by sequence, at most
FEW = 8  # sequences that say less about the variance of load than `PARTS` stretches of tokens
LARGEST = 2.0**40  # of the integers that stand for products of loads


def on_gpus(layer: Layer, small: Layer, content: Ints, rng: np.random.Generator) -> Slots:
    """Slots for what servers hold, within the GPU cap where that is possible.

    Parameters
    ----------
    layer : Layer
    small : Layer
        A sample of its tokens, for what GPUs they touch.
    content : (num_servers, slots of a server) int64
        Expert of each slot, negative = empty; in no server an expert twice.
    rng : numpy.random.Generator

    Returns
    -------
    (num_slots,) int32
        Experts ascend within a GPU, -1 last. Rules are kept where an arrangement that keeps them is found.
    """
    parts, shares = part_loads(layer), _shares(layer, content)
    return np.concatenate(
        [_arranged(layer, small, unit, row, parts, shares[unit], rng) for unit, row in enumerate(content)]
    )


def _shares(layer: Layer, content: Ints) -> Floats:
    """How much of each expert's load falls to each server, (num_servers, num_experts), by the dispatch rule."""
    servers, width = content.shape
    shares = np.zeros((servers, layer.num_experts))
    at = np.nonzero(content >= 0)
    expert = content[at]
    if layer.rule in EVEN:
        shares[at[0], expert] = 1.0 / np.bincount(expert)[expert]
        return shares
    seen = layer.sample(SEEN)
    single = replace(
        seen,
        num_ranks=content.size,
        slots_per_rank=1,
        unit_ranks=(1, width),
        server_ranks=width,
        seconds=(0.0, 0.0),
    )
    slots = np.where(content < 0, -1, content).ravel().astype(np.int32)
    table = fitted_table(layer, slots) if layer.rule == "table" else None
    load = single.counts(slots, table).load[0].reshape(servers, width)
    shares[at[0], expert] = load[at] / np.maximum(seen.load, 1)[expert]
    return shares


def lightened(layer: Layer, slots: Slots) -> Slots:
    """Slots with less load above the caps, or as they are: experts leave GPUs above theirs, and copies make way.

    An expert goes to a slot of its server that is empty or holds a copy, or a copy goes altogether. Of the `TRIALS`
    that seem best, where copies share load evenly, it is what leaves the least load above the caps, by
    `Layer.expected_load`; what the dispatch rule really adds to that is taken not to change.
    """
    added = _unevenly_shared(layer, slots)
    over = layer.above_caps(layer.expected_load(slots) + added)
    while over > 0:
        trials = list(itertools.islice(_relieved(layer, slots, added[0]), TRIALS))
        values = [layer.above_caps(layer.expected_load(trial) + added) for trial in trials]
        if min(values, default=over) >= over:
            break
        slots, over = trials[int(np.argmin(values))], min(values)
    return slots


def _unevenly_shared(layer: Layer, slots: Slots) -> Floats:
    """What the load of units, (num_levels, num_ranks), is beyond `Layer.expected_load`, tables fitted to the slots."""
    expected = layer.expected_load(slots)
    if layer.rule in EVEN:
        return np.zeros_like(expected)
    table = fitted_table(layer, slots) if layer.rule == "table" else None
    return layer.counts(slots, table).load - expected


def _relieved(layer: Layer, slots: Slots, added: Floats) -> Iterator[Slots]:
    """The ways to take one expert from a GPU above its cap, those first that leave the least above caps there.

    `added` (num_ranks,) is load beyond the expected one.
    """
    each, width = layer.slots_per_rank, layer.server_ranks * layer.slots_per_rank
    number = np.bincount(slots[slots >= 0], minlength=layer.num_experts)
    spare = np.where(slots < 0, True, number[slots] > 1)
    share = np.where(slots < 0, 0.0, (layer.load / np.maximum(number, 1))[slots])
    heat = layer.expected_load(slots)[0] + added - (layer.caps[0] - layer.idle(0))  # above the cap
    ways = []
    for at in np.flatnonzero((slots >= 0) & np.repeat(heat > 0, each)).tolist():
        left = max(0.0, float(heat[at // each] - share[at]))
        if spare[at]:
            ways.append((left, at, -1))
        server = at // width * width
        for to in (server + np.flatnonzero(spare[server : server + width])).tolist():
            gpu = to // each
            if slots[at] not in slots[gpu * each : (gpu + 1) * each]:
                more = max(0.0, float(heat[gpu] + share[at] - share[to])) - max(0.0, float(heat[gpu]))
                ways.append((left + more, at, to))
    for _, at, to in sorted(ways):
        trial = slots.copy()
        trial[at] = -1
        if to >= 0:
            trial[to] = slots[at]
        if layer.rules is None or layer.rules.keeps(trial):
            yield layer.in_order(trial)


def part_loads(layer: Layer) -> Floats:
    """Load of every expert in parts of the trace, (parts, num_experts), each scaled to the size of the whole.

    Parts are equal numbers of sequences, or of tokens where there are few sequences; those without load are left out.
    """
    tokens = layer.tokens
    keys = np.zeros(0) if layer.key is None else np.unique(layer.key)
    if layer.key is None or len(keys) < FEW:
        part = np.arange(len(tokens)) * PARTS // max(1, len(tokens))
    else:
        part = np.searchsorted(keys, layer.key) * min(PARTS, len(keys)) // len(keys)
    row, at = np.nonzero(tokens >= 0)
    flat = part[row] * layer.num_experts + tokens[row, at]
    loads = np.bincount(flat, minlength=PARTS * layer.num_experts).reshape(PARTS, -1).astype(np.float64)
    loads = loads[loads.any(axis=1)]
    whole: Floats = loads * (layer.load.sum() / loads.sum(axis=1, keepdims=True))
    return whole


def together(mean: Floats, parts: Floats) -> Floats:
    """Expected product of the unseen loads of every two experts, from their mean (n,) and those of parts (parts, n).

    Examples
    --------
    Experts 0 and 1 are hot together, 1 and 2 take turns:

    >>> together(np.array([2.0, 2.0, 2.0]), np.array([[3.0, 3.0, 1.0], [1.0, 1.0, 3.0]])).tolist()
    [[6.0, 6.0, 2.0], [6.0, 6.0, 2.0], [2.0, 2.0, 6.0]]
    """
    product: Floats = np.outer(mean, mean)
    if len(parts) > 1:
        centred = parts - parts.mean(axis=0)
        product += 2.0 / len(parts) * (centred.T @ centred) / (len(parts) - 1)
    return product


def _arranged(
    layer: Layer,
    small: Layer,
    server: int,
    row: Ints,
    parts: Floats,
    share: Floats,
    rng: np.random.Generator,
) -> Slots:
    """The experts of one server, to which falls such a share of the load of each, on its GPUs."""
    ranks = len(row) // layer.slots_per_rank
    members = np.sort(row[row >= 0])
    if len(members) == 0:
        return np.full(len(row), -1, np.int32)
    heat = (layer.load * share)[members]
    rules = None if layer.rules is None else _rules_within(layer.rules, layer, server, members)
    mine = slice(server * ranks, (server + 1) * ranks)
    used = np.ones(ranks, bool) if rules is None else ~rules.shut.reshape(ranks, -1).all(axis=1)
    speed = layer.unit_speeds(0)
    mean = heat.sum() / np.count_nonzero(used)
    limit = float(layer.caps[0] * speed[mine][used].mean() / speed.max())  # of a GPU as fast as their mean
    capped = bool(mean) and math.isfinite(limit)
    place = np.full(layer.num_experts + 1, -1, np.int32)  # the last one is for -1
    place[members] = np.arange(len(members))
    topk = place[small.tokens]
    product = together(heat, (parts * share)[:, members])
    np.fill_diagonal(product, 0.0)
    part = Layer(
        index=layer.index,
        num_experts=len(members),
        num_ranks=ranks,
        slots_per_rank=layer.slots_per_rank,
        unit_ranks=(1,),
        seconds=layer.seconds[:1],
        server_ranks=1,
        rule="nearest",
        max_load=max(1.0, limit / mean) if capped else None,
        margin=0.0,
        load=heat.round().astype(np.int64),
        pair_counts=-(product * (LARGEST / max(1.0, product.max()))).astype(np.int64) if capped else None,
        topk=topk[(topk >= 0).sum(axis=1) > 1],
        speeds=layer.speeds[mine],
        rules=rules,
    )
    arranged, _ = descend(part, part.reference, exact=not capped, steps=200, patience=50, rng=rng)
    local = part.slots(arranged)
    return np.where(local >= 0, members[np.maximum(local, 0)], -1).astype(np.int32)


def _rules_within(rules: Rules, layer: Layer, server: int, members: npt.NDArray[Any]) -> Rules | None:
    """The rules for the positions of one server and the experts that it holds; None where no arrangement keeps them."""
    width = layer.server_ranks * layer.slots_per_rank
    begin, spare = server * width, width - len(members)
    low, high = (np.clip(ends[members] - begin, 0, width) for ends in (rules.low, rules.high))
    place = {expert: number for number, expert in enumerate(members.tolist())}
    kept = (([place[e] for e in experts if e in place], slots) for experts, slots in rules.apart)
    limits: dict[str, Any] = {
        "num_experts": len(members),
        "low": np.pad(low, (0, spare)).astype(np.int32),
        "high": np.pad(high, (0, spare), constant_values=width).astype(np.int32),
        "shut": rules.shut[begin : begin + width],
        "apart": [(tuple(experts), slots) for experts, slots in kept if len(experts) > 1],
    }
    with contextlib.suppress(NoPlacement):
        start = feasible(**limits, slots_per_rank=layer.slots_per_rank)
        return None if start is None else Rules(**limits, start=start)
    return None
