"""Load-only copies and places, against brute force, a proof, and EPLB's published maps."""

from __future__ import annotations

from fractions import Fraction
from itertools import chain, combinations, combinations_with_replacement
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import InvalidInput
from placer.rebalance import Optimum, best, hottest, rebalance_experts
from placer.search.eplb import published
from placer.solvers import eplb

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Counts = tuple[int, int, int, int]  # replicas, groups, nodes, GPUs

# vllm-project/vllm, pull request 37656: 8 devices with two slots each
TOY = [600, 560, 120, 120, 20, 10, 10, 10]

# experts and counts; in the last three nodes do not divide groups
SHAPES: tuple[tuple[int, Counts], ...] = (
    (12, (16, 4, 2, 8)),
    (32, (40, 4, 2, 8)),
    (24, (24, 4, 2, 4)),
    (16, (16, 4, 4, 16)),
    (64, (80, 8, 4, 16)),
    (16, (24, 1, 1, 6)),
    (60, (64, 5, 3, 16)),
    (10, (12, 3, 2, 3)),
    (8, (16, 3, 2, 8)),
)


def brute(load: list[int], num_gpus: int, slots_per_gpu: int) -> Fraction:
    """Least load of the hottest GPU over all maps without an expert twice on a GPU."""
    contents = list(combinations(range(len(load)), slots_per_gpu))
    maps = (list(chain(*rows)) for rows in combinations_with_replacement(contents, num_gpus))
    return min(hottest(np.array(m), load, num_gpus) for m in maps if len(set(m)) == len(load))


def gpu_loads(phy2log: Ids, weight: Floats, num_gpus: int) -> Floats:
    """(layers, GPUs), copies sharing evenly."""
    rows = []
    for slots, load in zip(phy2log, weight, strict=True):
        share = load / np.bincount(slots, minlength=len(load))
        rows.append(share[slots].reshape(num_gpus, -1).sum(axis=1))
    return np.array(rows)


def duplicates(slots: Ids, num_gpus: int) -> int:
    return sum(len(gpu) - len(set(gpu)) for gpu in slots.reshape(num_gpus, -1).tolist())


def skewed(layers: int, experts: int, sigma: float = 1.0, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).lognormal(0, sigma, (layers, experts))


@st.composite
def tables(draw: st.DrawFn) -> tuple[Floats, Counts]:
    experts, counts = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    weight = rng.lognormal(0, draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])), (draw(st.integers(1, 3)), experts))
    weight[rng.random(weight.shape) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))] = 0
    if draw(st.booleans()):
        weight = np.round(10 * weight)
    return weight, counts


# -- the proved optimum ---------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_proved_optimum_is_that_of_brute_force(data: st.DataObject) -> None:
    experts, gpus, per_gpu = data.draw(
        st.sampled_from([(3, 2, 2), (4, 3, 2), (5, 3, 2), (5, 4, 2), (5, 2, 3), (6, 3, 3), (4, 4, 1)])
    )
    load = data.draw(st.lists(st.integers(0, 40), min_size=experts, max_size=experts))
    found = best(load, gpus, per_gpu)
    assert found.proved
    assert found.peak == brute(load, gpus, per_gpu) == hottest(found.slots, load, gpus)
    assert set(found.slots.tolist()) == set(range(experts))
    assert duplicates(found.slots, gpus) == 0


def test_the_published_toy_is_proved_and_found_without_a_proof() -> None:
    found = best(TOY, 8, 2)
    assert found.proved
    assert found.peak == found.bound == Fraction(590, 3)
    assert duplicates(found.slots, 8) == 0
    slots = rebalance_experts([TOY], 16, 1, 1, 8)[0][0]
    assert hottest(slots, TOY, 8) == Fraction(590, 3)
    assert hottest(eplb.rebalance([TOY], 16, 1, 1, 8)[0], TOY, 8) == 232


def test_out_of_time_the_bound_is_still_one() -> None:
    load = (1000 * skewed(1, 24)[0]).astype(np.int64)
    found = best(load, 8, 4, seconds=0.01)
    assert isinstance(found, Optimum)
    assert Fraction(int(load.sum()), 8) <= found.bound <= found.peak == hottest(found.slots, load, 8)


@pytest.mark.parametrize(
    ("load", "gpus", "message"),
    [
        ([1.5, 2.0], 2, r"load: found float64 of shape \(2,\), expected \(num_experts,\) whole numbers"),
        ([[1, 2]], 2, r"load: found int64 of shape \(1, 2\), expected \(num_experts,\) whole numbers"),
        ([1, 2, 3], 2, "replicas: found 2, expected at least the 3 experts"),
        ([2**52, 2**52], 2, "load: found a sum of 9007199254740992, expected less than 9007199254740992"),
    ],
)
def test_a_proof_refuses_what_is_not_exact(load: Any, gpus: int, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        best(load, gpus, 1)


# -- against EPLB ---------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(tables())
def test_the_answer_is_a_map_and_its_two_inverses(case: tuple[Floats, Counts]) -> None:
    weight, (replicas, groups, nodes, gpus) = case
    phy2log, log2phy, logcnt = answer = rebalance_experts(weight, replicas, groups, nodes, gpus)
    assert [a.dtype for a in answer] == [np.int64] * 3
    assert phy2log.shape == (len(weight), replicas)
    assert logcnt.shape == weight.shape
    assert log2phy.shape == (*weight.shape, logcnt.max())
    for layer, slots in enumerate(phy2log):
        assert duplicates(slots, gpus) == 0
        for expert in range(weight.shape[1]):
            places = np.flatnonzero(slots == expert).tolist()
            assert len(places) == logcnt[layer, expert] > 0
            assert log2phy[layer, expert].tolist() == places + [-1] * (logcnt.max() - len(places))
        if groups % nodes == 0:
            held = [set((node // (weight.shape[1] // groups)).tolist()) for node in slots.reshape(nodes, -1)]
            assert all(len(node) == groups // nodes for node in held)
    again = rebalance_experts(weight, replicas, groups, nodes, gpus)
    assert all(np.array_equal(a, b) for a, b in zip(answer, again, strict=True))


@settings(max_examples=200, deadline=None)
@given(tables())
def test_it_is_never_worse_than_a_published_map_whose_copies_do_not_meet(case: tuple[Floats, Counts]) -> None:
    weight, counts = case
    theirs = eplb.rebalance(weight, *counts)
    ours = gpu_loads(rebalance_experts(weight, *counts)[0], weight, counts[-1]).max(axis=1)
    for slots, peak, heat in zip(theirs, ours, gpu_loads(theirs, weight, counts[-1]), strict=True):
        if duplicates(slots, counts[-1]) == 0:
            assert peak <= heat.max() * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(tables())
def test_its_start_from_eplb_is_the_published_map(case: tuple[Floats, Counts]) -> None:
    weight, (replicas, groups, nodes, gpus) = case
    if groups % nodes:
        groups = nodes = 1
    single = weight.astype(np.float32)
    sums = single.reshape(len(single), groups, -1).sum(axis=2)
    theirs = eplb.rebalance(weight, replicas, groups, nodes, gpus)
    for layer, slots in enumerate(theirs):
        assert published(single[layer], sums[layer], replicas, nodes, gpus).tolist() == slots.tolist()


@pytest.mark.parametrize(
    "counts", [(288, 8, 4, 32), (288, 8, 8, 32), (288, 8, 32, 32), (288, 8, 18, 144), (320, 8, 8, 64)]
)
@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_at_sizes_in_use_it_is_never_worse_and_better_in_the_mean(counts: Counts, sigma: float) -> None:
    weight = skewed(8, 256, sigma, seed=1)
    theirs = gpu_loads(eplb.rebalance(weight, *counts), weight, counts[-1]).max(axis=1)
    phy2log = rebalance_experts(weight, *counts)[0]
    ours = gpu_loads(phy2log, weight, counts[-1]).max(axis=1)
    assert (ours <= theirs * (1 + 1e-9)).all()
    assert ours.mean() < theirs.mean() or counts[-1] == 144  # there the heaviest copy decides, for both
    assert sum(duplicates(slots, counts[-1]) for slots in phy2log) == 0


@pytest.mark.parametrize(
    ("experts", "gpus", "per_gpu"), [(3, 2, 2), (4, 3, 2), (5, 3, 2), (5, 2, 3), (5, 4, 2)]
)
def test_nearly_all_tiny_cases_are_solved_to_the_optimum(experts: int, gpus: int, per_gpu: int) -> None:
    """40 seeded loads of any size, 40 nearly equal ones, and those of one expert a little hotter than the others."""
    rng = np.random.default_rng(experts * gpus)
    loads = [*rng.integers(0, 41, (40, experts)), *rng.integers(8, 13, (40, experts))]
    loads += [np.array([x] * (experts - 1) + [x + 1]) for x in (2, 8, 20)]
    ratios = []
    for load in loads:
        slots = rebalance_experts([load], gpus * per_gpu, 1, 1, gpus)[0][0]
        ratios.append(hottest(slots, load.tolist(), gpus) / brute(load.tolist(), gpus, per_gpu))
    assert min(ratios) == 1
    assert sum(ratio > 1 for ratio in ratios) <= 4
    assert max(ratios) <= Fraction(12, 10)


def test_only_an_idle_slot_makes_the_published_map_better() -> None:
    load = [20, 15, 5]
    theirs = eplb.rebalance([load], 4, 1, 1, 2)[0]
    assert duplicates(theirs, 2) == 1
    ours = rebalance_experts([load], 4, 1, 1, 2)[0][0]
    assert hottest(theirs, load, 2) < hottest(ours, load, 2) == brute(load, 2, 2)


# -- what goes in ---------------------------------------------------------------------------------------


def test_a_tensor_on_the_cpu_is_read_through_its_array_protocol() -> None:
    class Tensor:
        def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
            return np.array([TOY], np.float32)

    given_list = rebalance_experts([TOY], 16, 1, 1, 8)
    given_tensor = rebalance_experts(Tensor(), 16, 1, 1, 8)
    assert all(np.array_equal(a, b) for a, b in zip(given_list, given_tensor, strict=True))


def test_a_layer_is_solved_as_it_is_alone_and_is_not_changed() -> None:
    weight = skewed(3, 64)
    before = weight.copy()
    together = rebalance_experts(weight, 80, 8, 4, 16)[0]
    assert np.array_equal(weight, before)
    for layer in range(3):
        assert np.array_equal(rebalance_experts(weight[[layer]], 80, 8, 4, 16)[0][0], together[layer])


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1e12, 1e30])
def test_loads_may_have_any_unit(scale: float) -> None:
    weight = skewed(2, 32)
    peak, scaled = (
        gpu_loads(rebalance_experts(w, 40, 4, 2, 8)[0], w, 8).max() / w.mean()
        for w in (weight, weight * scale)
    )
    assert scaled == pytest.approx(peak, rel=1e-3)


@pytest.mark.parametrize(
    ("weight", "counts", "message"),
    [
        (np.ones(12), (16, 4, 2, 8), "weight: found shape (12,), expected (num_layers, num_experts)"),
        (np.ones((0, 12)), (16, 4, 2, 8), "weight: found shape (0, 12), expected (num_layers, num_experts)"),
        (object(), (16, 4, 2, 8), "weight: found object, expected numbers that numpy reads"),
        (
            [[1.0, -2.0]],
            (2, 1, 1, 2),
            "weight: found -2 in layer 0, expert 1; expected finite loads from 0 to 5e+37",
        ),
        (
            [[np.nan, 2.0]],
            (2, 1, 1, 2),
            "weight: found nan in layer 0, expert 0; expected finite loads from 0 to 5e+37",
        ),
        (np.ones((1, 12)), (16, 5, 1, 8), "experts: found 12, expected a multiple of the 5 groups"),
        (np.ones((1, 12)), (16, 4, 2, 7), "GPUs: found 7, expected a multiple of the 2 nodes"),
        (np.ones((1, 12)), (15, 4, 2, 8), "replicas: found 15, expected a multiple of the 8 GPUs"),
        (np.ones((1, 12)), (8, 4, 2, 8), "replicas: found 8, expected at least the 12 experts"),
        (np.ones((1, 12)), (16, 4, 0, 8), "nodes: found 0, expected at least 1"),
        (np.ones((1, 12)), (16, 4, 2, 8.0), "GPUs: found 8.0, expected a whole number"),
        (
            np.ones((1, 4)),
            (12, 2, 2, 4),
            "replicas: found 12, 3 a GPU, expected at most the 2 experts of a node on a GPU",
        ),
    ],
)
def test_what_cannot_be_placed_is_refused_in_one_line(weight: Any, counts: Any, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        rebalance_experts(weight, *counts)
    assert str(caught.value) == message
