"""Compiled dynamic programming over subsets of items."""

from __future__ import annotations

import numpy as np

from placer.search.compiling import kernel

FAR = np.int64(1) << np.int64(60)


@kernel
def sum_subsets(values, items):
    """Replace ``values[s]`` by the sum over all subsets of s, for bit masks of `items` items; (2**items,) in place."""
    for item in range(items):
        bit = 1 << item
        for mask in range(values.shape[0]):
            if mask & bit:
                values[mask] += values[mask ^ bit]


@kernel
def cheapest_partitions(cost, held, items, units, size, least):
    """Least cost to hold each set of items in 1, 2, ... units.

    The next unit takes the lowest item that is left, so that every partition is met once. Contents that are not
    allowed cost `FAR`.

    Parameters: cost (2**items,) int64 of contents, held (2**items,) int8 their numbers of items.
    Returns best (units + 1, 2**items) int64.
    """
    everything = (1 << items) - 1
    best = np.full((units + 1, everything + 1), FAR, np.int64)
    best[0, 0] = 0
    for unit in range(units):
        for mask in range(everything + 1):
            now = best[unit, mask]
            if now >= FAR or items - held[mask] > (units - unit) * size:
                continue
            rest = everything & ~mask
            if least == 0 and now < best[unit + 1, mask]:
                best[unit + 1, mask] = now
            if rest == 0:
                continue
            lowest = rest & -rest
            rest ^= lowest
            others = rest
            while True:
                content = others | lowest
                if least <= held[content] <= size and cost[content] < FAR:
                    total = now + cost[content]
                    if total < best[unit + 1, mask | content]:
                        best[unit + 1, mask | content] = total
                if others == 0:
                    break
                others = (others - 1) & rest
    return best
