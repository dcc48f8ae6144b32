"""Compiled load balance: hierarchical LPT, then swaps, at all levels together."""

from __future__ import annotations

import numpy as np

from placer.search.compiling import kernel
from placer.search.rules import may_swap


@kernel
def balanced(load, size, speed=None):
    """Experts on positions so that the busiest unit of every level is light.

    Longest processing time first, top-down: the next heaviest expert goes to the lightest outermost unit with
    room (of equal ones, to that with the fewest experts), inside it to the lightest next unit, and so on. Swaps
    that lower the sum of squared unit loads follow, then swaps that lower the sum over levels of max/mean.

    Parameters: load (P,) float64, tokens per expert (0 for padding); size (levels,) positions per unit, inside
    out; speed (levels, P) of units over the mean, where they differ: loads then count over speeds, and an expert goes
    where it would be done first. Returns occupant (P,) int32.

    Reference: Graham, "Bounds on Multiprocessing Timing Anomalies", 1969, doi:10.1137/0117039.
    """
    levels, positions = size.shape[0], load.shape[0]
    occupant = np.full(positions, -1, np.int32)
    used = np.zeros((levels, positions), np.int64)
    heat = np.zeros((levels, positions), np.float64)
    order = np.argsort(-load, kind="mergesort")
    for expert in order:
        low, high = 0, positions
        for level in range(levels - 1, -1, -1):
            coolest = -1
            for u in range(low // size[level], high // size[level]):
                if used[level, u] == size[level]:
                    continue
                if speed is None:
                    mine, least = heat[level, u], heat[level, coolest]
                else:
                    mine = (heat[level, u] + load[expert]) / speed[level, u]
                    least = (heat[level, coolest] + load[expert]) / speed[level, coolest]
                if coolest < 0 or mine < least or (mine == least and used[level, u] < used[level, coolest]):
                    coolest = u
            low, high = coolest * size[level], (coolest + 1) * size[level]
            used[level, coolest] += 1
            heat[level, coolest] += load[expert]
        p = low
        while occupant[p] >= 0:
            p += 1
        occupant[p] = expert
    return levelled(occupant, load, size, None, speed)


@kernel
def levelled(occupant, load, size, rules=None, speed=None):
    """The arrangement after the swaps of `balanced` that lower the busiest units; `occupant` is changed.

    `rules` (see `placer.search.rules`) are kept where `occupant` keeps them.
    """
    levels, positions = size.shape[0], load.shape[0]
    total = load.sum()
    if total == 0.0 or levels == 0:
        return occupant
    heat = np.zeros((levels, positions), np.float64)
    position_of = np.empty(positions, np.int32)
    for p in range(positions):
        position_of[occupant[p]] = p
        for level in range(levels):
            heat[level, p // size[level]] += load[occupant[p]]
    scale = np.empty(levels)
    for level in range(levels):
        scale[level] = (positions // size[level]) / total
    for _ in range(20 * positions):
        best, x, y = -1e-12, -1, -1
        for i in range(positions):
            for j in range((i // size[0] + 1) * size[0], positions):
                d = load[occupant[i]] - load[occupant[j]]
                if d == 0.0:
                    continue
                change = 0.0
                for level in range(levels):
                    a, b = i // size[level], j // size[level]
                    if a == b:
                        continue
                    if speed is None:
                        change += scale[level] ** 2 * d * (heat[level, b] - heat[level, a] + d)
                    else:
                        mine = (heat[level, a] - 0.5 * d) / speed[level, a]
                        other = (heat[level, b] + 0.5 * d) / speed[level, b]
                        change += scale[level] ** 2 * d * (other - mine)
                if change < best:
                    if rules is not None and not may_swap(i, j, occupant, position_of, rules):
                        continue
                    best, x, y = change, i, j
        if x < 0:
            break
        _swap(x, y, occupant, load, heat, size)
        position_of[occupant[x]], position_of[occupant[y]] = x, y
    for _ in range(20 * positions):
        before = _peaks(heat, size, scale, positions, speed)
        best, x, y = before - 1e-12, -1, -1
        for level in range(levels):
            units = positions // size[level]
            if speed is None:
                hot = np.argmax(heat[level, :units])
            else:
                hot = np.argmax(heat[level, :units] / speed[level, :units])
            for i in range(hot * size[level], (hot + 1) * size[level]):
                for j in range(positions):
                    if j // size[level] == hot or load[occupant[j]] >= load[occupant[i]]:
                        continue
                    _swap(i, j, occupant, load, heat, size)
                    value = _peaks(heat, size, scale, positions, speed)
                    _swap(i, j, occupant, load, heat, size)
                    if value < best:
                        if rules is not None and not may_swap(i, j, occupant, position_of, rules):
                            continue
                        best, x, y = value, i, j
        if x < 0:
            break
        _swap(x, y, occupant, load, heat, size)
        position_of[occupant[x]], position_of[occupant[y]] = x, y
    return occupant


@kernel
def _swap(i, j, occupant, load, heat, size):
    d = load[occupant[j]] - load[occupant[i]]
    for level in range(size.shape[0]):
        heat[level, i // size[level]] += d
        heat[level, j // size[level]] -= d
    occupant[i], occupant[j] = occupant[j], occupant[i]


@kernel
def _peaks(heat, size, scale, positions, speed):
    total = 0.0
    for level in range(size.shape[0]):
        peak = 0.0
        for u in range(positions // size[level]):
            peak = max(peak, heat[level, u] if speed is None else heat[level, u] / speed[level, u])
        total += peak * scale[level]
    return total
