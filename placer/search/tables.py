"""Compiled search for dispatch tables: which copy of an expert the tokens of each server take."""

from __future__ import annotations

import numpy as np

from placer.search.compiling import kernel
from placer.search.copies import excess
from placer.search.dispatch import ones
from placer.search.pricing import BIT, DE_BRUIJN


@kernel
def fit_table(tokens, count, first, uses, where, load, cap, penalty, local, table, sweeps):
    """Coordinate descent on a dispatch table: for each source and expert the unit that costs least, all else kept.

    Parameters
    ----------
    tokens, count, first, uses
        As in `placer.search.copies.anneal_copies`.
    where : (E,) uint64
        Units that hold each expert, as bit masks.
    load : (E,) float64
        Tokens of each expert, equally many from every source.
    cap : float
        Load of a unit above which every token costs `penalty` units.
    local : bool
        Whether sources are units, which take their own copies and do not count as touched.
    table : (sources, E) int64, in and out
        Unit of each expert.
    sweeps : int
        Times that all entries are looked at, at most.

    Returns
    -------
    `table_cost`, and the load above the cap.
    """
    sources, experts = table.shape
    one = np.uint64(1)
    units = 64
    unit_load, need = np.zeros(units), np.zeros(units)
    for s in range(sources):
        for e in range(experts):
            unit_load[table[s, e]] += load[e] / sources
    for _ in range(sweeps):
        changed = False
        for s in range(sources):
            own = one << np.uint64(s) if local else np.uint64(0)
            for e in range(experts):
                options = where[e]
                if options & (options - one) == 0 or options & own:
                    continue
                need[:] = 0.0
                for at in range(first[e], first[e + 1]):
                    t = uses[at]
                    touched = np.uint64(0)
                    for j in range(tokens.shape[1]):
                        f = tokens[t, j]
                        if f >= 0 and f != e:
                            touched |= one << np.uint64(table[s, f])
                    left = options & ~touched
                    while left:
                        unit = left & (~left + one)
                        left ^= unit
                        need[BIT[unit * DE_BRUIJN >> np.uint64(58)]] += count[t]
                share, best, least = load[e] / sources, table[s, e], np.inf
                unit_load[best] -= share
                left = options
                while left:
                    unit = left & (~left + one)
                    left ^= unit
                    u = BIT[unit * DE_BRUIJN >> np.uint64(58)]
                    unit_load[u] += share
                    cost = need[u] / sources + penalty * excess(unit_load, cap)
                    unit_load[u] -= share
                    if cost < least - 1e-9 or (cost < least + 1e-9 and u == table[s, e]):
                        best, least = u, cost
                unit_load[best] += share
                changed |= best != table[s, e]
                table[s, e] = best
        if not changed:
            break
    return table_cost(tokens, count, local, table), excess(unit_load, cap)


@kernel
def table_cost(tokens, count, local, table):
    """Touched units of all tokens, the source's own left out where it is one, mean over sources."""
    sources, one = table.shape[0], np.uint64(1)
    total = 0
    for s in range(sources):
        own = one << np.uint64(s) if local else np.uint64(0)
        for t in range(tokens.shape[0]):
            touched = np.uint64(0)
            for j in range(tokens.shape[1]):
                if tokens[t, j] >= 0:
                    touched |= one << np.uint64(table[s, tokens[t, j]])
            total += count[t] * ones(touched & ~own)
    return total / sources
