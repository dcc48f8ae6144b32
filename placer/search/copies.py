"""Compiled search for copies: random moves of experts between units, some experts standing on several.

A unit holds an expert once at most, and what holds an expert is a bit mask of up to 64 units. The cost of a token is
the number of other units that it touches, summed over all units as its home; only the tokens of the experts that a
move concerns are counted anew.
"""

from __future__ import annotations

import numpy as np

from placer.search.compiling import kernel
from placer.search.pricing import BIT, DE_BRUIJN

#: Dispatch rules: a uniform pick unless the home has a copy, a uniform pick, the fewest other units.
RULES = {"nearest": 0, "spread": 1, "cover": 2}

UNITS = 64  # bits of a mask
GLANCES = (32, 8, 1)  # a move is judged by one in so many tokens first, and by more while it may be accepted
DOUBT = 2.0  # standard errors by which that may be wrong


@kernel
def ones(mask):
    """How many bits are set."""
    mask -= (mask >> np.uint64(1)) & np.uint64(0x5555555555555555)
    mask = (mask & np.uint64(0x3333333333333333)) + ((mask >> np.uint64(2)) & np.uint64(0x3333333333333333))
    mask = (mask + (mask >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((mask * np.uint64(0x0101010101010101)) >> np.uint64(56))


@kernel
def cover_size(several, many, home):
    """Units needed to hold all experts but those that `home`, a mask of one unit or none, holds.

    `several[:many]` are the units of each expert, as masks.
    """
    left = np.uint64(0)
    for x in range(many):
        if several[x] & home == 0:
            left |= np.uint64(1) << np.uint64(x)
    if left == 0:
        return 0
    for size in range(1, many + 1):
        if covers(several, many, left, size):
            return size
    return many


@kernel
def covers(several, many, left, size):
    """Whether `size` units can hold the experts `left`, a mask of places in `several`."""
    stack, depth = np.empty(size + 1, np.uint64), 0  # experts left
    choice = np.empty(size + 1, np.uint64)  # units of the first expert left that are still to be tried
    stack[0] = left
    choice[0] = several[BIT[(left & (~left + np.uint64(1))) * DE_BRUIJN >> np.uint64(58)]]
    while depth >= 0:
        if choice[depth] == 0:
            depth -= 1
            continue
        unit = choice[depth] & (~choice[depth] + np.uint64(1))
        choice[depth] ^= unit
        rest = np.uint64(0)
        for x in range(many):
            bit = np.uint64(1) << np.uint64(x)
            if stack[depth] & bit and not several[x] & unit:
                rest |= bit
        if rest == 0:
            return True
        if depth + 1 < size:
            depth += 1
            stack[depth] = rest
            choice[depth] = several[BIT[(rest & (~rest + np.uint64(1))) * DE_BRUIJN >> np.uint64(58)]]
    return False


@kernel
def token_cost(rule, row, where, number, units, several):
    """Units other than the home's that a token touches, summed over all units as its home.

    Parameters: row (top_k,) experts, -1 = none; where (E,) uint64 and number (E,) the units that hold each expert;
    several (top_k,) uint64 working space.
    """
    one = np.uint64(1)
    certain, union, many = np.uint64(0), np.uint64(0), 0
    for j in range(row.shape[0]):
        e = row[j]
        if e < 0:
            continue
        if number[e] == 1:
            certain |= where[e]
        else:
            several[many] = where[e]
            union |= where[e]
            many += 1
    total = float(ones(certain) * (units - 1))
    if many == 0:
        return total
    if rule == 2:
        opened = 0
        union = np.uint64(0)
        for x in range(many):
            if several[x] & certain == 0:
                several[opened] = several[x]
                union |= several[x]
                opened += 1
        if opened == 0:
            return total
        if opened == 1:
            return total + units - ones(union)
        most = cover_size(several, opened, np.uint64(0))
        total += most * units
        while union:  # a home that holds some of the experts
            home = union & (~union + one)
            union ^= home
            total -= most - cover_size(several, opened, home)
        return total
    union &= ~certain
    while union:
        unit = union & (~union + one)
        union ^= unit
        miss, holders, last = 1.0, 0, 0
        for x in range(many):
            if several[x] & unit:
                last = ones(several[x])
                miss *= 1.0 - 1.0 / last
                holders += 1
        if rule == 1:
            total += (units - 1) * (1.0 - miss)
        elif holders == 1:
            total += (units - last) / last
        else:
            for h in range(units):  # nothing at the unit itself
                home, miss = one << np.uint64(h), 1.0
                for x in range(many):
                    if several[x] & unit and not several[x] & home:
                        miss *= 1.0 - 1.0 / ones(several[x])
                total += 1.0 - miss
    return total


@kernel
def total_cost(rule, tokens, count, where, number, units, cost):
    """`token_cost` of every token into `cost` (n,), and their sum weighted by `count`."""
    several = np.empty(tokens.shape[1], np.uint64)
    total = 0.0
    for t in range(tokens.shape[0]):
        cost[t] = token_cost(rule, tokens[t], where, number, units, several)
        total += count[t] * cost[t]
    return total


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
def share_out(left, amount, unit_load):
    """Add an amount to every unit of a mask."""
    while left:
        unit = left & (~left + np.uint64(1))
        left ^= unit
        unit_load[BIT[unit * DE_BRUIJN >> np.uint64(58)], 0] += amount


@kernel
def cover_load(row, weight, where, number, units, unit_load):
    """Add the picks of a token under the rule cover, expected over uniform homes, times `weight`.

    *Open* experts are on none of the units that must be touched. Exact where two are at most, and experts that are on
    several touched units do not meet the units chosen for two; of more, those that one unit can hold together are
    taken to go to such a unit, and others to share evenly.
    """
    certain, shared, opened = np.uint64(0), ~np.uint64(0), 0
    lone, union = np.uint64(0), np.uint64(0)
    for j in range(row.shape[0]):
        e = row[j]
        if e >= 0 and number[e] == 1:
            certain |= where[e]
            unit_load[BIT[where[e] * DE_BRUIJN >> np.uint64(58)], 0] += weight
    for j in range(row.shape[0]):
        e = row[j]
        if e >= 0 and number[e] > 1 and where[e] & certain == 0:
            opened += 1
            lone = where[e]
            shared &= where[e]
            union |= where[e]
    weight /= units
    for j in range(row.shape[0]):
        e = row[j]
        if e < 0 or number[e] == 1:
            continue
        held = where[e]
        among = held & certain
        share_out(held, weight, unit_load)  # homes that hold it
        away = units - number[e]
        if among and opened == 1 and held & lone:
            asked = units - ones(lone | held)  # homes for which a unit of `lone` is chosen
            both = asked * ones(lone & held) / ones(lone)  # and it holds this expert, too
            each = (away - both) / ones(among) + both / (ones(among) + 1.0)
            share_out(among, weight * each, unit_load)
            share_out(lone & held, weight * asked / ones(lone) / (ones(among) + 1.0), unit_load)
        elif among:
            share_out(among, weight * away / ones(among), unit_load)
        else:
            together = units - ones(union) if shared else 0  # homes for which open experts share a unit
            share_out(held, weight * (away - together) / number[e], unit_load)
            share_out(shared if shared else held, weight * together / max(1, ones(shared)), unit_load)


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
def crowding(row, ranks, load, number, most):
    """Load above `most` on a unit's ranks when its copies, the heaviest first, go to the coolest with a free slot.

    Parameters: row (slots,) experts, -1 = none; load (E, 1 + parts), of which the first counts; number (E,) copies.
    """
    room = row.shape[0] // ranks
    shares = np.zeros(row.shape[0])
    for i in range(row.shape[0]):
        e = row[i]
        share = load[e, 0] / number[e] if e >= 0 else 0.0
        j = i
        while j > 0 and shares[j - 1] < share:
            shares[j] = shares[j - 1]
            j -= 1
        shares[j] = share
    heat, held = np.zeros(ranks), np.zeros(ranks, np.int64)
    for i in range(row.shape[0]):
        coolest = -1
        for r in range(ranks):
            if held[r] < room and (coolest < 0 or heat[r] < heat[coolest]):
                coolest = r
        heat[coolest] += shares[i]
        held[coolest] += 1
    over = 0.0
    for r in range(ranks):
        over += max(0.0, heat[r] - most)
    return over


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
    ranks,
    most,
    penalty,
    uneven,
    hot,
    cold,
    draws,
):
    """Annealing over what units hold: swaps of two slots, and other experts in the slots of copies or in empty ones.

    Parameters
    ----------
    rule : int
        See `RULES`.
    content : (units, slots) int64, in and out
        Expert of each slot, -1 = empty; no expert twice in a unit, at most `UNITS` units.
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
    ranks, most : int and float
        GPUs of a unit, and the same for the load of a GPU; no expert loses the copies that it needs to stay below.
    penalty, uneven : float
        Touched units that a token above a cap costs, and that a squared token of `unevenness` costs.
    hot, cold : float
        First and last temperature, in touched units.
    draws : (steps, 2 + 2 n) float64
        Uniform random numbers in [0, 1), for n moves to choose from.

    Returns
    -------
    Touched units of all tokens, the home's left out, homes uniform; the load above the cap of
    units; that above the cap of GPUs; and the load of units, (units,) float64, without the bias.
    """
    units, slots = content.shape
    experts = load.shape[0]
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
        crowded[u] = crowding(content[u], ranks, load, number, most)
    steps, marks = draws.shape[0], 0
    for step in range(steps):
        u, i, v, j, f, best = -1, -1, -1, -1, -1, -np.inf
        for x in range(2, draws.shape[1], 2):
            p = int(draws[step, x] * units * slots)
            a, b, c, d = p // slots, p % slots, -1, -1
            e = content[a, b]
            if draws[step, 0] < 0.5:
                p = int(draws[step, x + 1] * units * slots)
                c, d = p // slots, p % slots
                g = content[c, d]
                if c == a or e == g or (e >= 0 and where[e] >> np.uint64(c) & np.uint64(1)):
                    continue
            elif e < 0 or (number[e] > 1 and load[e, 0] <= most * (number[e] - 1)):
                g = int(draws[step, x + 1] * (experts + 1)) - 1
                if e == g:
                    continue
            else:
                continue
            if g >= 0 and where[g] >> np.uint64(a) & np.uint64(1):
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
                    crowds[w] = crowding(content[w], ranks, load, number, most)
                    heat += crowds[w] - crowded[w]
        heated = -np.log(1.0 - draws[step, 1]) * hot * (cold / hot) ** (step / steps)
        if rule == 2 and over > 0.0:  # copies share evenly by and large only: what helps must not be missed
            now = 0.0
        heated -= penalty * heat + uneven * (spread_now - spread)
        room = (heated - penalty * (now - over)) * units  # a change above it is refused
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
            if stride > 1 and n > 1 and change * stride - DOUBT * stride * np.sqrt(square) > room:
                refused = True
                break
        accepted = not refused and change <= room
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
