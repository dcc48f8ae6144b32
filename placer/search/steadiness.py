"""Compiled descent on the busiest GPU of every step, by swaps between GPUs of one server."""

from __future__ import annotations

import numpy as np

from placer.search.compiling import kernel
from placer.search.rules import may_swap


@kernel
def settled(occupant, uses, expert_load, size, cap, idle, pace, ranks, sweeps, rules=None):
    """The arrangement after swaps that lower the sum over steps of the busiest GPU's load; `occupant` is changed.

    Every two GPUs of a server in turn make the best swap between them, until none helps. No swap adds load above a cap.

    Parameters
    ----------
    occupant : (P,) int32
    uses : (P, steps) float64, load that each expert brings in each step
    expert_load : (P,) float64, load of each expert as caps count it
    size, cap : (levels,) positions per unit of the levels up to the server, GPUs first, and caps (inf = none)
    idle : (levels, P) float64, how far below `cap` the cap of each unit is
    pace : (GPUs,) float64, time that a GPU takes for a unit of load
    ranks : GPUs of a server
    sweeps : over all pairs of GPUs, at most
    rules : kept by every swap where `occupant` keeps them (see `placer.search.rules`); None for none
    """
    positions, steps = uses.shape
    width, gpus = size[0], positions // size[0]
    position_of = np.empty(positions, np.int32)
    heat = np.zeros((gpus, steps))  # in time
    held = idle.copy()
    for p in range(positions):
        position_of[occupant[p]] = p
        heat[p // width] += uses[occupant[p]] * pace[p // width]
        for level in range(size.shape[0]):
            held[level, p // size[level]] += expert_load[occupant[p]]
    others = np.empty(steps)
    for _ in range(sweeps):
        moved = False
        busiest = _busiest(heat)
        for a in range(gpus):
            for b in range(a + 1, (a // ranks + 1) * ranks):
                now = 0.0
                for s in range(steps):
                    others[s] = 0.0
                    for n in range(3):
                        if busiest[n, s] >= 0 and busiest[n, s] != a and busiest[n, s] != b:
                            others[s] = heat[busiest[n, s], s]
                            break
                    now += max(others[s], heat[a, s], heat[b, s])
                best, x, y = now * (1.0 - 1e-12), -1, -1
                for i in range(a * width, (a + 1) * width):
                    for j in range(b * width, (b + 1) * width):
                        e, f = occupant[i], occupant[j]
                        value = 0.0
                        for s in range(steps):
                            d = uses[f, s] - uses[e, s]
                            value += max(others[s], heat[a, s] + d * pace[a], heat[b, s] - d * pace[b])
                        if value >= best:
                            continue
                        if _added(i, j, expert_load[f] - expert_load[e], held, size, cap) > 1e-9:
                            continue
                        if rules is not None and not may_swap(i, j, occupant, position_of, rules):
                            continue
                        best, x, y = value, i, j
                if x < 0:
                    continue
                e, f = occupant[x], occupant[y]
                heat[a] += (uses[f] - uses[e]) * pace[a]
                heat[b] += (uses[e] - uses[f]) * pace[b]
                d = expert_load[f] - expert_load[e]
                for level in range(size.shape[0]):
                    held[level, x // size[level]] += d
                    held[level, y // size[level]] -= d
                occupant[x], occupant[y] = f, e
                position_of[f], position_of[e] = x, y
                busiest = _busiest(heat)
                moved = True
        if not moved:
            break
    return occupant


@kernel
def _busiest(heat):
    """The three busiest GPUs of every step, (3, steps), -1 where there are fewer: one is neither of any two."""
    gpus, steps = heat.shape
    found = np.full((3, steps), -1, np.int64)
    for g in range(gpus):
        for s in range(steps):
            x = g
            for n in range(3):
                y = found[n, s]
                if y < 0 or heat[x, s] > heat[y, s]:
                    found[n, s] = x
                    x = y
                    if x < 0:
                        break
    return found


@kernel
def _added(i, j, d, held, size, cap):
    """Load above the caps that a swap adds which brings the load d to position i, from j."""
    total = 0.0
    for level in range(size.shape[0]):
        a, b = i // size[level], j // size[level]
        if a != b and cap[level] != np.inf:
            x, y = held[level, a] - cap[level], held[level, b] - cap[level]
            total += max(0.0, x + d) + max(0.0, y - d) - max(0.0, x) - max(0.0, y)
    return total
