"""Copies and places of experts by load alone: EPLB's question, a lighter hottest GPU, and the proved optimum.

`rebalance_experts` has the signature and the answer of DeepSeek's EPLB, so that a serving stack that rebalances while
it runs can call it instead. `best` proves on small cases how light the hottest GPU can be.

References: https://github.com/deepseek-ai/EPLB; DeepSeek-V3 technical report, arXiv:2412.19437, section 3.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.errors import InvalidInput

Ids = npt.NDArray[np.int64]

LOOKS = 150  # at slots, for each slot of a layer: a few tenths of a millisecond for a few hundred slots
LEAST_LOOKS = 40_000
LARGEST = 1e38  # what single precision can hold


def rebalance_experts(
    weight: npt.ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Ids, Ids, Ids]:
    """Which experts get copies, and the GPU of each copy, so that the hottest GPU of each layer is light.

    Where nodes divide groups, each node holds the same number of whole groups (EPLB's hierarchical policy); otherwise
    groups and nodes are ignored. All GPUs have the same number of slots, every slot holds an expert, and copies share
    their expert's load evenly. No GPU holds an expert twice.

    The hottest GPU is never hotter than on EPLB's published map, and mostly cooler, with one exception: the published
    map may let copies of an expert meet on a GPU, which leaves a slot idle. Where only an idle slot helps (few
    experts for the slots, or loads that differ a hundredfold), that map can be better balanced.

    Groups go to nodes by load, copies to the experts with the heaviest copy, copies to GPUs by longest processing
    time. From there, a copy on the hottest GPU changes places with another, or a slot goes from one expert to
    another, as long as that helps; then after small random changes, always the same ones. The work is limited by a
    count, not by time, so results repeat exactly.

    Parameters
    ----------
    weight : (num_layers, num_experts)
        Load of each expert, for example tokens; whatever `numpy.asarray` takes, such as a tensor on the CPU.
    num_replicas : int
        Slots over all GPUs.
    num_groups : int
        Gate groups of consecutive experts.
    num_nodes, num_gpus : int
        Nodes, and GPUs over all nodes.

    Returns
    -------
    phy2log : (num_layers, num_replicas) int64
        Expert of each slot; slot p is on GPU ``p // (num_replicas / num_gpus)`` and node
        ``p // (num_replicas / num_nodes)``.
    log2phy : (num_layers, num_experts, X) int64
        Slots of each expert in ascending order, then -1; X is the largest number of copies.
    logcnt : (num_layers, num_experts) int64
        Copies of each expert.

    Raises
    ------
    InvalidInput
        When loads are not numbers from 0, counts do not divide, there are fewer slots than experts, or a GPU has more
        slots than there are experts to put on it.

    Examples
    --------
    >>> phy2log, log2phy, logcnt = rebalance_experts([[90, 10, 10, 10]], 6, num_groups=1, num_nodes=1, num_gpus=2)
    >>> phy2log.tolist(), logcnt.tolist()
    ([[0, 2, 1, 0, 3, 1]], [[2, 2, 1, 1]])
    """
    from placer.search.replication import rebalanced

    table = _loads(weight)
    num_experts = table.shape[1]
    replicas, groups, nodes, gpus = _counts(num_experts, num_replicas, num_groups, num_nodes, num_gpus)
    single = table.astype(np.float32)
    phy2log = rebalanced(
        table,
        table.reshape(len(table), groups, -1).sum(axis=2),
        single,
        single.reshape(len(table), groups, -1).sum(axis=2),
        replicas,
        nodes,
        gpus,
        max(LEAST_LOOKS, LOOKS * replicas),
        np.random.default_rng(0).random(4093),  # a prime: kicks take draws in fours, and wrap around
    )
    return phy2log, *_inverse(phy2log, num_experts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Optimum:
    """What `best` found, in exact numbers.

    Parameters
    ----------
    slots : (num_gpus * slots_per_gpu,) int64
        Expert of each slot.
    peak : Fraction
        Load of the hottest GPU.
    bound : Fraction
        No map has a hottest GPU below it.
    """

    slots: Ids
    peak: Fraction
    bound: Fraction

    @property
    def proved(self) -> bool:
        """Whether nothing is better."""
        return self.bound == self.peak


def best(load: npt.ArrayLike, num_gpus: int, slots_per_gpu: int, *, seconds: float = 60.0) -> Optimum:
    """The lightest hottest GPU of one layer on one node, proved by CP-SAT where time allows.

    Every slot holds an expert, no GPU holds one twice, and copies share the load evenly. Shares are whole multiples of
    one over the least common multiple of all counts of copies, so the arithmetic is exact. For up to a few tens of
    slots.

    Parameters
    ----------
    load : (num_experts,) int
        Load of each expert.
    num_gpus, slots_per_gpu : int
    seconds : float
        Wall time at most; whether a proof ends in it depends on the machine.

    Raises
    ------
    InvalidInput
        When loads are not whole numbers from 0, the slots do not fit the experts, or numbers become too large.

    Examples
    --------
    >>> found = best([6, 5, 4], num_gpus=2, slots_per_gpu=2)
    >>> found.slots.tolist(), found.peak, found.proved
    ([0, 2, 0, 1], Fraction(8, 1), True)
    """
    from ortools.sat.python import cp_model

    row = np.asarray(load)
    if row.ndim != 1 or row.dtype.kind not in "iu":
        raise InvalidInput(
            f"load: found {row.dtype} of shape {row.shape}, expected (num_experts,) whole numbers"
        )
    start = rebalance_experts(row[None], num_gpus * slots_per_gpu, 1, 1, num_gpus)[0][0]
    loads: list[int] = row.tolist()
    most = min(num_gpus, len(start) - len(loads) + 1)
    grain = math.lcm(*range(1, most + 1))
    if sum(loads) * grain >= 2**53:
        raise InvalidInput(f"load: found a sum of {sum(loads)}, expected less than {2**53 // grain}")
    known = hottest(start, loads, num_gpus)

    model = cp_model.CpModel()
    hint = np.zeros((len(loads), num_gpus), np.int64)
    hint[start, np.arange(len(start)) // slots_per_gpu] = 1
    least = -(-sum(loads) * grain // num_gpus)
    peak = model.new_int_var(least, int(known * grain), "")
    model.add_hint(peak, int(known * grain))
    held: list[list[Any]] = [[] for _ in range(num_gpus)]
    heat: list[Any] = [0] * num_gpus
    for expert, weight in enumerate(loads):
        chosen = []
        for copies in range(1, most + 1):
            picked = model.new_bool_var("")
            model.add_hint(picked, bool(hint[expert].sum() == copies))
            chosen.append(picked)
            here = [model.new_bool_var("") for _ in range(num_gpus)]
            model.add(sum(here) == copies * picked)
            for gpu, there in enumerate(here):
                model.add_implication(there, picked)
                model.add_hint(there, bool(hint[expert].sum() == copies and hint[expert, gpu]))
                held[gpu].append(there)
                heat[gpu] += weight * grain // copies * there
        model.add_exactly_one(chosen)
    for gpu in range(num_gpus):
        model.add(sum(held[gpu]) == slots_per_gpu)
        model.add(heat[gpu] <= peak)
    model.minimize(peak)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.catch_sigint_signal = False  # Ctrl-C belongs to the caller
    solver.parameters.random_seed = 0
    solver.parameters.max_time_in_seconds = seconds
    status = solver.solve(model)
    slots = start
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        rows = [[solver.boolean_value(there) for there in row] for row in held]
        slots = np.nonzero(rows)[1] // most
    reached = hottest(slots, loads, num_gpus)
    bound = Fraction(max(least, round(solver.best_objective_bound)), grain)
    slots.setflags(write=False)
    return Optimum(slots=slots, peak=reached, bound=bound)


def hottest(slots: Ids, load: npt.ArrayLike, num_gpus: int) -> Fraction:
    """Exact load of the hottest GPU of a map, where copies share the load evenly; loads are whole numbers.

    Examples
    --------
    >>> hottest(np.array([0, 1, 0, 2]), [7, 1, 2], num_gpus=2)
    Fraction(11, 2)
    """
    share = [
        Fraction(int(tokens), int(max(1, copies)))
        for tokens, copies in zip(
            np.asarray(load), np.bincount(slots, minlength=len(np.asarray(load))), strict=True
        )
    ]
    return max(sum((share[e] for e in gpu), Fraction(0)) for gpu in slots.reshape(num_gpus, -1).tolist())


def policy(
    num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[int, int]:
    """Groups and nodes that EPLB goes by: those given, where nodes divide groups, and otherwise one of each.

    Raises
    ------
    InvalidInput
        When counts do not divide or there are fewer replicas than experts.

    Examples
    --------
    >>> policy(12, 16, num_groups=4, num_nodes=2, num_gpus=8), policy(12, 16, num_groups=3, num_nodes=2, num_gpus=8)
    ((4, 2), (1, 1))
    """
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    for what, whole, by, part in (
        ("experts", num_experts, "groups", num_groups),
        ("GPUs", num_gpus, "nodes", num_nodes),
        ("replicas", num_replicas, "GPUs", num_gpus),
    ):
        if whole % part:
            raise InvalidInput(f"{what}: found {whole}, expected a multiple of the {part} {by}")
    if num_replicas < num_experts:
        raise InvalidInput(f"replicas: found {num_replicas}, expected at least the {num_experts} experts")
    return num_groups, num_nodes


def _loads(weight: npt.ArrayLike) -> npt.NDArray[np.float64]:
    try:
        table = np.ascontiguousarray(np.asarray(weight), np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"weight: found {type(weight).__name__}, expected numbers that numpy reads"
        ) from error
    if np.ndim(weight) != 2 or table.size == 0:
        raise InvalidInput(f"weight: found shape {np.shape(weight)}, expected (num_layers, num_experts)")
    wrong = np.argwhere(~((table >= 0) & (table < LARGEST / table.shape[1])))
    if len(wrong):
        layer, expert = wrong[0].tolist()
        raise InvalidInput(
            f"weight: found {table[layer, expert]:g} in layer {layer}, expert {expert}; "
            f"expected finite loads from 0 to {LARGEST / table.shape[1]:.2g}"
        )
    return table


def _counts(
    num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[int, int, int, int]:
    """Replicas, groups, nodes and GPUs of the policy in force."""
    given = {"replicas": num_replicas, "groups": num_groups, "nodes": num_nodes, "GPUs": num_gpus}
    for what, count in given.items():
        try:
            given[what] = index(count)
        except TypeError as error:
            raise InvalidInput(f"{what}: found {count!r}, expected a whole number") from error
        if given[what] < 1:
            raise InvalidInput(f"{what}: found {count}, expected at least 1")
    replicas, groups, nodes, gpus = given.values()
    groups, nodes = policy(num_experts, replicas, groups, nodes, gpus)
    if replicas // gpus > num_experts // nodes:
        raise InvalidInput(
            f"replicas: found {replicas}, {replicas // gpus} a GPU, "
            f"expected at most the {num_experts // nodes} experts of a node on a GPU"
        )
    return replicas, groups, nodes, gpus


def _inverse(phy2log: Ids, num_experts: int) -> tuple[Ids, Ids]:
    """Slots of each expert, padded with -1, and how many they are."""
    layers = np.arange(len(phy2log))[:, None]
    count = np.zeros((len(phy2log), num_experts), np.int64)
    np.add.at(count, (layers, phy2log), 1)
    order = np.argsort(phy2log, axis=1, kind="stable")
    expert = np.take_along_axis(phy2log, order, axis=1)
    first = np.cumsum(count, axis=1) - count
    slots = np.full((*count.shape, count.max()), -1, np.int64)
    slots[layers, expert, np.arange(phy2log.shape[1]) - np.take_along_axis(first, expert, axis=1)] = order
    return slots, count
