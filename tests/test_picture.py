"""The picture of the README: its numbers are the evaluator's, and it comes out the same every time."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from instances import noisy_trace

from benchmarks import picture
from placer import Budget, Topology

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def found() -> picture.Pair:
    machine = Topology.load("dgx-h100").with_shape("1x4x2")
    return picture.pair(noisy_trace(), machine, budget=Budget(seconds=None, rounds=1), method="tabu")


def test_tokens_that_use_both_experts_are_counted_against_chance() -> None:
    trace = noisy_trace(tokens=200)
    sets = [set(row.tolist()) - {-1} for row in trace.topk_idx[:, 1]]
    shown = picture._lift(trace, 1)
    for one, other in itertools.product(range(4), range(16)):
        both, first, second = (sum(used <= s for s in sets) for used in ({one, other}, {one}, {other}))
        assert shown[one, other] == pytest.approx(
            both * len(sets) / (first * second) if first * second else 0.0
        )


def test_both_maps_show_the_same_pairs_in_another_order(found: picture.Pair) -> None:
    before, after = found.together
    assert before.shape == after.shape == (16, 16)
    assert np.isnan(before.diagonal()).all()
    assert np.isnan(after.diagonal()).all()
    assert sorted(before[np.isfinite(before)]) == pytest.approx(sorted(after[np.isfinite(after)]))
    assert found.edges.tolist() == [0, 4, 8, 12, 16]


def test_experts_chosen_together_stand_together_afterwards(found: picture.Pair) -> None:
    inside = np.kron(np.eye(4), np.ones((4, 4))) > 0
    before, after = (np.nanmean(shown[inside]) for shown in found.together)
    assert after > before
    assert found.reports[1].touched["server"] < found.reports[0].touched["server"]
    assert found.reports[0].tokens == 300  # the half that was not fitted


def test_the_drawing_repeats_itself_and_says_its_numbers(found: picture.Pair, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        picture.draw(found, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    drawn = paths[0].read_text(encoding="utf-8")
    for report in found.reports:
        assert f"<!-- {report.touched['server']:.2f}" in drawn
        assert f"<!-- {report.load['server']['max_over_mean']:.2f}" in drawn


def test_the_shipped_picture_is_this_ones_and_small() -> None:
    drawn = (ROOT / "docs" / "before-after.svg").read_text(encoding="utf-8")
    assert "tokens that the search did not see" in drawn
    assert len(drawn) < 300_000
