"""EPLB's published algorithm, compiled: maps to start from and to be no worse than.

`placer.solvers.eplb.rebalance` is the same in numpy, and gives the same maps.

Reference: https://github.com/deepseek-ai/EPLB.
"""

from __future__ import annotations

import numpy as np

from placer.search.compiling import kernel


@kernel
def published(weight, group_weight, num_slots, num_nodes, num_gpus):
    """EPLB's map in its single precision: groups to nodes, copies, and copies to GPUs."""
    size = weight.shape[0] // group_weight.shape[0]
    order = _packed(group_weight, num_nodes)
    room = num_slots // num_nodes
    slots = np.empty(num_slots, np.int64)
    width = order.shape[0] // num_nodes
    for node in range(num_nodes):
        experts = members(order[node * width : (node + 1) * width], size)
        copies = np.empty(room, np.int64)
        share = weight[experts]
        count = np.ones(experts.shape[0], np.float32)
        for p in range(room):
            copies[p] = p
            if p >= experts.shape[0]:
                e = np.argmax(share)
                copies[p] = e
                count[e] += np.float32(1)
                share[e] = weight[experts[e]] / count[e]
        packed = _packed(share[copies], num_gpus // num_nodes)
        slots[node * room : (node + 1) * room] = experts[copies[packed]]
    return slots


@kernel
def _packed(weight, bins):
    """Items in the order of their bins: each in turn, heaviest first, to the lightest bin with room."""
    room = weight.shape[0] // bins
    if room == 1:
        return np.arange(bins)
    packed = np.empty((bins, room), np.int64)
    used = np.zeros(bins, np.int64)
    heat = np.zeros(bins, np.float32)
    for item in np.argsort(-weight.astype(np.float64), kind="mergesort"):
        to = -1
        for b in range(bins):
            if used[b] < room and (to < 0 or heat[b] < heat[to]):
                to = b
        packed[to, used[to]] = item
        used[to] += 1
        heat[to] += weight[item]
    return packed.ravel()


@kernel
def members(groups, size):
    """Experts of some groups of consecutive experts."""
    experts = np.empty(groups.shape[0] * size, np.int64)
    for g in range(groups.shape[0]):
        for k in range(size):
            experts[g * size + k] = groups[g] * size + k
    return experts
