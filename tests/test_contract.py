"""What every method promises; new methods are picked up from the folder."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

import placer
from placer import Budget, Placement, Problem, solve
from placer.layer import Layer
from placer.solvers import method, names
from tests.instances import noisy_trace, problem

PACKAGES = {"metis": "pymetis", "kahip": "kahip", "mtkahypar": "mtkahypar"}  # of the extra `partition`


def runnable(name: str) -> Any:
    """A method as a parameter, skipped where its package is missing."""
    package = PACKAGES.get(name, "placer")
    missing = pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")
    return pytest.param(name, marks=missing)


METHODS = [runnable(name) for name in names()]
SEARCHING = [runnable(name) for name in names() if "routes" in method(name).needs or name == "auto"]
CAPPED = [runnable(name) for name in names() if "caps" in method(name).handles]


def quality(posed: Problem, placement: Placement) -> tuple[float, float]:
    """Excess over the caps and cost, summed over layers."""
    scores = [posed.layer(i).score(row) for i, row in enumerate(placement.physical_to_logical)]
    return sum(s[0] for s in scores), sum(s[1] for s in scores)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("1x4x1", {}),
        ("2x2x2", {"max_load": 1.1}),
        ("1x1x1", {}),
        ("1x8x2", {"max_load": 1.05}),
        ("1x3x1", {"redundant": 2}),
        ("1x2x2", {"redundant": 4, "replica_choice": "spread"}),
    ],
)
def test_every_method_places_every_expert(name: str, shape: str, options: dict[str, object]) -> None:
    posed = problem(noisy_trace(), shape, **options)
    result = solve(posed, name, budget=Budget(seconds=20, rounds=2))
    placement = result.placement
    assert placement.num_layers == posed.num_layers
    assert placement.shape == posed.topology.shape
    assert (placement.replica_count >= 1).all()
    assert not placement.duplicates()
    if "copies" not in method(name).handles:
        assert (placement.replica_count == 1).all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("shape", "slots", "rule"),
    [("1x4x2", 3, "nearest"), ("1x3x1", 7, "cover"), ("2x2x1", 6, "table"), ("1x4x1", 16, "cover")],
)
def test_methods_make_copies_or_leave_spare_slots_empty(name: str, shape: str, slots: int, rule: str) -> None:
    posed = problem(noisy_trace(tokens=300), shape, slots_per_gpu=slots, replica_choice=rule)
    placement = solve(posed, name, budget=Budget(seconds=None, rounds=1)).placement
    for row in placement.physical_to_logical:
        held = row[row >= 0]
        assert set(held.tolist()) == set(range(16))
        assert (len(held) > 16) == ("copies" in method(name).handles)
        for rank in row.reshape(-1, slots).tolist():
            experts = [e for e in rank if e >= 0]
            assert len(set(experts)) == len(experts)
            assert rank == [*experts, *[-1] * (slots - len(experts))]
    assert (placement.table is None) == (rule != "table" or "copies" not in method(name).handles)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_placement_for_any_number_of_jobs(name: str) -> None:
    posed = problem(noisy_trace(layers=3), "2x2x2", max_load=1.2, load_margin="auto")
    placements = [
        solve(posed, name, budget=Budget(seconds=None, rounds=2), seed=5, jobs=jobs).placement
        for jobs in (1, 2, 2)
    ]
    assert len({placement.digest for placement in placements}) == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_zero_budget_still_gives_a_placement(name: str) -> None:
    posed = problem(noisy_trace(), "1x4x2", max_load=1.1)
    result = solve(posed, name, budget=Budget(seconds=0))
    assert (result.placement.replica_count == 1).all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("seconds", [0, 20])
def test_the_result_is_never_worse_than_the_initial_placement(name: str, seconds: float) -> None:
    posed = problem(noisy_trace(), "1x4x1", max_load=1.2)
    initial = solve(posed, "tabu", budget=Budget(seconds=20, rounds=1)).placement
    result = solve(posed, name, budget=Budget(seconds=seconds, rounds=1), initial=initial)
    assert quality(posed, result.placement) <= quality(posed, initial)


@pytest.mark.parametrize("name", METHODS)
def test_the_problem_is_left_as_it_was(name: str) -> None:
    posed = problem(noisy_trace(), "1x4x1", max_load=1.1)
    before = (posed.traffic.load.copy(), posed.traffic.pairs.copy(), posed.routes.topk_idx.copy())
    solve(posed, name, budget=Budget(seconds=10, rounds=1))
    after = (posed.traffic.load, posed.traffic.pairs, posed.routes.topk_idx)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", CAPPED)
@pytest.mark.parametrize("shape", ["1x4x1", "2x2x2", "1x2x4"])
def test_methods_that_handle_caps_keep_them_at_every_level(name: str, shape: str) -> None:
    posed = problem(noisy_trace(tokens=900), shape, max_load=1.1)
    result = solve(posed, name, budget=Budget(seconds=20, rounds=2))
    assert quality(posed, result.placement)[0] == 0


@pytest.mark.parametrize("name", SEARCHING)
def test_searching_methods_beat_contiguous_experts_where_there_is_structure(name: str) -> None:
    posed = problem(noisy_trace(tokens=900), "1x4x1")
    linear = solve(posed, "linear").objective
    assert solve(posed, name, budget=Budget(seconds=20, rounds=2)).objective < 0.97 * linear


@pytest.mark.parametrize("name", names())
def test_every_method_says_what_it_needs_and_handles(name: str) -> None:
    module = method(name)
    assert module.needs <= {"load", "pairs", "routes"}
    assert module.handles <= {"caps", "copies", "levels", "pins"}
    assert module.__doc__
    assert module.place.__doc__


def test_a_method_that_claims_a_wrong_cost_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    posed = problem(noisy_trace(), "1x4x1")
    honest = Layer.cost
    monkeypatch.setattr(Layer, "cost", lambda layer, occupant: 0.9 * honest(layer, occupant))
    with pytest.raises(placer.PlacerError, match="claims"):
        solve(posed, "tabu", budget=Budget(seconds=10, rounds=1))
