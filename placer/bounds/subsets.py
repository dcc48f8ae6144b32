"""The optimum by dynamic programming over subsets: a proof for up to 20 items.

Idea: the cheapest way to hold a set of items in j units is a content with the set's lowest item, and the cheapest
way to hold the rest in j - 1. What every content costs comes from one sum over subsets.

Complexity: at most 3^items steps; seconds for 20 items, nothing for 16. No certificate: a checker repeats it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from placer.bounds import Ints, Partition, Proof, Tell
from placer.clock import Clock

ITEMS = 20
UNITS = 16


def suits(partition: Partition) -> bool:
    """Whether the tables fit into memory."""
    return partition.num_items <= ITEMS and partition.units <= UNITS


def prove(
    partition: Partition,
    incumbent: npt.NDArray[Any],
    *,
    clock: Clock,
    workers: int = 1,
    tell: Tell | None = None,
) -> Proof:
    """The optimum; it takes seconds at most, so the clock is not asked."""
    from placer.search.subsets import FAR, cheapest_partitions

    items, units = partition.num_items, partition.units
    cost = content_costs(partition)
    bits = np.arange(1 << items)
    held = np.bitwise_count(bits).astype(np.int8)
    load = ((bits[:, None] >> np.arange(items)) & 1) @ partition.load
    allowed = (load <= partition.cap) & (load >= partition.least_load)
    cost[~allowed] = FAR
    best = cheapest_partitions(cost, held, items, units, partition.size, partition.least)
    unit_of_item = np.asarray(incumbent, np.int64)
    everything = len(cost) - 1
    if best[units, everything] >= FAR:
        return Proof(
            bound=partition.cost(unit_of_item),
            method="subset dynamic programming: no partition keeps the cap",
            unit_of_item=unit_of_item,
        )
    bound = int(best[units, everything])
    if not partition.allows(unit_of_item) or bound < partition.cost(unit_of_item):
        unit_of_item = _traced(best, cost, held, partition)
    if tell is not None:
        tell(bound, bound)
    return Proof(bound=bound, method="subset dynamic programming", unit_of_item=unit_of_item)


def content_costs(partition: Partition) -> Ints:
    """Tokens that touch each content, (2**num_items,) int64, contents as bit masks.

    A content is missed by the tokens whose items are all among the others.
    """
    from placer.search.subsets import sum_subsets

    masks = np.where(partition.sets >= 0, np.int64(1) << np.maximum(partition.sets, 0).astype(np.int64), 0)
    within = np.zeros(1 << partition.num_items, np.int64)
    np.add.at(within, masks.sum(axis=1), partition.count)
    sum_subsets(within, partition.num_items)
    costs: Ints = partition.count.sum() - within[::-1]  # the complement of mask m is the last mask less m
    return costs


def _traced(best: Ints, cost: Ints, held: npt.NDArray[np.int8], partition: Partition) -> Ints:
    """The partition behind the last entry of `best`."""
    unit_of_item = np.zeros(partition.num_items, np.int64)
    mask = len(cost) - 1
    contents = np.arange(len(cost))
    for unit in range(partition.units, 0, -1):
        within = contents[(contents & ~mask) == 0]
        before = best[unit - 1, mask ^ within]
        fits = (held[within] >= partition.least) & (held[within] <= partition.size)
        exact = fits & (before + np.where(within == 0, 0, cost[within]) == best[unit, mask])
        content = int(within[np.flatnonzero(exact)[0]])
        unit_of_item[((content >> np.arange(partition.num_items)) & 1).astype(bool)] = unit - 1
        mask ^= content
    return unit_of_item
