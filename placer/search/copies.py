"""Compiled search for copies: random moves of experts between units, some experts standing on several.

A unit holds an expert once at most, and what holds an expert is a bit mask of up to 64 units. The cost of a token is
that of `placer.search.dispatch`; only the tokens of the experts that a move concerns are counted anew.
"""

from __future__ import annotations

import numpy as np

from placer.search.compiling import kernel
from placer.search.dispatch import cover_load, token_cost, total_cost
from placer.search.pricing import BIT, DE_BRUIJN

CLOSED = -2  # content of a slot that stays empty; others that are empty hold -1
GLANCES = (32, 8, 1)  # a move is judged by one in so many tokens first, and by more while it may be accepted
DOUBT = 2.0  # standard errors by which that may be wrong


@kernel
def hold(content, where, number):
    """Masks `where` (E,) and counts `number` (E,) of the units that hold each expert; content (units, slots)."""
    where[:] = 0
    number[:] = 0
    for u in range(content.shape[0]):
        for i in range(content.shape[1]):
            e = content[u, i]
            if e >= 0:
                where[e] |= np.uint64(1) << np.uint64(u)
                number[e] += 1


@kernel
def spread_load(e, sign, load, where, number, unit_load):
    """Add an expert's loads (E, 1 + parts) to those of its units (units, 1 + parts), each an equal share of them.

    The first is its load, others are those of parts of the trace.
    """
    if e < 0:
        return
    left = where[e]
    while left:
        unit = left & (~left + np.uint64(1))
        left ^= unit
        u = BIT[unit * DE_BRUIJN >> np.uint64(58)]
        for part in range(load.shape[1]):
            unit_load[u, part] += sign * load[e, part] / number[e]


@kernel
def excess(unit_load, cap):
    """Load above the cap, summed over units."""
    over = 0.0
    for u in range(unit_load.shape[0]):
        over += max(0.0, unit_load[u] - cap)
    return over


@kernel
def unevenness(unit_load, part_mean):
    """Squares of what the parts' loads of units differ from their means over units, (parts,), summed."""
    total = 0.0
    for u in range(unit_load.shape[0]):
        for part in range(part_mean.shape[0]):
            off = unit_load[u, 1 + part] - part_mean[part]
            total += off * off
    return total


@kernel
def crowding(row, idle, room, seat, load, number, most):
    """Load above `most` on a unit's ranks when its copies, the heaviest first, go to the coolest with a free slot.

    Parameters: row (slots,) experts, negative = none; idle, room (ranks,) what a rank begins with, and its slots; seat
    (E,) the rank where an expert has to be, or -1; load (E, 1 + parts), of which the first counts; number (E,) copies.
    """
    ranks = room.shape[0]
    heat, held = idle.copy(), np.zeros(ranks, np.int64)
    shares, many = np.empty(row.shape[0]), 0
    for e in row:
        if e < 0:
            continue
        share = load[e, 0] / number[e]
        if seat[e] >= 0:
            heat[seat[e]] += share
            held[seat[e]] += 1
            continue
        j = many
        while j > 0 and shares[j - 1] < share:
            shares[j] = shares[j - 1]
            j -= 1
        shares[j] = share
        many += 1
    for i in range(many):
        coolest = -1
        for r in range(ranks):
            if held[r] < room[r] and (coolest < 0 or heat[r] < heat[coolest]):
                coolest = r
        heat[coolest] += shares[i]
        held[coolest] += 1
    over = 0.0
    for r in range(ranks):
        over += max(0.0, heat[r] - most)
    return over


@kernel
def may_take(f, u, e, v, where, limits):
    """Whether unit u may hold expert f once e has left it for v, or for good where v = -1.

    `limits`: (E,) uint64 units that may hold each expert; the partners that it keeps apart from, as CSR: (E + 1,)
    starts, partners, and how many units the two may not share, 0 where it is one GPU; and (units,) GPUs with a slot for
    experts. So many partners, f included, may share a unit.
    """
    allowed, first, partner, span, gpus = limits
    if not allowed[f] >> np.uint64(u) & np.uint64(1):
        return False
    beside = 0
    for x in range(first[f], first[f + 1]):
        held = where[partner[x]]
        if partner[x] == e:
            held &= ~(np.uint64(1) << np.uint64(u))
            if v >= 0:
                held |= np.uint64(1) << np.uint64(v)
        if span[x] == 0:
            beside += 1 if held >> np.uint64(u) & np.uint64(1) else 0
            continue
        for w in range(u // span[x] * span[x], (u // span[x] + 1) * span[x]):
            if held >> np.uint64(w) & np.uint64(1):
                return False
    return beside < gpus[u]


@kernel
def exchange(e, u, f, v, where, number):
    """Let expert e leave unit u for v, or for good where v = -1, and f take its place; -1 is no expert."""
    one = np.uint64(1)
    if e >= 0:
        where[e] ^= one << np.uint64(u)
        number[e] -= 1
        if v >= 0:
            where[e] |= one << np.uint64(v)
            number[e] += 1
    if f >= 0:
        if v >= 0:
            where[f] ^= one << np.uint64(v)
            number[f] -= 1
        where[f] |= one << np.uint64(u)
        number[f] += 1


@kernel
def undo(e, u, f, v, where, number):
    """Take an `exchange` back."""
    if v >= 0:
        exchange(f, u, e, v, where, number)
    else:
        exchange(f, u, e, -1, where, number)


@kernel
def anneal_copies(
    rule,
    content,
    tokens,
    count,
    first,
    uses,
    pairs,
    load,
    bias,
    cap,
    idle,
    room,
    seat,
    most,
    penalty,
    uneven,
    alone,
    hot,
    cold,
    draws,
    limits=None,
):
    """Annealing over what units hold: swaps of two slots, and other experts in the slots of copies or in empty ones.

    Parameters
    ----------
    rule : int
        See `placer.search.dispatch.RULES`.
    content : (units, slots) int64, in and out
        Expert of each slot, -1 = empty, or `CLOSED`; no expert twice in a unit, at most 64 units.
    tokens, count : (n, top_k) integer and (n,) int64
        Distinct expert sets, -1 = none, and the tokens of each.
    first, uses : (E + 1,) and (first[E],) int
        The rows of `tokens` that use each expert.
    pairs : (E, E) float64
        Tokens that use both experts, zero diagonal: of a few moves drawn, the one with the best sum is tried.
    load : (E, 1 + parts) float64
        Tokens of each expert, then those in parts of the trace; copies share them evenly, the first under the rule
        cover as `cover_load` says.
    bias : (units,) float64
        What is added to the load of units.
    cap : float
        Load of a unit above which every token costs `penalty` units.
    idle, room : (units, GPUs of a unit) float64 and int64
        What is added to the load of GPUs, and their slots that are not closed.
    seat : (E,) int64
        GPU of its unit where an expert has to be, or -1.
    most : float
        As `cap` for the load of a GPU; no expert loses the copies that it needs to stay below.
    penalty, uneven : float
        Touched units that a token above a cap costs, and that a squared token of `unevenness` costs.
    alone : (E,) float64
        Touched units that an expert costs which stands alone; with n copies it costs 1/n of them.
    hot, cold : float
        First and last temperature, in touched units.
    draws : (steps, 2 + 2 n) float64
        Uniform random numbers in [0, 1), for n moves to choose from.
    limits : tuple, optional
        Where experts may stand (see `may_take`); None for anywhere.

    Returns
    -------
    Touched units of all tokens, the home's left out, homes uniform; the load above the cap of
    units; that above the cap of GPUs; and the load of units, (units,) float64, without the bias.
    """
    units, slots = content.shape
    experts, ranks = load.shape[0], room.shape[1]
    where, number = np.zeros(experts, np.uint64), np.zeros(experts, np.int64)
    hold(content, where, number)
    several = np.empty(tokens.shape[1], np.uint64)
    unit_load, trial = np.zeros((units, load.shape[1])), np.zeros((units, load.shape[1]))
    before = np.zeros((units, 1))
    for e in range(experts):
        spread_load(e, 1.0, load, where, number, unit_load)
    if rule == 2:
        unit_load[:, 0] = 0.0
        for t in range(tokens.shape[0]):
            cover_load(tokens[t], count[t], where, number, units, unit_load)
    unit_load[:, 0] += bias
    cost, fresh = np.empty(tokens.shape[0]), np.empty(tokens.shape[0])
    total = total_cost(rule, tokens, count, where, number, units, cost)
    part_mean = np.array([unit_load[:, 1 + part].mean() for part in range(load.shape[1] - 1)])
    over, spread = excess(unit_load[:, 0], cap), unevenness(unit_load, part_mean)
    seen = np.full(tokens.shape[0], -1, np.int64)
    bonds = np.zeros((units, experts))  # tokens of an expert that it shares with a unit's, pair by pair
    for u in range(units):
        for i in range(slots):
            if content[u, i] >= 0:
                bonds[u] += pairs[content[u, i]]
    crowded, crowds = np.zeros(units), np.zeros(units)
    for u in range(units if ranks > 1 else 0):
        crowded[u] = crowding(content[u], idle[u], room[u], seat, load, number, most)
    steps, marks = draws.shape[0], 0
    for step in range(steps):
        u, i, v, j, f, best = -1, -1, -1, -1, -1, -np.inf
        for x in range(2, draws.shape[1], 2):
            p = int(draws[step, x] * units * slots)
            a, b, c, d = p // slots, p % slots, -1, -1
            e = content[a, b]
            if e == CLOSED:
                continue
            if draws[step, 0] < 0.5:
                p = int(draws[step, x + 1] * units * slots)
                c, d = p // slots, p % slots
                g = content[c, d]
                if c == a or e == g or g == CLOSED or (e >= 0 and where[e] >> np.uint64(c) & np.uint64(1)):
                    continue
            elif e < 0 or (number[e] > 1 and load[e, 0] <= most * (number[e] - 1)):
                g = int(draws[step, x + 1] * (experts + 1)) - 1
                if e == g:
                    continue
            else:
                continue
            if g >= 0 and where[g] >> np.uint64(a) & np.uint64(1):
                continue
            if limits is not None:
                if g >= 0 and not may_take(g, a, e, c, where, limits):
                    continue
                if e >= 0 and c >= 0 and not may_take(e, c, g, a, where, limits):
                    continue
            gain = 0.0
            if e >= 0:
                gain -= bonds[a, e] - (bonds[c, e] if c >= 0 else 0.0)
            if g >= 0:
                gain += bonds[a, g] - (bonds[c, g] if c >= 0 else 0.0)
            if e >= 0 and g >= 0:
                gain -= pairs[e, g] * (2.0 if c >= 0 else 1.0)
            if gain > best:
                u, i, v, j, f, best = a, b, c, d, g, gain
        if u < 0:
            continue
        e = content[u, i]
        trial[:] = unit_load
        for g in (e, f):
            spread_load(g, -1.0, load, where, number, trial)
        lonelier = 0.0
        if v < 0:
            if e >= 0:
                lonelier += alone[e] / (number[e] - 1) - alone[e] / number[e]
            if f >= 0:
                lonelier += alone[f] / (number[f] + 1) - alone[f] / number[f]
        exchange(e, u, f, v, where, number)
        content[u, i] = f
        if v >= 0:
            content[v, j] = e
        for g in (e, f):
            spread_load(g, 1.0, load, where, number, trial)
        now, spread_now = excess(trial[:, 0], cap), unevenness(trial, part_mean)
        heat = 0.0
        if ranks > 1:
            for w in range(units):
                crowds[w] = crowded[w]
                bit = np.uint64(1) << np.uint64(w)
                if w in (u, v) or (e >= 0 and where[e] & bit) or (f >= 0 and where[f] & bit):
                    crowds[w] = crowding(content[w], idle[w], room[w], seat, load, number, most)
                    heat += crowds[w] - crowded[w]
        heated = -np.log(1.0 - draws[step, 1]) * hot * (cold / hot) ** (step / steps)
        if rule == 2 and over > 0.0:  # copies share evenly by and large only: what helps must not be missed
            now = 0.0
        heated -= penalty * heat + uneven * (spread_now - spread) + lonelier
        bearable = (heated - penalty * (now - over)) * units  # a change above it is refused
        change, refused = 0.0, False
        for glance in range(len(GLANCES)):
            change, square, n = 0.0, 0.0, 0
            stride = GLANCES[glance]
            marks += 1
            for g in (e, f):
                if g < 0:
                    continue
                for at in range(first[g], first[g + 1], stride):
                    t = uses[at]
                    if seen[t] == marks:
                        continue
                    seen[t] = marks
                    fresh[t] = token_cost(rule, tokens[t], where, number, units, several)
                    d = count[t] * (fresh[t] - cost[t])
                    change += d
                    square += d * d
                    n += 1
            if stride > 1 and n > 1 and change * stride - DOUBT * stride * np.sqrt(square) > bearable:
                refused = True
                break
        accepted = not refused and change <= bearable
        if accepted and rule == 2:
            trial[:, 0] = unit_load[:, 0]
            before[:] = 0.0
            for new in (True, False):
                marks += 1
                for g in (e, f):
                    if g < 0:
                        continue
                    for at in range(first[g], first[g + 1]):
                        t = uses[at]
                        if seen[t] != marks:
                            seen[t] = marks
                            into = trial if new else before
                            cover_load(tokens[t], count[t], where, number, units, into)
                if new:
                    undo(e, u, f, v, where, number)
            trial[:, 0] -= before[:, 0]
            now = excess(trial[:, 0], cap)
            accepted = change <= (heated - penalty * (now - over)) * units
            if accepted:
                exchange(e, u, f, v, where, number)
        elif not accepted:
            undo(e, u, f, v, where, number)
        if accepted:
            total, over, spread = total + change, now, spread_now
            unit_load[:] = trial
            crowded[:] = crowds
            for g in range(experts):
                if e >= 0:
                    bonds[u, g] -= pairs[e, g]
                    if v >= 0:
                        bonds[v, g] += pairs[e, g]
                if f >= 0:
                    bonds[u, g] += pairs[f, g]
                    if v >= 0:
                        bonds[v, g] -= pairs[f, g]
            for g in (e, f):
                if g >= 0:
                    for at in range(first[g], first[g + 1]):
                        cost[uses[at]] = fresh[uses[at]]
        else:
            content[u, i] = e
            if v >= 0:
                content[v, j] = f
    return total / units, over, crowded.sum(), unit_load[:, 0] - bias
