"""Measures: what a page shows of a placement on a trace beyond its report, unit by unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.alltoall import Scheme, scheme
from placer.census import Census, census
from placer.evaluation import TOKENS_PER_GPU
from placer.flows import Floats, gpus
from placer.homes import homes as homes_of
from placer.model import Model
from placer.placement import Placement
from placer.topology import Topology
from placer.trace import Trace

LARGEST_BY_RANK = 64  # ranks whose exchange is shown rank by rank; beyond, server by server
SAMPLED = 50_000  # tokens counted again for each source where homes are uniform and experts have copies
#: Schemes whose vectors land on the home's own rail, whoever needs them.
RAILED = frozenset({"hierarchical", "allgather"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Measures:
    """Load and traffic of single units in one step.

    Parameters
    ----------
    load : (num_layers, num_ranks) float64
        Choices served by each GPU over the mean of its layer.
    sent : tuple of (num_units,) float64, one for each level of the topology
        Bytes that leave each unit over the links of its level: dispatch and combine, all layers.
    busy : tuple of (num_units,) float64
        Seconds that these links take for them, on average over a unit's links.
    moved : (units, units) float64, optional
        Bytes of the dispatch from where tokens live (row) to where they land (column), rank by rank in machines of
        up to `LARGEST_BY_RANK`, else server by server: over NICs, and within the home's own server over the scale-up
        link. None where tokens do not start at home.
    moved_by : {"GPU", "server"}
        What a row of `moved` is.
    sampled : int
        Tokens of each row that `moved` was counted on; 0 where it is exact.
    """

    load: Floats
    sent: tuple[Floats, ...]
    busy: tuple[Floats, ...]
    moved: Floats | None
    moved_by: str
    sampled: int


def measure(
    placement: Placement, trace: Trace, topology: Topology, conditions: Mapping[str, Any]
) -> Measures:
    """Count a trace under a placement.

    Parameters
    ----------
    placement, trace, topology
        Which belong together.
    conditions : mapping
        The keyword arguments of `placer.evaluate`; those that it leaves out have the same defaults.

    Examples
    --------
    >>> trace = Trace(topk_idx=np.array([[[0, 1]], [[2, 3]]]), num_experts=4)
    >>> pairs = Placement(physical_to_logical=np.array([[0, 1, 2, 3]]), num_experts=4, shape=(1, 2, 1))
    >>> measure(pairs, trace, Topology.load("dgx-h100").with_shape("1x2x1"), {}).load.tolist()
    [[1.0, 1.0]]
    """
    priced = scheme(conditions.get("alltoall", "hierarchical"))
    model = conditions.get("model") or Model.for_trace_name(trace.model, trace.num_experts)
    rule = conditions.get("replica_choice") or placement.rule
    at = homes_of(trace, placement.num_ranks, conditions.get("homes", "uniform"), conditions.get("seed", 0))
    counted = census(placement, trace, topology, rule=rule, homes=at, follow=priced.name == "follow")
    scale = conditions.get("tokens_per_gpu", TOKENS_PER_GPU) * placement.num_ranks / trace.num_tokens
    load = np.stack([layer.load[0] for layer in counted])
    mean = load.mean(axis=1, keepdims=True)
    sent = _sent(counted, priced, topology, model, conditions)
    sent = [each * scale for each in sent]
    moved, sampled = None, 0
    unit = 1 if placement.num_ranks <= LARGEST_BY_RANK else gpus(topology)
    if priced.name != "follow":
        if at is None and not placement.has_copies:
            moved = _expected(counted, priced, topology)
        else:
            moved, sampled = _by_source(placement, trace, topology, priced, rule, at, unit)
        moved = _summed(moved, unit) * (scale * priced.dispatch_bytes(model))
        if unit == 1:
            np.fill_diagonal(moved, 0.0)  # what stays on its GPU crosses no link
    return Measures(
        load=np.divide(load, mean, out=np.ones_like(load), where=mean > 0),
        sent=tuple(sent),
        busy=tuple(
            each / (size * level.effective_bandwidth * _share(priced, topology, place))
            for place, (each, size, level) in enumerate(
                zip(sent, topology.unit_sizes, topology.levels, strict=True)
            )
        ),
        moved=moved,
        moved_by="GPU" if unit == 1 else "server",
        sampled=sampled,
    )


def met(placement: Placement, pairs: npt.NDArray[np.integer], topology: Topology) -> Floats:
    """Share of the pairs of experts chosen together that stand in one server, (num_layers,).

    Parameters
    ----------
    placement : Placement
        Without copies.
    pairs : (num_layers, num_experts, num_experts) int
        Tokens that use both experts.
    """
    per_server = placement.slots_per_rank * gpus(topology)
    server = placement.logical_to_physical[..., 0] // per_server
    together = server[:, :, None] == server[:, None, :]
    total = pairs.sum(axis=(1, 2))
    inside = np.where(together, pairs, 0).sum(axis=(1, 2))
    shares: Floats = np.divide(inside, total, out=np.ones(len(pairs)), where=total > 0)
    return shares


def _share(priced: Scheme, topology: Topology, level: int) -> float:
    return priced.nic if level >= topology.index("server") else priced.scale_up


def _sent(
    counted: list[Census], priced: Scheme, topology: Topology, model: Model, conditions: Mapping[str, Any]
) -> list[Floats]:
    """Bytes that leave each unit of each level, for the tokens counted."""
    passes = 2 if conditions.get("passes") == "training" else 1
    sent = [np.zeros(number) for number in topology.num_units]
    for layer in counted:
        ways = priced.exchange(layer, topology)
        if conditions.get("padded"):
            ways = ways[0].padded(topology), ways[1].padded(topology)
        for way, each in zip(ways, (priced.dispatch_bytes(model), priced.combine_bytes(model)), strict=True):
            for level, units in enumerate(sent):
                units += way.out[level].reshape(len(units), -1).sum(axis=1) * (each * passes)
    return sent


def _expected(counted: list[Census], priced: Scheme, topology: Topology) -> Floats:
    """Vectors from home to landing rank, (num_ranks, num_ranks), when all homes are alike."""
    ranks, width = topology.num_ranks, gpus(topology)
    servers, rank = ranks // width, np.arange(ranks)
    railed = priced.name in RAILED
    own = rank[:, None] // width == rank // width
    reached = ~own & (rank[:, None] % width == rank % width) if railed else ~own
    flows = [priced.exchange(layer, topology)[0] for layer in counted]
    landing: Floats = np.sum([way.into[topology.index("server")] for way in flows], axis=0)
    pairs: Floats = np.sum([way.pairs for way in flows], axis=0)
    across = np.where(reached, landing / max(1, servers - 1 if railed else ranks - width), 0.0)
    inside = pairs[:, rank % width] / (
        servers if railed else 1
    )  # of all homes' tokens that pass through the rank
    return np.where(own, inside, across)


def _by_source(
    placement: Placement,
    trace: Trace,
    topology: Topology,
    priced: Scheme,
    rule: str,
    homes: npt.NDArray[np.int32] | None,
    unit: int,
) -> tuple[Floats, int]:
    """The same, a row for each unit of so many ranks, by counting the tokens of each source by themselves."""
    ranks, width, server = topology.num_ranks, gpus(topology), topology.index("server")
    sources = ranks // unit
    sampled = min(trace.num_tokens, max(1, SAMPLED // sources)) if homes is None else 0
    some = np.linspace(0, trace.num_tokens, sampled, endpoint=False).astype(np.int64)
    moved = np.zeros((sources, ranks))
    for source in range(sources):
        if homes is None:
            part, factor = trace.select(some), trace.num_tokens / (sources * sampled)
            at = (source * unit + np.arange(sampled) % unit).astype(np.int32)
        else:
            here = homes // unit == source
            if not here.any():
                continue
            part, at, factor = trace.select(here), homes[here], 1.0
        first = source * unit // width * width
        own = slice(first, first + width)
        for layer in census(placement, part, topology, rule=rule, homes=at):
            there, _ = priced.exchange(layer, topology)
            moved[source] += there.into[server] * factor
            moved[source, own] += there.into[0][own] * factor
    return moved, sampled


def _summed(moved: Floats, unit: int) -> Floats:
    """Ranks put together into units, rows as far as they are not yet."""
    ranks = moved.shape[1]
    rows = moved.reshape(ranks // unit, -1, ranks).sum(axis=1)
    together: Floats = rows.reshape(len(rows), ranks // unit, unit).sum(axis=2)
    return together
