"""Seconds of one step: the busiest link of each phase, and the straggler's compute.

A phase (dispatch or combine of one layer) takes the largest latency of the levels it uses plus the largest
over links of bytes / effective bandwidth. Real transports take 0 to 27 % longer than that bound.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placer.model import Model
from placer.topology import Topology

Floats = npt.NDArray[np.float64]

#: Share of the peak rate that grouped expert GEMMs reach in BF16; 0.6 to 0.7 is typical.
GEMM_EFFICIENCY = 0.65


def phase_seconds(entering: Floats, vector_bytes: float, topology: Topology) -> float:
    """Seconds of one phase.

    Parameters
    ----------
    entering : (num_levels, num_ranks) float64
        Vectors that enter each unit over the links of its level, in one step.
    vector_bytes : float
        Bytes of one vector.
    topology : Topology
        A unit's links are one per GPU in it (rails), shared evenly.
    """
    slowest, latency = 0.0, 0.0
    for level, vectors, size in zip(topology.levels, entering, topology.unit_sizes, strict=True):
        busiest = float(vectors.max())
        if busiest > 0.0:
            latency = max(latency, level.latency)
            slowest = max(slowest, busiest * vector_bytes / (size * level.effective_bandwidth))
    return latency + slowest


def compute_seconds(
    load: Floats,
    experts_held: npt.NDArray[np.int64],
    topology: Topology,
    model: Model,
    expert_dtype: str | None = None,
) -> float:
    """Seconds of the slowest GPU's experts: its arithmetic or its weights read once, whichever is longer.

    Parameters
    ----------
    load : (num_ranks,) float64
        Expert choices served by each GPU in one step.
    experts_held : (num_ranks,) int64
        Experts of the layer on each GPU.
    expert_dtype : str, optional
        Storage of the weights; the model's own by default. Arithmetic is in BF16.
    """
    flops, size = model.flops_per_token_expert, model.expert_bytes(expert_dtype)
    if flops is None or size is None:
        return 0.0
    arithmetic = load * flops / (topology.flops_bf16 * GEMM_EFFICIENCY)
    weights = np.where(load > 0, experts_held, 0) * size / topology.hbm_bandwidth
    return float(np.maximum(arithmetic, weights).max())
