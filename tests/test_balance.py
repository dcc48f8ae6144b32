"""Load balance, and the caps that follow from it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer import caps
from placer.clock import Clock
from placer.errors import InvalidInput
from placer.layer import Layer
from placer.problem import Problem
from placer.result import Budget
from placer.search.balance import balanced
from placer.solution import solve, with_margin
from placer.solvers import refine
from placer.topology import Topology
from placer.trace import Trace

H100 = Topology.load("dgx-h100")

# (positions, positions per unit of each level, inside out)
SHAPES = ((6, (3,)), (8, (2,)), (12, (1,)), (16, (2, 4)), (16, (2, 4, 8)), (12, (3, 3, 6)), (9, (3,)))


@st.composite
def loads(draw: st.DrawFn) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    positions, sizes = draw(st.sampled_from(SHAPES))
    tokens = st.integers(0, 9) | st.integers(0, 1000) | st.just(0)
    load = draw(st.lists(tokens, min_size=positions, max_size=positions))
    return np.array(load, np.float64), np.array(sizes, np.int64)


def unit_loads(load: np.ndarray[Any, Any], occupant: np.ndarray[Any, Any], size: int) -> list[float]:
    units = load[occupant].reshape(-1, size).tolist()
    return [sum(unit) for unit in units]


def peaks(load: np.ndarray[Any, Any], occupant: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]) -> float:
    """Sum over levels of the busiest unit's load over mean."""
    total = float(load.sum()) / len(load)
    return float(sum(max(unit_loads(load, occupant, size)) / (total * size) for size in sizes.tolist()))


def longest_first(load: np.ndarray[Any, Any], size: int) -> list[float]:
    """Unit loads of plain LPT: the next heaviest expert to the lightest unit with room."""
    units: list[list[float]] = [[] for _ in range(len(load) // size)]
    for tokens in sorted(load.tolist(), reverse=True):
        min((unit for unit in units if len(unit) < size), key=sum).append(tokens)
    return [sum(unit) for unit in units]


@settings(max_examples=60, deadline=None)
@given(case=loads())
def test_every_expert_stands_once_so_every_unit_is_full(case: tuple[Any, Any]) -> None:
    load, sizes = case
    occupant = balanced(load, sizes)
    assert occupant.dtype == np.int32
    assert sorted(occupant.tolist()) == list(range(len(load)))
    assert np.array_equal(balanced(load, sizes), occupant)


@settings(max_examples=100, deadline=None)
@given(case=loads())
def test_at_one_level_it_is_never_worse_than_longest_first(case: tuple[Any, Any]) -> None:
    load, sizes = case
    size = int(sizes[0])
    found = unit_loads(load, balanced(load, sizes[:1]), size)
    plain = longest_first(load, size)
    assert max(found) <= max(plain)
    assert sum(heat**2 for heat in found) <= sum(heat**2 for heat in plain) + 1e-6


@settings(max_examples=60, deadline=None)
@given(case=loads())
def test_no_swap_makes_the_busiest_units_lighter(case: tuple[Any, Any]) -> None:
    load, sizes = case
    if not load.any():
        return
    occupant = balanced(load, sizes)
    found = peaks(load, occupant, sizes)
    for i in range(len(load)):
        for j in range(i):
            other = occupant.copy()
            other[[i, j]] = other[[j, i]]
            assert peaks(load, other, sizes) >= found - 1e-9


def test_uneven_loads_are_balanced_at_all_levels_together() -> None:
    rng = np.random.default_rng(0)
    for sizes in ((4,), (4, 8), (4, 8, 16)):
        load = rng.integers(50, 250, 32).astype(np.float64)
        occupant = balanced(load, np.array(sizes))
        for size in sizes[1:]:
            heat = unit_loads(load, occupant, size)
            assert max(heat) < 1.05 * sum(heat) / len(heat)
        assert max(unit_loads(load, occupant, 4)) <= 1.02 * max(longest_first(load, 4))


def test_an_optimum_that_longest_first_misses_is_found() -> None:
    load = np.array([7.0, 6.0, 5.0, 4.0, 4.0, 4.0])  # 7 + 4 + 4 and 6 + 5 + 4
    assert unit_loads(load, balanced(load, np.array([3])), 3) == [15.0, 15.0]


def test_no_load_at_all_is_spread_all_the_same() -> None:
    assert sorted(balanced(np.zeros(8), np.array([2, 4])).tolist()) == list(range(8))


# -- caps -------------------------------------------------------------------------------------------------------


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    shape = draw(
        st.sampled_from([(1, 1, 1), (1, 1, 4), (1, 4, 1), (1, 2, 2), (2, 2, 2), (2, 1, 3), (4, 1, 1)])
    )
    ranks = math.prod(shape)
    per_rank = draw(st.integers(1, 3))
    num_experts = draw(st.integers(max(per_rank, ranks * per_rank - 3), ranks * per_rank))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    skew = rng.random(num_experts) * draw(st.sampled_from([0.0, 1.0, 3.0]))
    top_k = draw(st.integers(1, min(3, num_experts)))
    tokens = draw(st.integers(1, 40))
    ids = np.argsort(rng.random((tokens, num_experts)) - skew, axis=1)[:, None, :top_k].astype(np.int16)
    if draw(st.booleans()):
        ids[rng.random(ids.shape) < 0.5] = -1
    margin: float = draw(st.sampled_from([0.0, 0.02, -1.0]))
    problem = Problem.from_trace(
        Trace(topk_idx=ids, num_experts=num_experts, sequence=rng.integers(0, 5, tokens)),
        H100.with_shape(shape),
        slots_per_gpu=per_rank,
        max_load=draw(st.sampled_from([1.0, 1.05, 1.5, None])),
        load_margin="auto" if margin < 0 else margin,
    )
    return problem.layer(0)


@settings(max_examples=60, deadline=None)
@given(layer=layers())
def test_the_reference_meets_all_caps_together(layer: Layer) -> None:
    assert layer.excess(layer.reference) == 0.0
    assert layer.score(layer.slots(layer.reference))[0] == 0.0


@settings(max_examples=60, deadline=None)
@given(layer=layers())
def test_a_cap_is_what_was_asked_or_what_the_reference_needs(layer: Layer) -> None:
    factor = layer.cap_factor
    for slots, cap in zip(layer.unit_slots, layer.caps.tolist(), strict=True):
        heat = unit_loads(layer.expert_load, layer.reference, slots)
        if factor is None or slots == layer.num_slots:
            assert cap == math.inf
        else:
            assert cap == pytest.approx(max(factor * sum(heat) / len(heat), max(heat)))


@settings(max_examples=40, deadline=None)
@given(layer=layers())
def test_raised_names_the_levels_at_which_the_reference_exceeds_what_was_asked(layer: Layer) -> None:
    rows = caps.raised(layer)
    expected = {}
    for level, slots in enumerate(layer.unit_slots):
        heat = unit_loads(layer.expert_load, layer.reference, slots)
        if layer.max_load is not None and slots < layer.num_slots and any(heat):
            ratio = max(heat) * len(heat) / sum(heat)
            if ratio > layer.max_load + 1e-9:
                expected[level] = ratio
    assert {row["level"]: row["cap"] for row in rows} == pytest.approx(expected)
    assert all(row["layer"] == layer.index and row["asked"] == layer.max_load for row in rows)


def hot_expert() -> Layer:
    """Four GPUs on two servers, one expert each; expert 0 takes half of the load."""
    ids = np.array([[0], [0], [0], [0], [1], [2], [3], [3]])[:, None, :]
    trace = Trace(topk_idx=ids, num_experts=4, sequence=np.arange(8))
    return Problem.from_trace(trace, H100.with_shape("1x2x2"), load_margin=0.0).layer(0)


def test_one_expert_a_gpu_raises_the_gpu_cap_to_the_hottest_expert() -> None:
    layer = hot_expert()
    assert layer.caps.tolist() == [4.0, 5.0, math.inf]
    rows = [
        {"layer": 0, "level": 0, "asked": 1.05, "cap": 2.0},
        {"layer": 0, "level": 1, "asked": 1.05, "cap": 1.25},
    ]
    assert caps.raised(layer) == rows


def test_without_a_cap_or_without_load_nothing_is_raised() -> None:
    assert caps.raised(replace(hot_expert(), max_load=None)) == []
    idle = Trace(topk_idx=np.full((3, 1, 1), -1), num_experts=4)
    layer = Problem.from_trace(idle, H100.with_shape("1x2x2"), load_margin=0.0).layer(0)
    assert caps.raised(layer) == []
    assert layer.excess(layer.reference) == 0.0


def test_what_a_margin_costs_is_not_reported_as_raised() -> None:
    trace = Trace(topk_idx=np.arange(4)[:, None, None], num_experts=4)
    problem = Problem.from_trace(trace, H100.with_shape("1x2x1"), max_load=1.05, load_margin=0.5)
    layer = problem.layer(0)
    assert layer.cap_factor == pytest.approx(0.55)
    assert layer.caps.tolist() == [2.0, 2.0, math.inf]
    assert caps.raised(layer) == []


# -- the margin -------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(layer=layers())
def test_an_overshoot_is_finite_and_always_the_same(layer: Layer) -> None:
    over = caps.overshoot(layer, 1.05)
    assert math.isfinite(over)
    assert caps.overshoot(layer, 1.05) == over


def test_without_two_tokens_there_is_no_overshoot() -> None:
    layer = hot_expert()
    assert caps.overshoot(replace(layer, topk=None, key=None), 1.0) == 0.0
    assert caps.overshoot(replace(layer, topk=layer.tokens[:1], key=np.zeros(1, np.uint64)), 1.0) == 0.0


def uniform(tokens: int, layers: int = 1, **options: Any) -> Problem:
    """Uniform routing on four servers of four experts, every token a sequence."""
    ids = np.argsort(np.random.default_rng(4).random((tokens, layers, 16)), axis=2)[:, :, :2]
    trace = Trace(topk_idx=ids, num_experts=16, sequence=np.arange(tokens))
    return Problem.from_trace(trace, H100.with_shape("1x4x1"), **options)


def test_more_tokens_overshoot_less() -> None:
    few, many = (caps.overshoot(uniform(tokens).layer(0), 1.0) for tokens in (100, 10_000))
    assert 0.0 < many < few / 2


def test_the_overshoot_that_is_foretold_comes_about() -> None:
    """Fitted to half of the tokens, scored on the other half, mean over layers: an independent way to it."""
    whole = uniform(2_000, layers=12, max_load=1.02, load_margin=0.0)
    foretold = np.mean([caps.overshoot(whole.layer(i), 1.02) for i in range(12)]) * math.sqrt(2)
    seen = []
    for index in range(12):
        fit, unseen = whole.layer(index).split()
        found = refine.place(fit, rng=np.random.default_rng(0), clock=Clock.start()).slots
        seen.append(unseen.unit_load(fit.occupant(found), 4).max() / unseen.load.sum() * 4 - 1.02)
    assert np.mean(seen) == pytest.approx(foretold, abs=0.03)


def test_a_margin_leaves_the_tolerance_and_is_made_twice() -> None:
    asked = []

    def mean_overshoot(factor: float) -> float:
        asked.append(factor)
        return 0.04

    assert caps.margin(1.05, mean_overshoot) == pytest.approx(0.04 - caps.TOLERANCE)
    assert asked == pytest.approx([1.05, 1.05 - 0.04 + caps.TOLERANCE])
    assert caps.margin(1.05, lambda factor: 0.0) == 0.0
    assert caps.margin(1.05, lambda factor: 0.5) == pytest.approx(0.025)


def test_one_margin_for_all_layers_is_settled_once() -> None:
    problem = uniform(300, layers=3, max_load=1.02)
    settled = with_margin(problem, jobs=2)
    assert settled.load_margin == with_margin(problem, jobs=1).load_margin > 0.0
    assert with_margin(settled) is settled
    assert (
        solve(problem, "tabu", budget=Budget(rounds=0)).placement.provenance["load_margin"]
        == settled.load_margin
    )
    assert with_margin(problem, clock=Clock.start(seconds=0)).load_margin == 0.0
    assert with_margin(uniform(300, max_load=None)).load_margin == 0.0


def test_a_split_needs_the_tokens() -> None:
    with pytest.raises(InvalidInput, match="counts only"):
        replace(hot_expert(), topk=None).split()
