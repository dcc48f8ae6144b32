"""Uniform routing: what a token touches when every choice that the router allows is equally likely.

No trace is needed, and the expectations are exact: they are ratios of counts of routings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from math import comb, isfinite
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from placer.errors import InvalidInput
from placer.flows import Counts

if TYPE_CHECKING:
    from placer.model import Model
    from placer.topology import Topology


def untouched(
    held: Sequence[int], *, experts_per_group: int, num_groups: int = 1, topk_groups: int = 1, top_k: int
) -> float:
    """Chance that a token uses none of the experts of a unit.

    The router picks `topk_groups` of `num_groups` groups uniformly, then `top_k` experts of these uniformly
    (DeepSeek-V3, arXiv:2412.19437, section 2.1.2); with one group it picks among all experts.

    Parameters
    ----------
    held : sequence of int
        Experts of each group that the unit holds.
    experts_per_group : int
    num_groups, topk_groups : int
        Groups of the router and how many of them a token may use.
    top_k : int
        Experts of a token.

    Raises
    ------
    InvalidInput
        When a group holds other than 0 to `experts_per_group` of the unit's experts, or the router cannot
        pick what it is asked for.

    Examples
    --------
    One server of 8 holds 32 of 256 experts, a token uses 8: of 8 servers it touches

    >>> round(8 * (1 - untouched([32], experts_per_group=256, top_k=8)), 3)
    5.295

    and at most the 4 whose groups it may use, where each server holds one group:

    >>> one = [32, 0, 0, 0, 0, 0, 0, 0]
    >>> round(8 * (1 - untouched(one, experts_per_group=32, num_groups=8, topk_groups=4, top_k=8)), 3)
    3.629
    """
    if not 1 <= topk_groups <= num_groups:
        raise InvalidInput(
            f"topk_groups: found {topk_groups} of {num_groups} groups, expected 1 to all of them"
        )
    if not 1 <= top_k <= topk_groups * experts_per_group:
        raise InvalidInput(
            f"top_k: found {top_k}, expected 1 to {topk_groups * experts_per_group}, "
            f"the experts of {topk_groups} groups of {experts_per_group}"
        )
    if len(held) != num_groups or not all(0 <= count <= experts_per_group for count in held):
        raise InvalidInput(
            f"held: found {list(held)}, expected {num_groups} counts from 0 to {experts_per_group}"
        )
    return _untouched(tuple(sorted(map(int, held))), experts_per_group, topk_groups, top_k)


@lru_cache(maxsize=4096)  # units of a machine differ in few ways only
def _untouched(held: tuple[int, ...], size: int, topk_groups: int, top_k: int) -> float:
    # ways[n][m]: choices of n groups that hold m of the unit's experts; the product of (1 + y x^held) over groups.
    ways = [Counter({0: 1}), *(Counter[int]() for _ in range(topk_groups))]
    for count in held:
        for chosen in range(topk_groups, 0, -1):
            for total, number in ways[chosen - 1].items():
                ways[chosen][total + count] += number
    allowed = topk_groups * size
    missed = sum(number * comb(allowed - total, top_k) for total, number in ways[topk_groups].items())
    return missed / (comb(len(held), topk_groups) * comb(allowed, top_k))


def uniform_counts(model: Model, topology: Topology, tokens: float) -> Counts:
    """Expected counts of one layer with contiguous experts under uniform routing.

    Parameters
    ----------
    model : Model
        Its experts, choices of a token, and groups.
    topology : Topology
        Experts are spread over its GPUs as the method ``linear`` does: in order, one more on each of the first
        GPUs where they do not divide.
    tokens : float
        Tokens of all GPUs together.

    Raises
    ------
    InvalidInput
        When the model's experts or choices are unknown or do not fit its groups, or `tokens` is negative.

    Examples
    --------
    >>> from placer import Model, Topology
    >>> counts = uniform_counts(Model.named("mixtral-8x7b"), Topology.load("dgx-h100").with_shape("1x2x4"), 14.0)
    >>> counts.touched[1].tolist()  # 2 servers: a token misses one of them in 6 of 28 routings
    [11.0, 11.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    >>> counts.load.tolist()
    [3.5, 3.5, 3.5, 3.5, 3.5, 3.5, 3.5, 3.5]
    """
    experts, top_k = (_known(model, key) for key in ("num_experts", "top_k"))
    if experts % model.num_groups:
        raise InvalidInput(
            f"model {model.name}: found {model.num_groups} groups, expected a divisor of {experts} experts"
        )
    if not (isfinite(tokens) and tokens >= 0):
        raise InvalidInput(f"tokens: found {tokens}, expected 0 or more")
    held = held_experts(experts, topology.num_ranks)
    ends = np.concatenate([[0], np.cumsum(held)])
    group = np.arange(model.num_groups + 1) * (experts // model.num_groups)
    touched = np.zeros((len(topology.levels), topology.num_ranks))
    for row, size in zip(touched, topology.unit_sizes, strict=True):
        edges = ends[::size, None]
        # Experts of each group that a unit holds: where two ranges of experts overlap.
        common = np.minimum(edges[1:], group[1:]) - np.maximum(edges[:-1], group[:-1])
        for unit, counts in enumerate(np.maximum(common, 0).tolist()):
            row[unit] = 1.0 - untouched(
                counts,
                experts_per_group=experts // model.num_groups,
                num_groups=model.num_groups,
                topk_groups=model.topk_groups,
                top_k=top_k,
            )
    return Counts(
        tokens=tokens, touched=touched * tokens, load=held.astype(np.float64) * (tokens * top_k / experts)
    )


def held_experts(num_experts: int, num_ranks: int) -> npt.NDArray[np.int64]:
    """Experts on each rank when they are spread in order and evenly, the first ranks taking those left over.

    Examples
    --------
    >>> held_experts(8, 3).tolist()
    [3, 3, 2]
    """
    return num_experts // num_ranks + (np.arange(num_ranks) < num_experts % num_ranks)


def _known(model: Model, key: str) -> int:
    value: int | None = getattr(model, key)
    if value is None:
        raise InvalidInput(f"model {model.name}: {key} is unknown, expected a number for uniform routing")
    return value


def node_limited_vectors(tokens: float, limit: int, servers: int) -> float:
    """Vectors that leave a server, at most, when the router lets a token use `limit` of `servers` servers.

    Each server that it uses is the token's own with chance 1 / `servers`, so ``tokens * limit * (servers - 1) /
    servers``: node-limited routing of DeepSeek-V3 (arXiv:2412.19437, section 2.1.2; at most 4 servers), with one
    vector for each token and server. A token whose experts happen to fill fewer servers sends less.

    Examples
    --------
    >>> node_limited_vectors(4096, 4, 32)
    15872.0
    """
    if servers < 1 or not 0 <= limit <= servers:
        raise InvalidInput(f"server limit: found {limit} of {servers} servers, expected 0 to all of them")
    return tokens * limit * (servers - 1) / servers
