"""inspect: statistics against their definitions."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import noisy_trace

from placer import Trace
from placer.inspection import inspect, uniform_touched


@given(st.sampled_from([(4, 2), (6, 3), (8, 4)]), st.integers(0, 4))
@settings(max_examples=20, deadline=None)
def test_the_null_is_the_mean_over_all_choices(size: tuple[int, int], top_k: int) -> None:
    experts, units = size
    touched = [len({e * units // experts for e in chosen}) for chosen in combinations(range(experts), top_k)]
    assert uniform_touched(experts, top_k, units) == pytest.approx(np.mean(touched))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_a_uniform_router_looks_like_the_null(seed: int) -> None:
    ids = np.argsort(np.random.default_rng(seed).random((4000, 1, 16)), axis=2)[:, :, :3]
    found = inspect(Trace(topk_idx=ids, num_experts=16))
    assert found.lift is not None
    assert found.lift["p50"] == pytest.approx(1.0, abs=0.1)
    assert found.verdict.startswith("nothing to win")
    for row in found.touched.values():
        assert row["linear"] == pytest.approx(row["uniform"], rel=0.05)


def test_few_tokens_do_not_pass_for_structure() -> None:
    """1000 tokens scatter the lift of a uniform router from 0.5 to 1.6; that is chance, and counts as such."""
    ids = np.argsort(np.random.default_rng(0).random((1000, 1, 64)), axis=2)[:, :, :8]
    found = inspect(Trace(topk_idx=ids, num_experts=64))
    assert found.lift is not None
    assert found.lift["p99"] > 1.4
    assert found.structure == pytest.approx(0.0, abs=0.1)
    assert "verdict: nothing to win" in str(found)
    tiny = inspect(Trace(topk_idx=ids[:5], num_experts=64))
    assert (tiny.structure, tiny.verdict.partition(":")[0]) == (None, "cannot tell")


def test_touched_counts_distinct_units() -> None:
    trace = noisy_trace()
    sets = [{int(e) // 4 for e in row if e >= 0} for row in trace.topk_idx.reshape(-1, 4)]
    assert inspect(trace).touched[4]["linear"] == pytest.approx(np.mean([len(units) for units in sets]))


def test_experts_that_always_meet_have_a_high_lift() -> None:
    ids = np.array([[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]] * 50)
    found = inspect(Trace(topk_idx=ids, num_experts=8))
    assert found.lift is not None
    # 28 pairs are equally likely by load, 4 of them take all the tokens: those have lift 7.
    assert found.verdict.startswith("yes")
    assert (found.lift["p50"], found.lift["p99"]) == (0.0, pytest.approx(7.0))


def test_dropped_choices_are_counted_and_explained() -> None:
    found = inspect(Trace(topk_idx=np.array([[[0, -1]], [[1, 2]]]), num_experts=4))
    assert found.dropped == 0.25
    assert any("dropped" in hint for hint in found.hints)
    assert "25.00% of choices" in str(found)


def test_one_expert_a_token_has_no_pairs() -> None:
    found = inspect(Trace(topk_idx=np.array([[[0]], [[1]]] * 20), num_experts=2))
    assert found.lift is None
    assert "only load" in found.verdict
    assert not any("too few tokens" in hint for hint in found.hints)
