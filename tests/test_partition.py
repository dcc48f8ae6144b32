"""Graph and hypergraph partitioners as methods; each test is skipped where its package is missing."""

from __future__ import annotations

import os
import sys
import threading
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer import Problem, Topology, Trace, compare, hierarchy
from placer.clock import Clock
from placer.errors import InvalidInput
from placer.layer import Layer
from placer.solvers import kahip, metis, mtkahypar, names
from placer.solvers import method as load_method
from tests.instances import noisy_trace, problem
from tests.oracle import optimum

PACKAGES = {metis: "pymetis", kahip: "kahip", mtkahypar: "mtkahypar"}


@pytest.fixture(params=PACKAGES, ids=lambda module: module.__name__.rpartition(".")[2])
def method(request: pytest.FixtureRequest) -> ModuleType:
    pytest.importorskip(PACKAGES[request.param])
    module: ModuleType = request.param
    return module


def placed(method: Any, layer: Layer, seed: int = 0, clock: Clock | None = None) -> np.ndarray:
    slots: np.ndarray = method.place(layer, rng=np.random.default_rng(seed), clock=clock or Clock()).slots
    assert slots.dtype == np.int32
    return slots


def layer_of(tokens: object, num_experts: int, shape: str, redundant: int = 0) -> Layer:
    trace = Trace(topk_idx=np.array(tokens)[:, None], num_experts=num_experts)
    machine = Topology.load("dgx-h100").with_shape(shape)
    return Problem.from_trace(trace, machine, redundant=redundant, max_load=None).layer(0)


def planted(blocks: list[list[int]], times: int = 20) -> np.ndarray:
    """Tokens that each use two experts of one block."""
    return np.array([[e, f] for block in blocks for e in block for f in block if e < f] * times)


def units(slots: np.ndarray, size: int) -> set[frozenset[int]]:
    return {frozenset(row[row >= 0].tolist()) for row in slots.reshape(-1, size)}


# -- what all three do -----------------------------------------------------------------------------------


def test_planted_blocks_are_found_at_every_level(method: ModuleType) -> None:
    order = np.random.default_rng(3).permutation(32)
    inner, outer, widest = (order.reshape(n, -1).tolist() for n in (8, 4, 2))
    tokens = np.concatenate([planted(inner, 160), planted(outer, 60), planted(widest)])
    slots = placed(method, layer_of(tokens, 32, "2x2x2"))
    for size, blocks in ((4, inner), (8, outer), (16, widest)):
        assert units(slots, size) == {frozenset(block) for block in blocks}


def test_small_layers_come_close_to_the_optimum(method: ModuleType) -> None:
    layer = problem(noisy_trace(num_experts=12, tokens=300), "1x3x1").layer(0)
    slots = placed(method, layer)
    sets, count = layer.distinct
    unit = np.where(sets >= 0, layer.positions(layer.occupant(slots))[sets] // 4, -1)
    touched = sum(int(n) * len(set(row) - {-1}) for n, row in zip(count, unit.tolist(), strict=True))
    least = optimum(layer.tokens, 12, 3)
    assert least <= touched <= 1.08 * least


def test_empty_slots_are_spread_evenly(method: ModuleType) -> None:
    tokens = np.random.default_rng(0).random((300, 12)).argsort(axis=1)[:, :3]
    slots = placed(method, layer_of(tokens, 12, "2x2x1", redundant=4))
    assert (slots >= 0).reshape(4, 4).sum(axis=1).tolist() == [3, 3, 3, 3]
    assert (slots.reshape(4, 4)[:, 3] == -1).all()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ["metis", "kahip", "mtkahypar"])
def test_every_expert_has_one_slot_whatever_the_sizes(name: str, data: st.DataObject) -> None:
    module: Any = load_method(name)
    pytest.importorskip(PACKAGES[module])
    shape = [data.draw(st.integers(1, 3)) for _ in range(3)]
    slots_per_rank = data.draw(st.integers(1, 3))
    slots_in_all = int(np.prod(shape)) * slots_per_rank
    num_experts = data.draw(st.integers(slots_per_rank, slots_in_all))
    top_k = data.draw(st.integers(1, min(3, num_experts)))
    used = data.draw(st.integers(top_k, num_experts))  # experts beyond have no load
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    tokens = rng.random((data.draw(st.integers(1, 30)), used)).argsort(axis=1)[:, :top_k]
    layer = layer_of(tokens, num_experts, "x".join(map(str, shape)), slots_in_all - num_experts)
    slots = placed(module, layer)
    assert sorted(slots[slots >= 0].tolist()) == list(range(num_experts))
    ends = (slots >= 0).reshape(layer.num_ranks, -1)
    assert (ends[:, :-1] >= ends[:, 1:]).all()


def test_tokens_that_use_no_experts_are_placed_too(method: ModuleType) -> None:
    slots = placed(method, layer_of([[-1, -1]] * 4, 8, "1x2x2"))
    assert sorted(slots.tolist()) == list(range(8))


def test_the_seed_alone_decides_on_any_thread(method: ModuleType) -> None:
    layer = problem(noisy_trace(num_experts=32), "1x4x2").layer(0)
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(placed(method, layer, 7).tobytes())) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [*found, placed(method, layer, 7).tobytes()] == [found[0]] * 3


def test_nothing_is_printed(method: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    placed(method, problem(noisy_trace(), "2x2x2").layer(0))
    placed(method, layer_of([[0], [1]], 7, "1x5x1", redundant=3))  # no pair at all
    placed(method, layer_of([[0, 1], [1, 2]], 7, "1x5x1", redundant=3))
    assert tuple(capfd.readouterr()) == ("", "")


def test_the_process_may_still_use_all_its_cores(method: ModuleType) -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this platform does not tell which cores a process may use")
    before = os.sched_getaffinity(0)
    placed(method, problem(noisy_trace(), "2x2x2").layer(0))
    assert os.sched_getaffinity(0) == before


def test_an_expired_clock_gives_contiguous_experts(method: ModuleType) -> None:
    layer = problem(noisy_trace(), "1x4x2").layer(0)
    slots = placed(method, layer, clock=Clock.start(seconds=0))
    assert slots.tolist() == list(range(16))


def test_counts_beyond_int32_are_scaled_down(method: ModuleType) -> None:
    layer = problem(noisy_trace(), "1x4x2").layer(0)
    slots = placed(method, layer)
    sets, count = layer.distinct
    vars(layer)["distinct"] = sets, count * 2**36  # where the cached property keeps its value
    vars(layer)["pairs"] = layer.pairs * 2**36
    heavy = placed(method, layer)
    assert layer.score(heavy)[1] == pytest.approx(layer.score(slots)[1], rel=0.02)


# -- the levels and the last moves -------------------------------------------------------------------------


def test_a_mapping_finds_groups_within_groups() -> None:
    pytest.importorskip("mtkahypar")
    order = np.random.default_rng(5).permutation(16)
    inner, outer = order.reshape(8, 2).tolist(), order.reshape(4, 4).tolist()
    layer = layer_of(np.concatenate([planted(inner, 60), planted(outer, 20)]), 16, "1x4x2")
    slots = mtkahypar.mapped(layer, seed=0)
    assert units(slots, 2) == {frozenset(block) for block in inner}
    assert units(slots, 4) == {frozenset(block) for block in outer}


def test_distances_between_units_add_up_their_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = problem(noisy_trace(num_experts=16), "2x2x2").layer(0)
    seen: list[np.ndarray] = []

    def partition(nets: Any, count: Any, vertices: int, groups: int, seed: int, distance: Any) -> np.ndarray:
        seen.append(distance)
        return np.arange(vertices) * groups // vertices

    monkeypatch.setattr(mtkahypar, "_partition", partition)
    assert mtkahypar.mapped(layer, seed=0).tolist() == list(range(16))
    gpu, server, rack = layer.weights_of_levels
    expected = [0, gpu, gpu + server, gpu + server, *[gpu + server + rack] * 4]
    np.testing.assert_allclose(seen[0][0] / 1000, expected, atol=2e-3)
    assert (seen[0] == seen[0].T).all()


@pytest.mark.parametrize(("units", "calls"), [(4, 0), (8, 1)])
def test_only_small_targets_are_mapped(monkeypatch: pytest.MonkeyPatch, units: int, calls: int) -> None:
    pytest.importorskip("mtkahypar")
    layer = problem(noisy_trace(), "1x4x2").layer(0)
    met: list[int] = []
    monkeypatch.setattr(mtkahypar, "MAPPED_UNITS", units)
    monkeypatch.setattr(mtkahypar, "mapped", lambda layer, seed: met.append(seed) or layer.linear())
    placed(mtkahypar, layer)
    assert len(met) == calls


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_groups_are_evened_by_as_few_moves_as_possible(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 5))
    members = data.draw(st.integers(groups, 20))
    sizes = np.full(groups, members // groups)
    sizes[: members % groups] += 1
    group = np.array(data.draw(st.lists(st.integers(0, groups - 1), min_size=members, max_size=members)))
    pairs = np.random.default_rng(members).integers(0, 50, (members, members))
    pairs = np.triu(pairs, 1) + np.triu(pairs, 1).T
    before = group.copy()
    evened = hierarchy.evened(group, sizes, pairs)
    held = np.bincount(before, minlength=groups)
    assert sorted(np.bincount(evened, minlength=groups)) == sorted(sizes)
    assert (group == before).all()
    fewest = np.abs(np.sort(held) - np.sort(sizes)).sum() // 2
    assert (evened != before).sum() == fewest


def test_the_expert_that_moves_is_the_one_with_least_to_lose() -> None:
    pairs = np.zeros((5, 5), np.int64)
    for e, f, weight in [(0, 1, 9), (0, 2, 5), (1, 2, 5), (2, 4, 4), (1, 3, 8)]:
        pairs[e, f] = pairs[f, e] = weight
    # Of 0, 1, 2, 3 with losses 14, 22, 10 - 4, 8 the third goes to the group of 4.
    assert hierarchy.evened(np.array([0, 0, 0, 0, 1]), np.array([3, 2]), pairs).tolist() == [0, 0, 1, 0, 1]


# -- without the packages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metis", "kahip", "mtkahypar"])
def test_a_missing_package_is_said_in_one_line_when_the_method_is_used(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_method(name)
    package = PACKAGES[module]  # type: ignore[index]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InvalidInput) as caught:
        module.place(problem(noisy_trace(), "1x4x1").layer(0), rng=np.random.default_rng(0), clock=Clock())
    assert str(caught.value) == f"method {name} needs the package {package}: pip install 'placer[partition]'"


def test_missing_packages_neither_hide_methods_nor_end_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in PACKAGES.values():
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("placer.comparison.names", lambda: ["greedy", "kahip", "metis", "mtkahypar"])
    assert {"kahip", "metis", "mtkahypar"} <= set(names())
    found = compare(noisy_trace(), Topology.load("dgx-h100").with_shape("1x4x1"))
    assert [row.method for row in found.rows] == ["linear", "greedy"]
    assert [note.partition(":")[0] for note in found.notes] == [
        f"{name} left out" for name in ("kahip", "metis", "mtkahypar")
    ]
    with pytest.raises(InvalidInput, match=r"placer.partition"):
        compare(noisy_trace(), Topology.load("dgx-h100").with_shape("1x4x1"), ["metis"])


def test_listing_methods_imports_no_partitioner() -> None:
    import subprocess

    code = "from placer.solvers import method, names; [method(n) for n in names()]; import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(loaded.split()).isdisjoint(PACKAGES.values())
