from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import brute
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.errors import Infeasible, InvalidInput
from placer.layer import Layer
from placer.model import Model
from placer.problem import Problem, slots_per_rank
from placer.search import descend
from placer.topology import Topology
from placer.trace import Trace
from placer.traffic import Routes, Traffic

H100 = Topology.load("dgx-h100")
TOY = Model(name="toy", hidden_size=1000, expert_width=1000)  # 6 MB an expert in BF16


def random_trace(
    seed: int, tokens: int, num_experts: int, top_k: int, layers: int = 1, dropped: float = 0.2
) -> Trace:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, layers, num_experts)), axis=2)[:, :, :top_k].astype(np.int16)
    ids[rng.random(ids.shape) < dropped] = -1
    return Trace(topk_idx=ids, num_experts=num_experts, sequence=rng.integers(0, 5, tokens), source="test")


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    shape = draw(
        st.sampled_from([(1, 1, 1), (1, 1, 4), (1, 4, 1), (1, 2, 2), (2, 2, 2), (2, 1, 3), (4, 1, 1)])
    )
    ranks = math.prod(shape)
    per_rank = draw(st.integers(1, 3))
    num_experts = draw(st.integers(max(per_rank, ranks * per_rank - 3), ranks * per_rank))
    trace = random_trace(
        draw(st.integers(0, 2**16)),
        draw(st.integers(1, 12)),
        num_experts,
        draw(st.integers(1, min(3, num_experts))),
        layers=draw(st.integers(1, 2)),
        dropped=draw(st.sampled_from([0.0, 0.4])),
    )
    return Problem.from_trace(
        trace, H100.with_shape(shape), slots_per_gpu=per_rank, load_margin=0.0, model=TOY, reserve=0.0
    )


# -- slots ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((64, 8), 8),
        ((64, 8, 0), 8),
        ((64, 8, 8), 9),
        ((6, 4, 2), 2),
        ((1, 8, 7), 1),
        ((64, 8, None, 9), 9),
        ((64, 24, None, 3), 3),
    ],
)
def test_slots_of_a_gpu(arguments: tuple[Any, ...], expected: int) -> None:
    assert slots_per_rank(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (64, 24),
            "64 experts do not divide by 24 GPUs; the nearest that fits is --redundant 8 (3 slots a GPU)",
        ),
        ((64, 8, 7), "64 experts + 7 redundant .* --redundant 8 (9 slots a GPU)"),
        ((64, 8, 9), "--redundant 8 (9 slots a GPU)"),
        ((64, 8, 4), "--redundant 8 (9 slots a GPU)"),
        ((64, 8, 3), "--redundant 0 (8 slots a GPU)"),
        ((60, 8, 1), "--redundant 4 (8 slots a GPU)"),
        ((4, 8), "--redundant 4 (1 slots a GPU)"),
        ((64, 8, -8), "--redundant: found -8, expected 0 or more"),
        ((64, 8, None, 0), "--slots-per-gpu: found 0, expected at least 1"),
        ((64, 8, 0, 8), "--redundant and --slots-per-gpu exclude each other"),
    ],
)
def test_slots_that_do_not_come_out_are_refused_with_what_would(
    arguments: tuple[Any, ...], message: str
) -> None:
    pattern = re.escape(message).replace(re.escape(".*"), ".*")
    with pytest.raises(InvalidInput, match=pattern):
        slots_per_rank(*arguments)


def test_more_slots_on_a_gpu_than_experts_are_refused() -> None:
    trace = random_trace(0, 10, 4, 2)
    posed = Problem.from_trace(trace, H100.with_shape("1x2x1"), slots_per_gpu=4)
    with pytest.raises(InvalidInput, match="slots: found 5 on each GPU, expected at most 4, one an expert"):
        replace(posed, slots_per_rank=5)


@settings(max_examples=100, deadline=None)
@given(num_experts=st.integers(1, 300), num_ranks=st.integers(1, 80), redundant=st.integers(0, 100))
def test_the_number_proposed_fits_and_none_that_fits_is_nearer(
    num_experts: int, num_ranks: int, redundant: int
) -> None:
    try:
        found = slots_per_rank(num_experts, num_ranks, redundant)
    except InvalidInput as error:
        near, slots = map(int, re.findall(r"--redundant (\d+) \((\d+) slots", str(error))[0])
        assert slots_per_rank(num_experts, num_ranks, near) == slots
        distance = abs(near - redundant)
        for other in range(max(0, redundant - distance + 1), redundant + distance):
            assert (num_experts + other) % num_ranks
    else:
        assert found * num_ranks == num_experts + redundant


# -- limits -----------------------------------------------------------------------------------------------------


def test_fewer_slots_than_experts_are_infeasible_by_name() -> None:
    with pytest.raises(Infeasible, match=r"slots: 4 a layer \(4 GPUs x 1\) cannot hold 6 experts"):
        Problem.from_trace(random_trace(0, 5, 6, 2), H100.with_shape("1x2x2"), slots_per_gpu=1)


def test_experts_beyond_memory_are_infeasible_by_name() -> None:
    trace, topology = random_trace(0, 5, 8, 2, layers=3), H100.with_shape("1x2x2")
    needed = 3 * 2 * 6e6  # layers, slots a GPU, bytes of an expert
    fits = Problem.from_trace(trace, topology, model=TOY, gpu_memory=needed + 1e9, reserve=1e9)
    with pytest.raises(Infeasible, match=r"memory: .*6 experts over 3 layers x 6\.0 MB \+ 1\.0+ GB reserve"):
        replace(fits, gpu_memory=needed + 1e9 - 1)
    with pytest.raises(Infeasible, match="memory"):
        replace(fits, reserve=1e9 + 1)
    replace(fits, gpu_memory=needed / 2 + 1e9, expert_dtype="fp8")
    with pytest.raises(Infeasible, match="memory"):
        replace(fits, gpu_memory=needed / 2 + 1e9 - 1, expert_dtype="fp8")


def test_memory_is_not_checked_where_the_expert_size_is_unknown() -> None:
    problem = Problem.from_trace(random_trace(0, 5, 8, 2), H100.with_shape("1x2x2"), gpu_memory=1.0)
    assert problem.model.expert_bytes() is None


def test_slots_that_may_stay_empty_are_not_proof_of_infeasibility() -> None:
    """Four experts on two GPUs of three slots: two experts a GPU fit, whatever the third slot would need."""
    trace, topology = random_trace(0, 5, 4, 2), H100.with_shape("1x2x1")
    problem = Problem.from_trace(trace, topology, model=TOY, slots_per_gpu=3, gpu_memory=2 * 6e6, reserve=0)
    assert problem.slots_per_rank == 3


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("max load", {"max_load": 0.99}),
        ("max load", {"max_load": math.inf}),
        ("max load", {"max_load": math.nan}),
        ("load margin", {"load_margin": -0.1}),
        ("load margin", {"load_margin": 1.0}),
        ("load margin", {"load_margin": math.nan}),
        ("load margin", {"load_margin": "none"}),
        ("replica choice", {"replica_choice": "best"}),
        ("expert dtype", {"expert_dtype": "fp7"}),
        ("memory", {"gpu_memory": -1.0}),
        ("reserve", {"reserve": -1.0}),
        ("slots", {"slots_per_rank": 0}),
        ("layer", {"layer_ids": (1, 2, 3)}),
        ("groups", {"num_groups": 3}),
        ("groups", {"num_groups": 0}),
    ],
)
def test_values_out_of_range_are_refused(message: str, changes: dict[str, Any]) -> None:
    problem = Problem.from_trace(random_trace(0, 5, 8, 2, layers=2), H100.with_shape("1x2x2"), model=TOY)
    with pytest.raises((InvalidInput, Infeasible), match=message) as caught:
        replace(problem, **changes)
    assert "\n" not in str(caught.value)


def test_routes_and_traffic_of_two_traces_are_refused() -> None:
    problem = Problem.from_trace(random_trace(0, 5, 8, 2, layers=2), H100.with_shape("1x2x2"))
    for other in (random_trace(0, 5, 8, 2, layers=1), random_trace(0, 5, 6, 2, layers=2)):
        with pytest.raises(InvalidInput):
            replace(problem, routes=Routes.from_trace(other))


def test_a_problem_takes_over_what_the_trace_says() -> None:
    trace = replace(random_trace(0, 5, 8, 2, layers=2), layer_ids=(3, 5), num_groups=4, model="toy")
    problem = Problem.from_trace(trace, H100.with_shape("1x2x2"), redundant=4)
    assert (problem.num_layers, problem.num_experts, problem.num_ranks) == (2, 8, 4)
    assert (problem.slots_per_rank, problem.num_slots) == (3, 12)
    assert (problem.layer_ids, problem.num_groups) == ((3, 5), 4)
    assert problem.gpu_memory == H100.gpu_memory
    assert problem.layer(1).num_groups == 4
    assert np.array_equal(problem.layer(1).tokens, trace.topk_idx[:, 1])


def test_counts_alone_make_a_problem_whose_layers_know_no_tokens() -> None:
    traffic = Traffic(num_tokens=4, load=np.array([[3, 3, 1, 1]]))
    problem = Problem(
        traffic=traffic,
        routes=None,
        topology=H100.with_shape("1x2x1"),
        model=TOY,
        slots_per_rank=3,
        layer_ids=(0,),
        load_margin=0.0,
        gpu_memory=80e9,
    )
    layer = problem.layer(0)
    for use in (lambda: layer.tokens, lambda: layer.distinct, lambda: layer.pairs, lambda: layer.split()):
        with pytest.raises(InvalidInput, match="layer 0: found counts only"):
            use()
    assert layer.caps[0] == pytest.approx(1.05 * 4)
    assert layer.score(np.array([0, 1, -1, 2, 3, -1], np.int32))[0] == pytest.approx(
        2 * (6 - 1.05 * 4)
    )  # GPU and server
    assert layer.score(np.array([0, 1, 2, 0, 1, 3], np.int32))[0] == 0.0  # copies share the load


def test_experts_beyond_sixteen_bits_are_not_mixed_up() -> None:
    load = np.zeros((1, 40_000), np.int64)
    load[0, 39_999] = 1
    ids = np.array([[[39_999]]])
    problem = Problem(
        traffic=Traffic(num_tokens=1, load=load),
        routes=Routes(topk_idx=ids, key=np.zeros(1, np.uint64), num_experts=40_000),
        topology=H100.with_shape("1x2x1"),
        model=TOY,
        slots_per_rank=20_000,
        layer_ids=(0,),
        gpu_memory=1e15,
    )
    assert problem.layer(0).tokens.tolist() == [[39_999]]


# -- a layer ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(problem=problems(), seed=st.integers(0, 99))
def test_slots_and_occupant_say_the_same(problem: Problem, seed: int) -> None:
    layer = problem.layer(0)
    occupant = np.random.default_rng(seed).permutation(layer.num_slots).astype(np.int32)
    slots = layer.slots(occupant)
    assert slots.dtype == np.int32
    assert sorted(slots[slots >= 0].tolist()) == list(range(layer.num_experts))
    rows = slots.reshape(layer.num_ranks, -1)
    assert not ((rows[:, :-1] < 0) & (rows[:, 1:] >= 0)).any()
    assert sorted(layer.occupant(slots).tolist()) == list(range(layer.num_slots))
    assert np.array_equal(layer.slots(layer.occupant(slots)), slots)
    assert np.array_equal(layer.positions(occupant)[occupant], np.arange(layer.num_slots))


@settings(max_examples=60, deadline=None)
@given(problem=problems(), seed=st.integers(0, 99))
def test_slots_keep_together_what_the_occupant_keeps_together(problem: Problem, seed: int) -> None:
    layer = problem.layer(0)
    occupant = np.random.default_rng(seed).permutation(layer.num_slots).astype(np.int32)
    slots = layer.slots(occupant)
    for size in layer.unit_slots:
        before = {
            frozenset(e for e in unit.tolist() if e < layer.num_experts)
            for unit in occupant.reshape(-1, size)
        }
        after = {frozenset(e for e in unit.tolist() if e >= 0) for unit in slots.reshape(-1, size)}
        assert before == after
    assert layer.excess(layer.occupant(slots)) == pytest.approx(layer.excess(occupant))


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_linear_spreads_the_experts_in_order(problem: Problem) -> None:
    layer = problem.layer(0)
    slots = layer.slots(layer.linear())
    held = (slots.reshape(layer.num_ranks, -1) >= 0).sum(axis=1)
    assert slots[slots >= 0].tolist() == list(range(layer.num_experts))
    assert held.max() - held.min() <= 1


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_distinct_sets_and_their_weights_reproduce_load_and_pairs(problem: Problem) -> None:
    for index in range(problem.num_layers):
        layer = problem.layer(index)
        sets, count = layer.distinct
        assert len({tuple(row) for row in sets.tolist()}) == len(sets)
        assert (count > 0).all()
        load = np.zeros(layer.num_slots, int)
        pairs = np.zeros((layer.num_slots, layer.num_slots), int)
        for row, weight in zip(sets.tolist(), count.tolist(), strict=True):
            assert row == sorted(row)
            used = [e for e in row if e >= 0]
            assert used
            for e in used:
                load[e] += weight
                for f in used:
                    pairs[e, f] += weight * (e != f)
        assert np.array_equal(layer.expert_load, load)
        assert np.array_equal(layer.pairs, pairs)
        assert np.array_equal(replace(layer, pair_counts=None).pairs, pairs)
        assert problem.traffic.load[index].tolist() == load[: layer.num_experts].tolist()


def test_wide_tokens_of_many_experts_count_all_the_same() -> None:
    """Sets too wide for one 64-bit code."""
    trace = random_trace(1, 40, 300, 8)
    layer = Problem.from_trace(trace, H100.with_shape("1x2x1")).layer(0)
    sets, count = layer.distinct
    load = np.bincount(np.repeat(sets, count, axis=0)[np.repeat(sets, count, axis=0) >= 0], minlength=300)
    assert np.array_equal(layer.load, load)
    assert np.array_equal(replace(layer, pair_counts=None).pairs, layer.pairs)


@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_uses_lists_the_sets_of_every_expert(problem: Problem) -> None:
    layer = problem.layer(0)
    sets, (start, rows) = layer.distinct[0], layer.uses
    assert len(start) == layer.num_slots + 1
    for expert in range(layer.num_slots):
        found = rows[start[expert] : start[expert + 1]].tolist()
        assert sorted(found) == [t for t, row in enumerate(sets.tolist()) if expert in row]


def test_tokens_of_a_single_sequence_are_split_in_blocks() -> None:
    trace = replace(random_trace(0, 64, 8, 2), sequence=np.zeros(64, int))
    layer = Problem.from_trace(trace, H100.with_shape("1x2x1")).layer(0)
    one, two = replace(layer, key=np.zeros(64, np.uint64)).split()
    assert len(one.tokens) == len(two.tokens) == 32
    assert np.array_equal(one.load + two.load, layer.load)


@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_split_halves_share_no_sequence_and_lose_no_token(problem: Problem) -> None:
    layer = problem.layer(0)
    assert layer.key is not None
    one, two = layer.split()
    sequences = [set(np.asarray(half.key).tolist()) for half in (one, two)]
    if len(set(layer.key.tolist())) > 1:
        assert not sequences[0] & sequences[1]
        assert len(sequences[0]) - len(sequences[1]) in (0, 1)
    assert len(one.tokens) + len(two.tokens) == len(layer.tokens)
    assert np.array_equal(one.load + two.load, layer.load)
    assert np.array_equal(one.pairs + two.pairs, layer.pairs)
    for half in (one, two):
        assert half.cap_factor == layer.max_load
        assert half.excess(half.reference) == 0.0


@settings(max_examples=40, deadline=None)
@given(problem=problems(), sets=st.integers(1, 15))
def test_a_sample_of_a_layer_is_every_nth_token(problem: Problem, sets: int) -> None:
    layer = problem.layer(0)
    part = layer.sample(sets)
    stride = max(1, len(layer.distinct[0]) // sets)
    assert (part is layer) == (stride == 1)
    assert np.array_equal(part.tokens, layer.tokens[::stride])
    rows = part.tokens
    assert np.array_equal(part.load, np.bincount(rows[rows >= 0], minlength=layer.num_experts))


@settings(max_examples=60, deadline=None)
@given(problem=problems(), seed=st.integers(0, 99))
def test_the_score_is_load_above_the_caps_and_seconds_of_remote_units(problem: Problem, seed: int) -> None:
    layer = problem.layer(0)
    occupant = np.random.default_rng(seed).permutation(layer.num_slots).astype(np.int32)
    slots = layer.slots(occupant)
    counted = brute.measure(slots.tolist(), layer.tokens.tolist(), problem.topology.shape)
    over = sum(
        max(0.0, heat - cap)
        for level, cap in zip(brute.LEVELS, layer.caps.tolist(), strict=True)
        for heat in counted["load"][level]
    )
    vector = TOY.dispatch_bytes + TOY.combine_bytes
    cost = sum(
        counted["remote"][level.name] * len(layer.tokens) * vector / level.effective_bandwidth
        for level in problem.topology.levels
    )
    found = layer.score(slots)
    assert found[0] == pytest.approx(over, abs=1e-5)
    assert found[1] == pytest.approx(cost)
    assert layer.excess(occupant) == pytest.approx(over, abs=1e-5)
    assert layer.cost(occupant) == pytest.approx(cost)


@settings(max_examples=40, deadline=None)
@given(problem=problems(), seed=st.integers(0, 99))
def test_the_score_of_copies_equals_brute_force(problem: Problem, seed: int) -> None:
    layer = problem.layer(0)
    rng = np.random.default_rng(seed)
    extra = rng.integers(-1, layer.num_experts, layer.num_slots - layer.num_experts)
    row = rng.permutation(np.concatenate([np.arange(layer.num_experts), extra])).reshape(layer.num_ranks, -1)
    slots = (
        np.take_along_axis(row, np.argsort(row < 0, axis=1, kind="stable"), axis=1).ravel().astype(np.int32)
    )
    for rule in ("nearest", "spread"):
        asked = replace(layer, rule=rule)
        counted = brute.measure(slots.tolist(), layer.tokens.tolist(), problem.topology.shape, rule)
        cost = sum(
            counted["remote"][name] * len(layer.tokens) * seconds
            for name, seconds in zip(brute.LEVELS, problem.seconds_per_vector, strict=True)
        )
        over = sum(
            max(0.0, heat - cap)
            for level, cap in zip(brute.LEVELS, layer.caps.tolist(), strict=True)
            for heat in counted["load"][level]
        )
        found = asked.score(slots)
        assert found[0] == pytest.approx(over, abs=1e-5)
        assert found[1] == pytest.approx(cost)


@settings(max_examples=40, deadline=None)
@given(problem=problems(), exact=st.booleans(), seed=st.integers(0, 99))
def test_descend_keeps_the_caps_and_its_value_is_the_cost(problem: Problem, exact: bool, seed: int) -> None:
    layer = problem.layer(0)
    start = layer.reference.copy()
    rng = np.random.default_rng(seed)
    found, value = descend(layer, start, exact=exact, steps=50, patience=50, rng=rng)
    assert np.array_equal(start, layer.reference)
    assert sorted(found.tolist()) == list(range(layer.num_slots))
    assert layer.excess(found) == 0.0
    if exact:
        assert layer.cost(found) <= layer.cost(start) * (1 + 1e-9)
        if not math.isnan(value):
            assert layer.cost_of(value) == pytest.approx(layer.cost(found))


def test_the_cost_per_touched_unit_leaves_out_the_chance_of_being_at_home() -> None:
    layer: Layer = Problem.from_trace(random_trace(0, 5, 8, 2), H100.with_shape("1x2x2"), model=TOY).layer(0)
    vector = TOY.dispatch_bytes + TOY.combine_bytes
    nvlink, nic, _ = (level.effective_bandwidth for level in H100.levels)
    assert layer.unit_cost.tolist() == pytest.approx([vector / nvlink * 3 / 4, vector / nic / 2, 0.0])
    assert layer.levels == (0, 1)
    assert layer.sizes.tolist() == [2, 4]
    assert layer.weights_of_levels.max() == 1.0
