"""The best split of load over copies, against closed forms and a search over all sets of units."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import brute
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from test_links import Case, cases

from placer.cli import main
from placer.errors import InvalidInput
from placer.evaluation import evaluate
from placer.placement import Placement
from placer.split import best_split, least_load
from placer.topology import Topology
from placer.trace import Trace

H100 = Topology.load("dgx-h100")


def densest(slots: list[int], load: list[float], units: int) -> float:
    """The same by duality (Hall): some units must serve all experts that stand on no other, and share them evenly."""
    each = len(slots) // units
    where = [{slot // each for slot in range(len(slots)) if slots[slot] == e} for e in range(len(load))]
    return max(
        sum(heat for heat, held in zip(load, where, strict=True) if held <= set(chosen)) / size
        for size in range(1, units + 1)
        for chosen in combinations(range(units), size)
    )


@settings(max_examples=60, deadline=None)
@given(units=st.integers(1, 5), each=st.integers(1, 4), experts=st.integers(1, 8), seed=st.integers(0, 2**16))
def test_the_split_is_as_busy_as_the_densest_set_of_units(
    units: int, each: int, experts: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    slots = rng.integers(-1, experts, units * each)
    load = rng.integers(0, 20, experts) * np.isin(np.arange(experts), slots)
    found = least_load(slots, load, units)
    assert found == pytest.approx(densest(slots.tolist(), load.tolist(), units), rel=1e-9, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(slots=st.permutations(range(8)), load=st.lists(st.integers(0, 50), min_size=8, max_size=8))
def test_without_copies_it_is_the_busiest_unit(slots: list[int], load: list[int]) -> None:
    for units in (1, 2, 4, 8):
        heat = np.array(load)[slots].reshape(units, -1).sum(axis=1)
        assert least_load(np.array(slots), np.array(load), units) == heat.max()


@settings(max_examples=20, deadline=None)
@given(load=st.lists(st.floats(0, 1e9), min_size=3, max_size=3), units=st.integers(1, 6))
def test_with_every_expert_everywhere_it_is_the_mean(load: list[float], units: int) -> None:
    slots = np.tile(np.arange(3), units)
    assert least_load(slots, np.array(load), units) == pytest.approx(sum(load) / units, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(shared=st.floats(0, 100), left=st.floats(0, 100), right=st.floats(0, 100))
def test_two_units_that_share_an_expert_meet_in_the_middle_if_they_can(
    shared: float, left: float, right: float
) -> None:
    found = least_load(np.array([0, 1, 2, 0]), np.array([shared, left, right]), 2)
    assert found == pytest.approx(max(left, right, (shared + left + right) / 2), rel=1e-9, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(case=cases(copies=True), rule=st.sampled_from(["nearest", "spread", "cover"]))
def test_no_dispatch_rule_balances_better(case: Case, rule: str) -> None:
    report = evaluate(case.placement, case.trace, case.topology, replica_choice=rule, best_split=True)
    assert report.best_split is not None
    for level in brute.LEVELS:
        for key in ("max_over_mean", "worst_layer"):
            assert 1.0 - 1e-9 <= report.best_split[level][key] <= report.load[level][key] + 1e-9


def test_levels_are_split_each_on_its_own() -> None:
    """Expert 0 is shared 4 : 8 for even servers, 6 : 6 for the GPUs that hold it."""
    placement = Placement(
        physical_to_logical=np.array([[0, 1, 2, 3, 0, 1, 3, -1]]), num_experts=4, shape=(1, 2, 2)
    )
    found = best_split(placement, np.array([[12, 0, 4, 0]]))
    assert {level: row["max_over_mean"] for level, row in found.items()} == pytest.approx(
        {"gpu": 6 / 4, "server": 1.0, "rack": 1.0}
    )


def test_no_load_at_all_is_even() -> None:
    placement = Placement(physical_to_logical=np.array([[0, 0]]), num_experts=1, shape=(1, 2, 1))
    assert best_split(placement, np.zeros((1, 1)))["gpu"] == {"max_over_mean": 1.0, "worst_layer": 1.0}
    assert least_load(np.array([0, 0]), np.zeros(1), 2) == 0.0


@pytest.mark.parametrize(
    ("slots", "load", "units", "message"),
    [
        ([0, 1, 0], [1, 1], 2, "multiple of the 2 units"),
        ([0, 0], [1, 5], 2, "expert 1: found no slot"),
        ([0, 0], [-1], 2, "at least 0"),
        ([0, 0], [math.inf], 2, "at least 0"),
    ],
)
def test_what_cannot_be_split_is_refused(
    slots: list[int], load: list[float], units: int, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        least_load(np.array(slots), np.array(load), units)


def test_a_load_of_other_experts_is_refused() -> None:
    placement = Placement(physical_to_logical=np.array([[0, 0]]), num_experts=1, shape=(1, 2, 1))
    with pytest.raises(InvalidInput, match=r"found shape \(1, 2\), expected \(1, 1\)"):
        best_split(placement, np.ones((1, 2)))


# -- in the evaluator --------------------------------------------------------------------------------------------


def heated() -> tuple[Placement, Trace]:
    """Expert 0, used by all, at both ends: from home it stays there, so the second GPU also serves expert 1."""
    placement = Placement(physical_to_logical=np.array([[0, -1, 0, 1]]), num_experts=2, shape=(1, 2, 1))
    return placement, Trace(topk_idx=np.array([[[0, 1]], [[0, -1]], [[0, -1]]]), num_experts=2)


def test_the_best_split_is_reported_when_asked_for() -> None:
    placement, trace = heated()
    told: dict[bool, Any] = {
        asked: evaluate(placement, trace, H100.with_shape("1x2x1"), best_split=asked)
        for asked in (False, True)
    }
    assert told[True].load["gpu"]["max_over_mean"] == pytest.approx(2.5 / 2)
    assert told[True].to_dict()["best_split"]["gpu"] == {"max_over_mean": 1.0, "worst_layer": 1.0}
    assert told[True].value("best_split.server.worst_layer") == 1.0
    assert told[False].to_dict() == {k: v for k, v in told[True].to_dict().items() if k != "best_split"}
    line = next(line for line in str(told[True]).splitlines() if "split" in line)
    assert "gpu 1.000 / 1.000" in line
    assert "split" not in str(told[False])


def test_the_command_line_shows_the_best_split(tmp_path: Any) -> None:
    placement, trace = heated()
    placement.save(tmp_path / "placement.json")
    trace.save(tmp_path / "trace.npz")
    command = ["evaluate", str(tmp_path / "placement.json"), str(tmp_path / "trace.npz"), "-t", "dgx-h100"]
    done = CliRunner().invoke(
        main, [*command, "--best-split", "--require", "best_split.gpu.max_over_mean<=1"]
    )
    assert done.exit_code == 0, done.output
    assert "best split" in done.output
    assert "best split" not in CliRunner().invoke(main, command).output
