"""Traffic matrices: the bytes that every rank sends to every other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placer import Placement, Topology, Trace
from placer.errors import InvalidInput

Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.int64]

LOCAL = 10.0  # how much more goes to a near rank than to a far one
HOT = 5.0  # how much more goes to the hot rank


def patterns(topology: Topology, rng: np.random.Generator) -> dict[str, Floats]:
    """Six ways to share out traffic, as weights of each pair of ranks, (P, P).

    ``server_local`` and ``rack_local`` send ten times as much to each rank of the own server or rack as to any
    other; ``uniform`` the same to all; ``pareto`` draws each pair from a Pareto law of exponent 1.5; ``incast``
    goes to every GPU of the first server, from all ranks outside; ``hot_rank`` sends one rank five times as much.

    Examples
    --------
    >>> topology = Topology.load("dgx-h100").with_shape("1x2x1")
    >>> patterns(topology, np.random.default_rng(0))["incast"].tolist()
    [[0.0, 0.0], [1.0, 0.0]]
    """
    racks, servers, gpus = topology.shape
    ranks = racks * servers * gpus
    rank = np.arange(ranks)
    server, rack = rank // gpus, rank // (gpus * servers)
    every = np.where(np.eye(ranks, dtype=bool), 0.0, 1.0)
    hot = np.where(rank == ranks // 2 + 1, HOT, 1.0)
    return {
        "server_local": every * np.where(server[:, None] == server, LOCAL, 1.0),
        "rack_local": every * np.where(rack[:, None] == rack, LOCAL, 1.0),
        "uniform": every,
        "pareto": every * (1.0 + rng.pareto(1.5, size=(ranks, ranks))),
        "incast": every * (server[:, None] > 0) * (server == 0),
        "hot_rank": every * hot,
    }


def vectors(placement: Placement, trace: Trace, home: npt.NDArray[np.int32]) -> Floats:
    """Vectors from each rank to each other in one step of all layers, one for each GPU that a token touches.

    Parameters
    ----------
    placement : Placement
        Of the trace's layers, without copies.
    trace : Trace
    home : (num_tokens,) int32
        The rank on which each token lives.

    Returns
    -------
    (P, P) float64
        Zero diagonal.

    Examples
    --------
    >>> trace = Trace(topk_idx=np.array([[[0, 1]], [[2, 3]]]), num_experts=4)
    >>> placement = Placement(physical_to_logical=np.arange(4)[None], num_experts=4, shape=(1, 2, 1))
    >>> vectors(placement, trace, np.array([1, 1], np.int32)).tolist()
    [[0.0, 0.0], [1.0, 0.0]]
    """
    if (placement.replica_count > 1).any():
        raise InvalidInput("placement: found copies of an expert, expected one slot for each")
    ranks = placement.num_ranks
    moved = np.zeros((ranks, ranks))
    for layer in range(placement.num_layers):
        slots = placement.physical_to_logical[layer]
        held = np.flatnonzero(slots >= 0)
        rank_of = np.full(placement.num_experts + 1, ranks)  # the last is id -1, no expert, on no rank
        rank_of[slots[held]] = held // placement.slots_per_rank
        ids = trace.topk_idx[:, layer].astype(np.int64)
        touched = np.zeros((trace.num_tokens, ranks + 1))
        np.put_along_axis(touched, rank_of[ids], 1.0, axis=1)
        for rank in range(ranks):
            moved[rank] += touched[home == rank, :ranks].sum(axis=0)
    np.fill_diagonal(moved, 0.0)
    return moved


def scaled(weights: Floats, total: float) -> Bytes:
    """Whole bytes that add up to `total`, in proportion to the weights to within a byte.

    Raises
    ------
    InvalidInput
        When all weights are 0.

    Examples
    --------
    >>> scaled(np.array([[0.0, 1.0], [2.0, 0.0]]), 100).tolist()
    [[0, 33], [67, 0]]
    """
    if not weights.any():
        raise InvalidInput("traffic matrix: found no traffic, expected some between two ranks")
    ends = np.rint(np.cumsum(weights) * (total / weights.sum())).astype(np.int64)
    parts: Bytes = np.diff(ends, prepend=0)
    return parts.reshape(weights.shape)
