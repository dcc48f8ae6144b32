"""Experts dealt to the ranks like cards: minimises nothing, spreads neighbouring experts.

Idea: expert e lives on rank e mod R, vLLM's ``round_robin`` placement strategy. Neighbours in a gate group
then stand on different ranks, which evens out load when a router favours whole groups. Spare slots stay
empty.
Complexity O(slots). Wins on load when hot experts are neighbours; loses on traffic whenever the router keeps
a token's experts within gate groups, for it tears every group apart.

References: vLLM, ``--expert-placement-strategy``, https://docs.vllm.ai/en/latest/serving/expert_parallel_deployment.html
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.layer import Layer
from placer.solvers import Placed

needs = frozenset[str]()
handles = frozenset[str]()


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """Expert e on rank e mod R; R need not divide the number of experts."""
    expert = np.arange(layer.num_experts, dtype=np.int32)
    rows = np.full((layer.num_ranks, layer.slots_per_rank), -1, np.int32)
    rows[expert % layer.num_ranks, expert // layer.num_ranks] = expert
    return Placed(slots=rows.ravel())
