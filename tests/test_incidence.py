"""Counting by kinds of homes against counting home by home."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from placer.incidence import Targets, add_flows, incidence, targets

MACHINES = [((1, 1, 6), 1), ((1, 2, 6), 1), ((1, 4, 8), 1), ((1, 2, 4, 8), 1), ((1, 6, 6), 1)]


def counted(
    seed: int, machine: tuple[tuple[int, ...], int], rule: str, per_rank: int
) -> tuple[NDArray[np.int16], Targets, dict[str, Any]]:
    """Random tokens, where a random placement with copies and empty slots sends them, and on what machine."""
    rng = np.random.default_rng(seed)
    unit_ranks, server = machine
    ranks = unit_ranks[-1]
    slots = rng.integers(0, max(2, ranks * per_rank // 2), ranks * per_rank)
    slots = np.unique(slots, return_inverse=True)[1].astype(np.int32)  # every expert stands somewhere
    experts = int(slots.max()) + 1
    slots[(rng.random(len(slots)) < 0.2) & (np.bincount(slots)[slots] > 2)] = -1
    slots = slots if len(np.unique(slots[slots >= 0])) == experts else np.arange(len(slots), dtype=np.int32)
    experts = int(slots.max()) + 1
    servers = ranks // unit_ranks[server]
    table = np.array(
        [[rng.choice(np.flatnonzero(slots == e)) for e in range(experts)] for _ in range(servers)], np.int32
    )
    tokens = np.array([rng.permutation(max(experts, 3))[:3] for _ in range(40)]).astype(np.int16)
    tokens[(tokens >= experts) | (rng.random(tokens.shape) < 0.1)] = -1
    aimed = targets(
        slots,
        num_experts=experts,
        num_ranks=ranks,
        unit_ranks=unit_ranks,
        server_ranks=unit_ranks[server],
        rule=rule,
        table=table,
    )
    return tokens, aimed, {"num_ranks": ranks, "unit_ranks": unit_ranks, "server": server}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    machine=st.sampled_from(MACHINES),
    rule=st.sampled_from(["nearest", "spread", "table"]),
    per_rank=st.integers(1, 4),
)
def test_homes_that_are_counted_together_count_as_if_one_by_one(
    seed: int, machine: tuple[tuple[int, ...], int], rule: str, per_rank: int
) -> None:
    tokens, aimed, on = counted(seed, machine, rule, per_rank)
    found = incidence(tokens, aimed, **on)
    size = np.array(on["unit_ranks"], np.int64)
    levels, ranks = len(size), on["num_ranks"]
    if aimed.rank_of is not None:  # no copies: one row serves all homes
        assert found.load[0].sum() == pytest.approx((tokens >= 0).sum())
        return
    touched, remote, load = (np.zeros((levels, ranks)) for _ in range(3))
    ways = (np.zeros((3, ranks, size[on["server"]])), *(np.zeros((3, levels, ranks)) for _ in range(2)))
    ones, everywhere = np.ones(len(tokens), np.int64), np.zeros(0, np.int32)
    add_flows(tokens, ones, everywhere, aimed, size, on["server"], touched, remote, load, *ways)
    np.testing.assert_allclose(found.touched, touched, atol=1e-9)
    np.testing.assert_allclose(found.remote, remote, atol=1e-9)
    np.testing.assert_allclose(found.load, load, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    machine=st.sampled_from(MACHINES),
    rule=st.sampled_from(["nearest", "spread", "table", "cover"]),
    per_rank=st.integers(1, 4),
)
def test_a_set_that_stands_for_several_tokens_counts_as_often(
    seed: int, machine: tuple[tuple[int, ...], int], rule: str, per_rank: int
) -> None:
    tokens, aimed, on = counted(seed, machine, rule, per_rank)
    number = np.random.default_rng(seed).integers(1, 5, len(tokens))
    once, each = (
        incidence(tokens, aimed, weights=number, **on),
        incidence(tokens.repeat(number, 0), aimed, **on),
    )
    for name in ("touched", "remote", "load"):
        np.testing.assert_allclose(getattr(once, name), getattr(each, name), atol=1e-9)
