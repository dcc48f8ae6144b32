"""Compiled dispatch rules: what the tokens of a layer with copies touch, and whom they load.

What holds an expert is a bit mask of up to 64 units. The cost of a token is the number of other units that it touches,
summed over all units as its home.
"""

from __future__ import annotations

import numpy as np

from placer.search.compiling import kernel
from placer.search.pricing import BIT, DE_BRUIJN

#: Dispatch rules: a uniform pick unless the home has a copy, a uniform pick, the fewest other units.
RULES = {"nearest": 0, "spread": 1, "cover": 2}

UNITS = 64  # bits of a mask


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
