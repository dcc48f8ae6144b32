"""Census: one pass over a trace that counts everything the evaluator prices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from placer import flows
from placer.errors import InvalidInput
from placer.flows import Counts, Floats, Flows
from placer.incidence import Targets, add_flows, loads, targets
from placer.placement import Placement
from placer.topology import Topology
from placer.trace import Trace

CHUNK_BYTES = 16_000_000  # of expert ids read at once: what memory holds, however long the trace


@dataclass(frozen=True, kw_only=True, eq=False)
class Census:
    """What one layer of a trace does under a placement.

    Parameters
    ----------
    tokens : (num_ranks,) float64
        Tokens at home on each rank.
    touched, remote, load : (num_levels, num_ranks) float64
        Tokens that touch each unit, those of them with another home, and expert choices served in it.
    experts : (num_experts,) float64
        Tokens that use each expert.
    by_choice, by_rank, by_unit : Flows
        Vectors of one phase when one is sent for each choice, for each touched rank, or for each touched unit at
        the home's rail and from there to each touched GPU.
    followed : tuple of Flows, optional
        Ways there and back when tokens stay with their heaviest expert; None unless asked for.
    """

    tokens: Floats
    touched: Floats
    remote: Floats
    load: Floats
    experts: Floats
    by_choice: Flows
    by_rank: Flows
    by_unit: Flows
    followed: tuple[Flows, Flows] | None = None


def expected(counts: Counts, experts: Floats, topology: Topology) -> Census:
    """The census that uniform homes and single copies make of mere counts.

    Parameters
    ----------
    counts : Counts
    experts : (num_experts,) float64
        Tokens that use each expert.
    topology : Topology
    """
    ranks, size = topology.num_ranks, np.array(topology.unit_sizes)
    load = np.zeros_like(counts.touched)
    for level, each in enumerate(size.tolist()):
        load[level, : ranks // each] = counts.load.reshape(-1, each).sum(axis=1)
    return Census(
        tokens=np.full(ranks, counts.tokens / ranks),
        touched=counts.touched,
        remote=counts.touched * (1.0 - size[:, None] / ranks),
        load=load,
        experts=experts,
        by_choice=flows.straight(counts.load, topology),
        by_rank=flows.straight(counts.touched[0], topology),
        by_unit=flows.relayed(counts.touched, topology),
    )


def census(
    placement: Placement,
    trace: Trace,
    topology: Topology,
    *,
    rule: str,
    homes: npt.NDArray[np.int32] | None = None,
    follow: bool = False,
) -> list[Census]:
    """Count all layers in one pass.

    Parameters
    ----------
    placement, trace, topology
        Which belong together, see `placer.evaluation.check_match`.
    rule : str
        Dispatch rule.
    homes : (num_tokens,) int32, optional
        Home of each token; without it homes are uniform and everything is an expectation over them.
    follow : bool
        Also count the ways of tokens that stay with their heaviest expert.

    Raises
    ------
    InvalidInput
        When the rule cannot be priced, or tokens should follow experts that have copies.
    """
    aimed = [
        targets(
            row,
            num_experts=placement.num_experts,
            num_ranks=placement.num_ranks,
            unit_ranks=topology.unit_sizes,
            server_ranks=flows.gpus(topology),
            rule=rule,
            table=None if placement.table is None else placement.table[layer],
        )
        for layer, row in enumerate(placement.physical_to_logical)
    ]
    if follow and any(each.rank_of is None for each in aimed):
        raise InvalidInput(
            "all-to-all follow: found experts with copies, expected one of each; copies cannot be followed"
        )
    tallies = [_Tally(each, topology, placement.num_experts, known=homes is not None) for each in aimed]
    bytes_of_token = trace.topk_idx.nbytes // max(1, trace.num_tokens)
    step = max(1, CHUNK_BYTES // max(1, bytes_of_token))
    with ThreadPoolExecutor() as pool:
        for start in range(0, trace.num_tokens, step):
            part = slice(start, start + step)
            ids = np.asarray(trace.topk_idx[part])
            at = np.zeros(0, np.int32) if homes is None else homes[part]
            list(pool.map(_Tally.add, tallies, ids.swapaxes(0, 1), repeat(at)))
            if follow:
                where = np.full(len(ids), -1, np.int32) if homes is None else at.copy()
                weights = None if trace.topk_weights is None else np.asarray(trace.topk_weights[part])
                for layer, tally in enumerate(tallies):
                    tally.follow(ids[:, layer], None if weights is None else weights[:, layer], where)
    if homes is None:
        at_home = np.full(placement.num_ranks, trace.num_tokens / placement.num_ranks)
    else:
        at_home = np.bincount(homes, minlength=placement.num_ranks).astype(np.float64)
    return [tally.census(at_home, follow) for tally in tallies]


class _Tally:
    """The counters of one layer."""

    def __init__(self, aimed: Targets, topology: Topology, num_experts: int, *, known: bool) -> None:
        self.aimed, self.topology = aimed, topology
        self.size = np.array(topology.unit_sizes, np.int64)
        self.server = topology.index("server")
        ranks, levels, width = topology.num_ranks, len(self.size), flows.gpus(topology)
        self.experts = np.zeros(num_experts, np.int64)
        self.simple = aimed.rank_of is not None and not known
        if aimed.rank_of is not None:
            self.units = (aimed.rank_of[None, :] // self.size[:, None]).astype(np.int32)
        self.touched: npt.NDArray[Any] = np.zeros((levels, ranks), np.int64 if self.simple else np.float64)
        self.remote, self.load = (np.zeros((levels, ranks)) for _ in range(2))
        self.ways = (np.zeros((3, ranks, width)), np.zeros((3, levels, ranks)), np.zeros((3, levels, ranks)))
        self.unknown = np.zeros(num_experts, np.int64)  # choices of followed tokens whose home is uniform yet
        self.followed = (
            np.zeros((2, ranks, width)),
            np.zeros((2, levels, ranks)),
            np.zeros((2, levels, ranks)),
        )

    def add(self, ids: npt.NDArray[np.integer], homes: npt.NDArray[np.int32]) -> None:
        from placer.search.counting import count_touched

        topk = np.ascontiguousarray(ids, dtype=np.int32)
        self.experts += np.bincount(topk[topk >= 0], minlength=len(self.experts))
        if self.simple:
            count_touched(topk, np.ones(len(topk), np.int64), self.units, self.touched)
            return
        each = np.ones(len(topk), np.int64)
        if not len(homes):  # tokens with the same experts count alike
            topk, each = np.unique(np.sort(topk, axis=1), axis=0, return_counts=True)
        counters = (self.touched, self.remote, self.load, *self.ways)
        add_flows(topk, each, homes, self.aimed, self.size, self.server, *counters)

    def follow(
        self,
        ids: npt.NDArray[np.integer],
        weights: npt.NDArray[np.floating] | None,
        homes: npt.NDArray[np.int32],
    ) -> None:
        from placer.search.counting import follow_experts

        topk = np.ascontiguousarray(ids, dtype=np.int32)
        lost = topk[homes < 0]
        self.unknown += np.bincount(lost[lost >= 0], minlength=len(self.unknown))
        heaviest = (
            np.zeros((0, 0), np.float32) if weights is None else np.ascontiguousarray(weights, np.float32)
        )
        follow_experts(topk, heaviest, homes, self.aimed.rank_of, self.size, self.server, *self.followed)

    def census(self, tokens: Floats, follow: bool) -> Census:
        experts = self.experts.astype(np.float64)
        ranks = self.topology.num_ranks
        if self.simple:
            load = loads(experts, self.units[:1], ranks)[0]
            counts = Counts(tokens=float(tokens.sum()), touched=self.touched.astype(np.float64), load=load)
            found = expected(counts, experts, self.topology)
        else:
            ways = [Flows.of_ports(*(array[way] for array in self.ways)) for way in range(3)]
            found = Census(
                tokens=tokens,
                touched=self.touched,
                remote=self.remote,
                load=self.load,
                experts=experts,
                by_choice=ways[0],
                by_rank=ways[1],
                by_unit=ways[2],
            )
        if not follow:
            return found
        there, back = (Flows.of_ports(*(array[way] for array in self.followed)) for way in range(2))
        start = loads(self.unknown.astype(np.float64), self.units[:1], ranks)[0]
        return replace(found, followed=(there + flows.straight(start, self.topology), back))
