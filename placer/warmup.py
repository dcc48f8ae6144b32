"""Warm-up: what is compiled on first use runs on something small, so that compilation is not on the clock."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np

from placer.clock import Clock
from placer.problem import Problem
from placer.rules import Rules
from placer.solvers import Method
from placer.steadiness import steadied
from placer.tables import judged


def compile_search(
    chosen: Method, problem: Problem, stop: threading.Event | None = None, *, steady: bool = False
) -> None:
    """Run the method on a toy layer with as many levels as the problem has, and what else is compiled for it."""
    levels = len(problem.topology.levels)
    experts = 2 ** (levels + 1)
    tokens = np.stack([np.arange(experts), np.arange(experts) ^ 1], axis=1)
    spare = problem.num_slots > problem.num_experts
    toy = replace(
        problem.layer(0),
        num_experts=experts,
        num_ranks=experts // 2,
        slots_per_rank=3 if spare else 2,
        unit_ranks=tuple(2**level for level in range(levels)),
        server_ranks=2,
        load=np.full(experts, 2, np.int64),
        activations=None,
        pair_counts=None,
        topk=None if problem.routes is None else tokens.astype(problem.layer(0).tokens.dtype),
        key=None if problem.routes is None else np.arange(experts, dtype=np.uint64),
        step=np.arange(experts) // 2 if steady else None,
        speeds=tuple(1.0 + rank % 2 for rank in range(experts // 2)) if problem.topology.speeds else (),
        num_groups=1,
        copies="copies" in chosen.handles,
        rules=None
        if problem.constraints is None
        else _toy_rules(experts * (3 if spare else 2) // 2, experts),
    )
    placed = chosen.place(toy, rng=np.random.default_rng(0), clock=Clock.start(rounds=1, stop=stop))
    judged(toy, placed.slots, placed.table)
    if steady:
        steadied(toy, placed.slots)


def _toy_rules(positions: int, experts: int) -> Rules:
    """The first two experts apart, and the first one on the last rank."""
    low, high = np.zeros(positions, np.int32), np.full(positions, positions, np.int32)
    shut = np.zeros(positions, bool)
    low[0], high[0] = positions - positions * 2 // experts, positions
    apart = (((0, 1), positions * 2 // experts),)
    start = np.roll(np.arange(positions, dtype=np.int32), -1)
    return Rules(num_experts=experts, low=low, high=high, shut=shut, apart=apart, start=start)


def compile_bounds() -> None:
    """Run the compiled parts of bounds on something small."""
    from placer.bounds import Partition
    from placer.bounds.columns import prove

    pairs = np.stack([np.arange(24), (np.arange(24) + 1) % 24], axis=1).astype(np.int16)
    partition = Partition(
        num_items=24, units=6, size=4, sets=pairs, count=np.ones(24, np.int64), load=np.full(24, 2)
    )
    prove(partition, np.arange(24) // 4, clock=Clock.start(seconds=5))
