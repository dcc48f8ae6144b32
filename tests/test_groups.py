"""Placements that keep gate groups whole."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import noisy_trace

from placer import Budget, Problem, Topology, Trace, solve
from placer.errors import InvalidInput
from placer.groups import group_sets, in_whole_groups
from placer.permutation import Permutation


def gated(seed: int, *, groups: int = 4, width: int = 4, tokens: int = 300, layers: int = 1) -> Trace:
    """Tokens that choose two groups, some pairs of groups far more often than others, and an expert or two in each."""
    rng = np.random.default_rng(seed)
    ids = np.empty((tokens, layers, 3), np.int64)
    for layer in range(layers):
        liking = rng.permutation(groups)
        for token in range(tokens):
            first = rng.integers(groups)
            mate = liking[(np.flatnonzero(liking == first)[0] + 1) % groups]
            second = mate if rng.random() < 0.7 else rng.choice(np.delete(np.arange(groups), first))
            chosen = rng.choice(width, 2, replace=False) + first * width
            ids[token, layer] = [*chosen, second * width + rng.integers(width)]
    return Trace(topk_idx=ids, num_experts=groups * width, num_groups=groups, topk_groups=2)


def problem(trace: Trace, shape: str, **limits: object) -> Problem:
    machine = Topology.load("dgx-h100-superpod").with_shape(shape)
    return Problem.from_trace(trace, machine, **{"max_load": None, "whole_groups": True, **limits})  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999))
def test_group_sets_are_the_groups_of_every_token(seed: int) -> None:
    trace = gated(seed, tokens=60)
    sets, count = group_sets(problem(trace, "1x2x1").layer(0))
    found = sorted(
        tuple(row[row >= 0].tolist()) for row, n in zip(sets, count, strict=True) for _ in range(n)
    )
    assert found == sorted(tuple(sorted({e // 4 for e in row})) for row in trace.topk_idx[:, 0].tolist())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), shape=st.sampled_from(["1x2x2", "2x2x1", "1x4x2", "2x4x2", "1x2x8"]))
def test_solve_keeps_groups_whole_and_orders_them_best(seed: int, shape: str) -> None:
    posed = problem(gated(seed), shape)
    result = solve(posed, "auto", budget=Budget(seconds=None, rounds=2))
    Permutation.from_placement(result.placement).check_groups(4)
    layer = posed.layer(0)
    wide = [level for level, slots in enumerate(layer.unit_slots) if slots % 4 == 0]

    def cost(order: tuple[int, ...]) -> float:
        """On the levels whose units hold whole groups, where nothing else counts."""
        slots = np.concatenate([np.arange(group * 4, group * 4 + 4) for group in order]).astype(np.int32)
        return float(layer.counts(slots).remote[wide].sum(axis=1) @ np.array(layer.seconds)[wide])

    found = tuple(result.placement.physical_to_logical[0].reshape(4, 4)[:, 0] // 4)
    assert cost(found) <= min(map(cost, itertools.permutations(range(4)))) * (1 + 1e-12)


def test_experts_move_inside_their_group_where_servers_are_smaller() -> None:
    posed = problem(gated(1, groups=2, width=8, tokens=600), "1x4x1")
    solved = solve(posed, "auto", budget=Budget(seconds=None, rounds=2))
    layer = posed.layer(0)
    slots = solved.placement.physical_to_logical[0]
    assert layer.score(slots)[1] < layer.score(layer.slots(layer.linear()))[1]
    assert [set(row // 8) for row in slots.reshape(2, 8)] in ([{0}, {1}], [{1}, {0}])


def test_caps_hold_with_whole_groups() -> None:
    posed = problem(gated(3), "1x4x4", max_load=1.3, load_margin=0.0)
    layer = posed.layer(0)
    slots = solve(posed, "auto", budget=Budget(seconds=None, rounds=2)).placement.physical_to_logical[0]
    assert layer.score(slots)[0] == 0


@pytest.mark.parametrize(
    ("trace", "limits", "said"),
    [
        (noisy_trace(), {}, "found a trace without gate groups"),
        (gated(0), {"slots_per_gpu": 5}, "found 4 spare slots"),
    ],
)
def test_what_cannot_keep_groups_is_refused(trace: Trace, limits: dict[str, int], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        problem(trace, "1x4x1", **limits)


def test_methods_that_know_no_ranges_are_refused() -> None:
    with pytest.raises(InvalidInput, match="keeps no gate groups whole"):
        solve(problem(gated(0), "1x4x1"), "eplb")


def test_the_same_rules_every_time() -> None:
    layer = problem(gated(5), "2x2x1").layer(0)
    assert layer.rules is not None
    assert (in_whole_groups(replace(layer, rules=None)).low == layer.rules.low).all()
