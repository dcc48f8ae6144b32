"""DeepSeek's EPLB: minimises the largest load of a GPU, with copies of hot experts in the spare slots.

Idea: gate groups are packed on servers by load; in each server the expert with the highest load per copy gets
the next copy until slots are used up; copies are packed on its GPUs by load. Where groups do not divide by
servers, the whole cluster counts as one. Two copies of an expert that meet on a GPU are then parted.
Complexity O(slots * (GPUs + experts)). Wins on stragglers, which copies can flatten completely; loses on
traffic, since it does not know which experts are chosen together.

References: https://github.com/deepseek-ai/EPLB (behaviour, README example, issue 22 on the meeting copies);
DeepSeek-V3 technical report, arXiv:2412.19437, section 3.4.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.errors import InvalidInput
from placer.layer import Layer
from placer.rebalance import policy
from placer.solvers import Placed

Loads = npt.NDArray[np.float32]  # the published code computes in single precision; ties depend on it
Ids = npt.NDArray[np.int64]

needs = frozenset({"load"})
handles = frozenset({"copies"})


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """EPLB's map with the meeting copies parted; copies beyond one a GPU leave their slot empty."""
    servers = layer.num_ranks // layer.server_ranks
    slots = rebalance(layer.heat[None], layer.num_slots, layer.num_groups, servers, layer.num_ranks)[0]
    slots = part_copies(slots, layer.heat, layer.num_ranks, servers)
    rows = slots.reshape(layer.num_ranks, -1).astype(np.int32)
    for row in rows:
        first = np.sort(np.unique(row, return_index=True)[1])
        row[: len(first)], row[len(first) :] = row[first], -1
    return Placed(slots=rows.ravel())


def rebalance(load: npt.ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Ids:
    """The published map, its defect included: two copies of an expert may share a GPU.

    Parameters
    ----------
    load : (num_layers, num_experts)
        Tokens of each expert.
    num_replicas : int
        Slots over all GPUs.
    num_groups : int
        Gate groups of consecutive experts. Unless servers divide them, groups and servers are ignored.
    num_nodes, num_gpus : int
        Servers, and GPUs over all servers.

    Returns
    -------
    (num_layers, num_replicas) int64
        Logical expert of each slot; GPU g owns the slots from ``g * num_replicas / num_gpus``.

    Raises
    ------
    InvalidInput
        When counts do not divide or there are fewer slots than experts.

    Examples
    --------
    >>> rebalance([[90, 10, 10, 10]], num_replicas=6, num_groups=1, num_nodes=1, num_gpus=2).tolist()
    [[0, 0, 3, 0, 1, 2]]
    """
    table = np.asarray(load, np.float32)
    if table.ndim != 2 or table.size == 0:
        raise InvalidInput(f"load: found shape {table.shape}, expected (num_layers, num_experts)")
    num_experts = table.shape[1]
    num_groups, num_nodes = policy(num_experts, num_replicas, num_groups, num_nodes, num_gpus)
    return np.stack([_rebalance(row, num_replicas, num_groups, num_nodes, num_gpus) for row in table])


def _rebalance(load: Loads, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int) -> Ids:
    by_group = np.arange(len(load)).reshape(num_groups, -1)
    slots = []
    for groups in _pack(load.reshape(num_groups, -1).sum(axis=1), num_nodes):
        experts = by_group[groups].ravel()
        copies, share = _replicate(load[experts], num_replicas // num_nodes)
        slots.append(experts[copies[_pack(share, num_gpus // num_nodes)]].ravel())
    return np.concatenate(slots)


def _pack(weight: Loads, bins: int) -> Ids:
    """Items (bins, items / bins): each in turn, heaviest first, to the lightest bin with room."""
    room = len(weight) // bins
    if room == 1:  # the published code leaves these in order
        return np.arange(bins)[:, None]
    packed = np.full((bins, room), -1)
    held = np.zeros(bins, np.int64)
    heat = np.zeros(bins, np.float32)
    for item in np.argsort(-weight, kind="stable"):
        lightest = np.where(held < room, heat, np.inf).argmin()
        packed[lightest, held[lightest]] = item
        held[lightest] += 1
        heat[lightest] += weight[item]
    return packed


def _replicate(load: Loads, slots: int) -> tuple[Ids, Loads]:
    """The expert in each slot and its load per copy: every expert once, then the heaviest copies again."""
    copies = np.arange(slots)
    count = np.ones(len(load), np.float32)
    for slot in range(len(load), slots):
        copies[slot] = (load / count).argmax()
        count[copies[slot]] += 1
    return copies, (load / count)[copies]


def part_copies(slots: Ids, load: npt.NDArray[np.int64], num_ranks: int, num_servers: int) -> Ids:
    """Swap copies between GPUs until no GPU holds an expert twice that another GPU could hold instead.

    A copy prefers a swap inside its server, which keeps gate groups whole, and of those the one that leaves
    the lightest pair of GPUs. It trades places with an expert that its own GPU lacks or that the other GPU
    holds twice, so every swap leaves fewer meetings. A GPU without the copy's expert always offers one of the
    two, for it has as many slots; hence only copies beyond one a GPU stay where they meet.

    Parameters
    ----------
    slots : (num_slots,) int64
        Logical expert of each slot, none empty.
    load : (num_experts,) int64
        Tokens of each expert, shared evenly by its copies.
    num_ranks, num_servers : int
        GPUs, and servers of equal size.

    Returns
    -------
    (num_slots,) int64

    Examples
    --------
    >>> part_copies(np.array([0, 0, 1, 2]), np.array([4, 2, 2]), num_ranks=2, num_servers=1).tolist()
    [1, 0, 0, 2]
    """
    slots = slots.copy()
    num_experts = len(load)
    share = load / np.maximum(np.bincount(slots, minlength=num_experts), 1)
    rank = np.arange(len(slots)) * num_ranks // len(slots)
    server = rank * num_servers // num_ranks
    held = np.bincount(rank * num_experts + slots, minlength=num_ranks * num_experts).reshape(num_ranks, -1)
    heat = np.bincount(rank, weights=share[slots], minlength=num_ranks)
    moved = True
    while moved:
        moved = False
        for slot, expert in enumerate(slots):
            own = rank[slot]
            if held[own, expert] < 2:
                continue
            fits = (held[rank, expert] == 0) & ((held[own, slots] == 0) | (held[rank, slots] > 1))
            if not fits.any():
                continue
            change = share[slots] - share[expert]
            peak = np.maximum(heat[own] + change, heat[rank] - change)
            other = np.lexsort((peak, server != server[slot], ~fits))[0]
            held[own, expert] -= 1
            held[own, slots[other]] += 1
            held[rank[other], slots[other]] -= 1
            held[rank[other], expert] += 1
            heat[own] += change[other]
            heat[rank[other]] -= change[other]
            slots[slot], slots[other] = slots[other], expert
            moved = True
    return slots
