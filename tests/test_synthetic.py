from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from placer.errors import InvalidInput
from placer.synthetic import PRESETS, synth

Array = np.ndarray[Any, Any]


def touched(ids: Array, unit_of_expert: Array) -> float:
    """Mean number of distinct units that hold the experts of a token of one layer."""
    units = np.sort(unit_of_expert[ids], axis=1)
    return float(1 + np.count_nonzero(np.diff(units, axis=1), axis=1).mean())


def lifts(ids: Array, num_experts: int) -> Array:
    """P(i, j) / (P(i) P(j)) of all pairs expected five times or more."""
    chosen = np.zeros((len(ids), num_experts))
    np.put_along_axis(chosen, ids.astype(np.intp), 1, axis=1)
    load = chosen.sum(axis=0)
    expected = np.outer(load, load) / len(ids)
    seen = np.triu(expected >= 5, 1)
    return (chosen.T @ chosen)[seen] / expected[seen]


@pytest.mark.parametrize(
    ("name", "num_experts", "groups", "first_layer"),
    [("olmoe-like", 64, (1, 1), 0), ("qwen3-like", 128, (1, 1), 0), ("dsv3-like", 256, (8, 4), 3)],
)
def test_a_preset_has_the_shape_of_its_model(
    name: str, num_experts: int, groups: tuple[int, int], first_layer: int
) -> None:
    trace = synth(name, layers=2, tokens=450)
    assert trace.topk_idx.shape == (450, 2, 8)
    assert trace.topk_idx.dtype == np.uint8
    assert trace.num_experts == num_experts
    assert (trace.num_groups, trace.topk_groups) == groups
    assert trace.layer_ids == (first_layer, first_layer + 1)
    assert (trace.model, trace.license) == (PRESETS[name].model, "MIT")
    assert trace.source == f"synthetic: placer synth {name} --layers 2 --tokens 450 --seed 0"
    assert trace.sequence is not None
    assert np.bincount(trace.sequence).tolist() == [200, 200, 50]


def test_all_layers_of_the_model_are_the_default() -> None:
    assert synth("dsv3-like", tokens=3).layer_ids == tuple(range(3, 61))


def test_the_same_seed_gives_the_same_trace_and_another_seed_another() -> None:
    first = synth("olmoe-like", layers=2, tokens=300, seed=4)
    assert synth("olmoe-like", layers=2, tokens=300, seed=4).digest == first.digest
    assert synth("olmoe-like", layers=2, tokens=300, seed=5).digest != first.digest


def test_more_layers_leave_the_first_as_they_were() -> None:
    few, many = (synth("olmoe-like", layers=layers, tokens=300) for layers in (2, 5))
    assert many.layers(slice(2)).digest == few.digest
    assert many.layers([0]).digest != many.layers([1]).digest


def test_chunks_do_not_change_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = synth("dsv3-like", layers=1, tokens=300)
    monkeypatch.setattr("placer.synthetic._CHUNK", 256 * 64)
    np.testing.assert_array_equal(synth("dsv3-like", layers=1, tokens=300).topk_idx, whole.topk_idx)


def test_group_limited_tokens_stay_in_four_groups() -> None:
    trace = synth("dsv3-like", layers=1, tokens=2000)
    groups = np.arange(256) // 32
    used = [len(set(groups[row])) for row in trace.topk_idx[:, 0]]
    assert max(used) == 4
    ids = trace.topk_idx[:, 0]
    scattered = np.random.default_rng(0).permutation(groups)
    assert touched(ids, groups) < 0.8 * touched(ids, scattered)


def test_experts_coactivate_as_planted() -> None:
    trace = synth("qwen3-like", layers=2, tokens=20_000)
    first, second = trace.split()
    for layer in range(2):
        lift = lifts(trace.topk_idx[:, layer], 128)
        # Without structure the lift of every pair is close to 7/8 (8 distinct experts a token).
        assert np.percentile(lift, 50) < 0.85
        assert 1.4 < np.percentile(lift, 90) < 2.1
        assert 2.0 < np.percentile(lift, 99) < 4.0
        halves = [np.bincount(part.topk_idx[:, layer].reshape(-1), minlength=128) for part in (first, second)]
        assert 2.0 < halves[0].max() / halves[0].mean() < 6.0
        assert np.corrcoef(halves[0], halves[1])[0, 1] > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "olmo-like"}, "did you mean olmoe-like"),
        ({"name": "olmoe-like", "tokens": 0}, "found tokens 0"),
        ({"name": "olmoe-like", "layers": 0}, "found layers 0"),
        ({"name": "olmoe-like", "sequence_length": -1}, "found sequence_length -1"),
        ({"name": "olmoe-like", "seed": -1}, "found seed -1"),
    ],
)
def test_what_cannot_be_made_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        synth(**options)
