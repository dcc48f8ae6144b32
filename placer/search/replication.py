"""Compiled replication and packing by load alone: copies by need, LPT, then the hottest GPU made lighter.

A layer is a map `slots` (R,): the experts on GPUs of equal size, in nodes of equal size. Copies of an expert stand in
one node, on different GPUs, and share its load evenly.

References: Graham, "Bounds on Multiprocessing Timing Anomalies", 1969, doi:10.1137/0117039 (LPT); Lourenço, Martin,
Stützle, "Iterated Local Search", 2003, doi:10.1007/0-306-48056-5_11.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from placer.search.compiling import kernel
from placer.search.eplb import members, published

CLOSE = 1e-4  # relative distance from a lower bound that is not worth more work
UNEVEN = (
    1.01  # hottest GPU over mean of the hottest node, above which other groups on that node may be better
)
CHAIN = 4  # kicks in a row, before a search that found nothing better returns to the best map
REGROUPINGS = 40  # tried at most in a layer


class State(NamedTuple):
    """What follows from a map, kept beside it."""

    count: Any  # (E,) copies of an expert
    share: Any  # (E,) load of one of them
    thin: Any  # (E,) the same, if there were another copy
    home: Any  # (E, GPUs of a node) GPUs that hold the expert
    heat: Any  # (GPUs,) load
    roster: Any  # (nodes, E / nodes) experts of a node


@kernel
def rebalanced(load, group_load, single, single_group_load, num_slots, num_nodes, num_gpus, effort, draws):
    """Maps of all layers, (L, R) int64, whose hottest GPU is as light as `effort` can make it.

    A map is no worse than EPLB's published one, from which it starts again where that is better, unless that one
    holds an expert twice on a GPU. Then it may be worse, after much more effort, also with that one's groups on the
    nodes.

    Parameters: load (L, E) float64; group_load (L, groups) float64, its sums; single and single_group_load, the same
    in float32, which the published map depends on; effort, slots to look at in each layer; draws (n,) float64 in
    [0, 1).
    """
    maps = np.empty((load.shape[0], num_slots), np.int64)
    for layer in range(load.shape[0]):
        weight = load[layer]
        groups, heat = _grouped(group_load[layer], num_nodes, effort // 10, draws)
        slots, peak = _searched(groups, weight, num_slots, num_nodes, num_gpus, effort, draws)
        if num_nodes < groups.shape[0] and peak > UNEVEN * heat * num_nodes / num_gpus:
            slots, peak = _regrouped(
                slots, peak, groups, group_load[layer], weight, num_nodes, num_gpus, effort, draws
            )
        known = published(single[layer], single_group_load[layer], num_slots, num_nodes, num_gpus)
        limit, meet = _peak(known, weight, num_gpus)
        if limit < peak * (1 - 1e-12):
            if meet:
                groups = _groups_of(known, groups.shape[0], weight.shape[0], num_nodes)
                known, _ = _filled(groups, weight, num_slots, num_nodes, num_gpus)
            for start in (slots, known):
                reached = _improved(start, weight, num_nodes, num_gpus, limit, 4 * effort, draws)
                if reached < peak:
                    slots, peak = start, reached
        maps[layer] = slots
    return maps


@kernel
def _grouped(whole, num_nodes, effort, draws):
    """Groups in the order of their nodes, by load, and the load of the hottest node; `whole` (groups,) is theirs."""
    groups = _packed(whole, np.ones(whole.shape[0], np.int64), num_nodes)
    bound = max(whole.max(), whole.sum() / num_nodes)
    return groups, _improved(groups, whole, 1, num_nodes, bound, effort, draws)


@kernel
def _searched(groups, weight, num_slots, num_nodes, num_gpus, effort, draws):
    """A map with these groups on the nodes, and the heat of its hottest GPU."""
    slots, bound = _filled(groups, weight, num_slots, num_nodes, num_gpus)
    return slots, _improved(slots, weight, num_nodes, num_gpus, bound * (1 + CLOSE), effort, draws)


@kernel
def _regrouped(slots, peak, groups, whole, weight, num_nodes, num_gpus, effort, draws):
    """Swap groups of the hottest node with others, where that makes the hottest GPU lighter; a map and its peak.

    Worth a try where a node is hotter than its load says: by one hot expert, or too few experts.
    """
    num_slots, width, gpus = slots.shape[0], groups.shape[0] // num_nodes, num_gpus // num_nodes
    tries, again, best = REGROUPINGS, True, groups
    while again:
        again = False
        hot = _hottest_slot(slots, weight, num_gpus) // (num_slots // num_nodes)
        heat = np.zeros(num_nodes)
        for k in range(groups.shape[0]):
            heat[k // width] += whole[groups[k]]
        for k in range(groups.shape[0] * width):
            x, y = hot * width + k % width, k // width
            d = whole[groups[x]] - whole[groups[y]]
            hotter = max(heat[hot] - d, heat[y // width] + d)
            if y // width == hot or hotter >= peak * gpus or tries == 0:
                continue
            tries -= 1
            other = groups.copy()
            other[x], other[y] = groups[y], groups[x]
            found, reached = _searched(other, weight, num_slots, num_nodes, num_gpus, effort // 4, draws)
            if reached < peak * (1 - 1e-12):
                slots, peak, best, again = found, reached, other, True
        groups = best
    return slots, peak


@kernel
def _filled(groups, weight, num_slots, num_nodes, num_gpus):
    """A first map with these groups on the nodes, and a heat that no such map can be below."""
    slots = np.empty(num_slots, np.int64)
    width, room, gpus = groups.shape[0] // num_nodes, num_slots // num_nodes, num_gpus // num_nodes
    bound = 0.0
    for node in range(num_nodes):
        experts = members(groups[node * width : (node + 1) * width], weight.shape[0] // groups.shape[0])
        load = weight[experts]
        count = _watered(load, room, gpus)
        slots[node * room : (node + 1) * room] = experts[_packed(load, count, gpus)]
        bound = max(bound, load.sum() / gpus, (load / count).max())
    return slots, bound


@kernel
def _watered(weight, num_slots, most):
    """Copies of each expert, at most `most`: every expert once, then another of the heaviest copy."""
    count = np.ones(weight.shape[0], np.int64)
    share = weight.copy()
    for _ in range(num_slots - weight.shape[0]):
        e = np.argmax(share)
        while count[e] == most:
            share[e] = -1.0
            e = np.argmax(share)
        count[e] += 1
        share[e] = weight[e] / count[e]
    return count


@kernel
def _packed(weight, count, num_gpus):
    """A map (sum of counts,) by longest processing time: the next heaviest copy to the lightest GPU that may hold it.

    Where all GPUs with room hold the expert, one that lacks it gives up another expert to one of them.
    """
    room = count.sum() // num_gpus
    slots = np.full((num_gpus, room), -1, np.int64)
    used = np.zeros(num_gpus, np.int64)
    heat = np.zeros(num_gpus)
    holds = np.zeros(num_gpus, np.bool_)
    share = weight / count
    for e in np.argsort(-share, kind="mergesort"):
        holds[:] = False
        for _ in range(count[e]):
            to = -1
            for g in range(num_gpus):
                if used[g] < room and not holds[g] and (to < 0 or heat[g] < heat[to]):
                    to = g
            if to >= 0:
                slots[to, used[to]] = e
                used[to] += 1
            else:
                to = _made_room(slots, used, heat, holds, share, e)
            heat[to] += share[e]
            holds[to] = True
    return slots.ravel()


@kernel
def _made_room(slots, used, heat, holds, share, e):
    """Put e on a full GPU without it, whose lightest fitting expert moves to a GPU with room: which always exists."""
    num_gpus, room = slots.shape
    to, place, other = -1, -1, -1
    for g in range(num_gpus):
        if holds[g]:
            continue
        for p in range(room):
            for h in range(num_gpus):
                if used[h] == room or (to >= 0 and share[slots[g, p]] >= share[slots[to, place]]):
                    continue
                free = True
                for q in range(used[h]):
                    free &= slots[h, q] != slots[g, p]
                if free:
                    to, place, other = g, p, h
    moved = slots[to, place]
    slots[other, used[other]] = moved
    used[other] += 1
    heat[other] += share[moved]
    heat[to] -= share[moved]
    slots[to, place] = e
    return to


@kernel
def _new_state(num_experts, num_nodes, num_gpus):
    return State(
        np.empty(num_experts, np.int64),
        np.empty(num_experts, np.float64),
        np.empty(num_experts, np.float64),
        np.empty((num_experts, num_gpus // num_nodes), np.int64),
        np.empty(num_gpus, np.float64),
        np.empty((num_nodes, num_experts // num_nodes), np.int64),
    )


@kernel
def _survey(slots, weight, state):
    """Set the state to what follows from the map."""
    count, share, thin, home, heat = state.count, state.share, state.thin, state.home, state.heat
    room = slots.shape[0] // heat.shape[0]
    count[:] = 0
    for p in range(slots.shape[0]):
        e = slots[p]
        home[e, count[e]] = p // room
        count[e] += 1
    for e in range(weight.shape[0]):
        share[e] = weight[e] / count[e]
        thin[e] = weight[e] / (count[e] + 1)
    for g in range(heat.shape[0]):
        heat[g] = 0.0
        for p in range(g * room, (g + 1) * room):
            heat[g] += share[slots[p]]


@kernel
def _enrol(state):
    """Set the roster of a surveyed state."""
    count, home, heat, roster = state.count, state.home, state.heat, state.roster
    width = heat.shape[0] // roster.shape[0]
    used = np.zeros(roster.shape[0], np.int64)
    for e in range(count.shape[0]):
        node = home[e, 0] // width
        roster[node, used[node]] = e
        used[node] += 1


@kernel
def _on(e, g, count, home):
    k = 0
    while k < count[e] and home[e, k] != g:
        k += 1
    return k < count[e]


@kernel
def _improved(slots, weight, num_nodes, num_gpus, target, effort, draws):
    """Make the hottest GPU of a map lighter, in place, by descent, kicks and more descent; return its heat."""
    state = _new_state(weight.shape[0], num_nodes, num_gpus)
    _survey(slots, weight, state)
    _enrol(state)
    heat = state.heat
    kept, best, at, kicks = slots.copy(), heat.max(), 0, 0
    cost = 10 + slots.shape[0] // 3  # of a kick, and of going back, in looks
    looks = _descend(slots, weight, state, target, effort, False)
    while True:
        if heat.max() <= best:
            best = heat.max()
            kept[:] = slots
        elif kicks % CHAIN == 0:
            slots[:] = kept
            _survey(slots, weight, state)
        if looks >= effort or best <= target:
            break
        at = _kick(slots, weight, state, draws, at)
        kicks += 1
        looks += cost + _descend(slots, weight, state, target, effort - looks, kicks // CHAIN % 4 == 1)
    slots[:] = kept
    _survey(slots, weight, state)
    return heat.max()


@kernel
def _descend(slots, weight, state, target, effort, swaps_first):
    """Best exchanges of copies that make the hottest GPU lighter, else best swaps (or the reverse), while there are.

    Return the slots looked at. Every step leaves fewer GPUs at the highest heat, or lowers it.
    """
    heat = state.heat
    looks, failed = 0, 0
    swaps = swaps_first
    while looks < effort and failed < 2:
        hot = np.argmax(heat)
        limit = heat[hot] * (1 - 1e-12)
        if heat[hot] <= target:
            break
        if swaps:
            p, q, seen = _best_swap(hot, limit, slots, state)
            if p >= 0:
                _swap(p, q, slots, state)
        else:
            p, f, seen = _best_exchange(hot, limit, slots, weight, state)
            if p >= 0:
                _exchange(p, f, slots, weight, state)
        looks += seen
        failed = 0 if p >= 0 else failed + 1
        swaps = swaps_first if p >= 0 else not swaps
    return looks


@kernel
def _best_swap(hot, best, slots, state):
    """The swap of a slot of the hottest GPU with one of its node that leaves the lighter pair, below `best`."""
    count, share, home, heat, roster = state.count, state.share, state.home, state.heat, state.roster
    room = slots.shape[0] // heat.shape[0]
    width = heat.shape[0] // roster.shape[0]
    first = hot // width * width
    x, y, seen = -1, -1, 0
    coolest = first + np.argmin(heat[first : first + width])
    for step in range(width):
        g = first + (coolest - first + step) % width  # once it is done, few others are worth a look
        if g == hot or (heat[hot] + heat[g]) / 2 >= best:
            continue
        seen += room * room
        for p in range(hot * room, (hot + 1) * room):
            e = slots[p]
            low, high = share[e] - (best - heat[g]), share[e] - (heat[hot] - best)
            for q in range(g * room, (g + 1) * room):
                f = slots[q]
                if share[f] <= low or share[f] >= high:
                    continue
                d = share[e] - share[f]
                peak = max(heat[hot] - d, heat[g] + d)
                if peak < best and not _on(e, g, count, home) and not _on(f, hot, count, home):
                    best, x, y = peak, p, q
                    low, high = share[e] - (best - heat[g]), share[e] - (heat[hot] - best)
    return x, y, seen


@kernel
def _best_exchange(hot, best, slots, weight, state):
    """The slot that goes from an expert with copies to another expert, and leaves the lightest GPUs, below `best`.

    Either the slot is of the hottest GPU, or its new expert is on the hottest GPU. What a GPU with both experts gains
    by the new copy is not counted.
    """
    count, share, thin, home, heat, roster = (
        state.count,
        state.share,
        state.thin,
        state.home,
        state.heat,
        state.roster,
    )
    room = slots.shape[0] // heat.shape[0]
    width = heat.shape[0] // roster.shape[0]
    experts = roster[hot // width]
    gpu, giver, taker, seen = -1, -1, -1, 0
    ideal = heat[hot]
    for p in range(hot * room, (hot + 1) * room):
        f = slots[p]
        if count[f] < width:
            ideal = min(ideal, heat[hot] - share[f] + thin[f])
    for e in experts:
        copies = count[e]
        if copies < 2:
            continue
        if best <= ideal:
            break
        up = weight[e] / (copies - 1) - share[e]
        seen += copies
        first, second = 0.0, 0.0  # heat of the hottest GPUs that hold e
        for k in range(copies):
            first, second = max(first, heat[home[e, k]]), max(second, min(first, heat[home[e, k]]))
        for k in range(copies):
            rest = second if heat[home[e, k]] == first else first
            if rest + up >= best:
                continue
            g = home[e, k]
            left = heat[g] - share[e]
            if g == hot:
                seen += experts.shape[0]
                for f in experts:
                    peak = max(rest + up, left + thin[f])
                    if peak < best and count[f] < width and f != e and not _on(f, g, count, home):
                        best, gpu, giver, taker = peak, g, e, f
            else:
                seen += room
                for p in range(hot * room, (hot + 1) * room):
                    f = slots[p]
                    peak = max(rest + up, left + thin[f], heat[hot] - share[f] + thin[f])
                    if peak < best and count[f] < width and f != e and not _on(f, g, count, home):
                        best, gpu, giver, taker = peak, g, e, f
    if taker < 0:
        return -1, -1, seen
    slot = gpu * room
    while slots[slot] != giver:
        slot += 1
    return slot, taker, seen


@kernel
def _swap(p, q, slots, state):
    count, share, home, heat = state.count, state.share, state.home, state.heat
    room = slots.shape[0] // heat.shape[0]
    g, h, e, f = p // room, q // room, slots[p], slots[q]
    for k in range(count[e]):
        if home[e, k] == g:
            home[e, k] = h
            break
    for k in range(count[f]):
        if home[f, k] == h:
            home[f, k] = g
            break
    heat[g] += share[f] - share[e]
    heat[h] += share[e] - share[f]
    slots[p], slots[q] = f, e


@kernel
def _exchange(p, f, slots, weight, state):
    """Slot p holds f from now on."""
    count, share, thin, home, heat = state.count, state.share, state.thin, state.home, state.heat
    room = slots.shape[0] // heat.shape[0]
    e, g = slots[p], p // room
    up = weight[e] / (count[e] - 1) - share[e]
    down = share[f] - thin[f]
    heat[g] -= share[e]
    for k in range(count[f]):
        heat[home[f, k]] -= down
    home[f, count[f]] = g
    count[f] += 1
    share[f], thin[f] = thin[f], weight[f] / (count[f] + 1)
    count[e] -= 1
    for k in range(count[e]):
        if home[e, k] == g:
            home[e, k] = home[e, count[e]]
        heat[home[e, k]] += up
    thin[e], share[e] = share[e], share[e] + up
    heat[g] += share[f]
    slots[p] = f


@kernel
def _kick(slots, weight, state, draws, at):
    """A few random changes in the node of the hottest GPU, the first of them on that GPU."""
    count, home, heat, roster = state.count, state.home, state.heat, state.roster
    room = slots.shape[0] // heat.shape[0]
    width = heat.shape[0] // roster.shape[0]
    hot = np.argmax(heat)
    node = hot // width
    size = draws.shape[0]
    for step in range(1 + int(3 * draws[at % size])):
        kind, x, y = draws[(at + 1) % size], draws[(at + 2) % size], draws[(at + 3) % size]
        at += 4
        first, span = (hot * room, room) if step == 0 else (node * width * room, width * room)
        p = first + int(x * span)
        e, g = slots[p], p // room
        if kind < 0.5:
            f = roster[node, int(y * roster.shape[1])]
            if count[e] > 1 and count[f] < width and not _on(f, g, count, home):
                _exchange(p, f, slots, weight, state)
        else:
            q = node * width * room + int(y * width * room)
            f, h = slots[q], q // room
            if g != h and not _on(e, h, count, home) and not _on(f, g, count, home):
                _swap(p, q, slots, state)
    return at


@kernel
def _hottest_slot(slots, weight, num_gpus):
    """First slot of the hottest GPU."""
    count = np.bincount(slots)
    room = slots.shape[0] // num_gpus
    most, hot = -1.0, 0
    for first in range(0, slots.shape[0], room):
        heat = 0.0
        for p in range(first, first + room):
            heat += weight[slots[p]] / count[slots[p]]
        if heat > most:
            most, hot = heat, first
    return hot


@kernel
def _peak(slots, weight, num_gpus):
    """Heat of the hottest GPU of any map, and whether copies of an expert meet on a GPU."""
    count = np.zeros(weight.shape[0], np.int64)
    for e in slots:
        count[e] += 1
    peak, meet, room = 0.0, False, slots.shape[0] // num_gpus
    for first in range(0, slots.shape[0], room):
        heat = 0.0
        for p in range(first, first + room):
            heat += weight[slots[p]] / count[slots[p]]
            for q in range(first, p):
                meet |= slots[p] == slots[q]
        peak = max(peak, heat)
    return peak, meet


@kernel
def _groups_of(slots, num_groups, num_experts, num_nodes):
    """Groups in the order of the nodes that hold them."""
    groups = np.empty(num_groups, np.int64)
    new = np.ones(num_groups, np.bool_)
    used = 0
    for e in slots:
        group = e // (num_experts // num_groups)
        if new[group]:
            new[group] = False
            groups[used] = group
            used += 1
    return groups
