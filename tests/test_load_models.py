"""Load models: what caps count, and what single steps do, against loops over steps, tokens and experts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import noisy_trace, problem

from placer import Budget, Constraints, Model, Placement, Problem, Topology, Trace, evaluate, solve
from placer.baseline import baseline_placement
from placer.batches import activations, uses_by_step
from placer.caps import least_load, raised
from placer.cli import main
from placer.constraints import Apart, Free
from placer.errors import InvalidInput
from placer.layer import Layer
from placer.solvers.refine import excess_changes
from placer.steadiness import steadied, steadiness
from placer.timing import compute_seconds

CAPPED = ("lpt", "tabu", "refine", "anneal", "cpsat", "auto")
QUICK = Budget(seconds=None, rounds=1)


def stepped(tokens: int = 600, per_step: int = 24, **options: Any) -> Trace:
    return noisy_trace(tokens=tokens, **options).rebatch(per_step, phase="decode")


def used(trace: Trace, layer: int) -> dict[int, list[set[int]]]:
    """The expert sets of the tokens of every step."""
    steps: dict[int, list[set[int]]] = {}
    for step, ids in zip(np.asarray(trace.step).tolist(), trace.topk_idx[:, layer].tolist(), strict=True):
        steps.setdefault(step, []).append({e for e in ids if e >= 0})
    return steps


def activated(trace: Trace, layer: int) -> list[int]:
    """Steps in which each expert is used."""
    steps = used(trace, layer).values()
    return [
        sum(any(expert in ids for ids in tokens) for tokens in steps) for expert in range(trace.num_experts)
    ]


def at_speeds(posed: Problem, speeds: tuple[float, ...]) -> Problem:
    """The problem on GPUs of these speeds."""
    return replace(posed, topology=replace(posed.topology, gpu_speeds=speeds))


def unit_loads(row: np.ndarray, load: list[int], units: int) -> list[float]:
    """Load of every unit of a placement row without copies."""
    return [float(sum(load[e] for e in held if e >= 0)) for held in row.reshape(units, -1).tolist()]


def peaks(
    trace: Trace,
    layer: int,
    row: np.ndarray,
    ranks: int,
    *,
    once: bool = False,
    speeds: Sequence[float] | None = None,
) -> list[float]:
    """Busiest GPU over mean of every step with load; with `once`, a step counts an expert once."""
    pace = speeds or [1.0] * ranks
    gpu_of = {e: g for g, held in enumerate(row.reshape(ranks, -1).tolist()) for e in held if e >= 0}
    found = []
    for _, tokens in sorted(used(trace, layer).items()):
        choices = [e for ids in tokens for e in ids]
        heat = [0] * ranks
        for expert in set(choices) if once else choices:
            heat[gpu_of[expert]] += 1
        if choices:
            found.append(max(h / v for h, v in zip(heat, pace, strict=True)) * sum(pace) / sum(heat))
    return found


# -- activated experts -------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.sets(st.integers(0, 5), max_size=3)), min_size=1, max_size=12)
)
@settings(max_examples=60, deadline=None)
def test_uses_and_activations_are_those_of_a_loop(tokens: list[tuple[int, set[int]]]) -> None:
    ids = np.array([[*sorted(experts), *[-1] * (3 - len(experts))] for _, experts in tokens])
    uses = uses_by_step(ids, np.array([step for step, _ in tokens]), 6)
    steps = sorted({step for step, _ in tokens})
    assert uses.tolist() == [
        [sum(at == step and e in experts for at, experts in tokens) for e in range(6)] for step in steps
    ]
    expected = [len({at for at, experts in tokens if e in experts}) for e in range(6)]
    assert activations(uses).tolist() == expected


def test_caps_count_activations_and_costs_count_tokens() -> None:
    trace = stepped()
    options = {"max_load": 1.3, "load_model": "activated"}
    plain = problem(trace, "1x2x2", max_load=1.3).layer(1)
    layer = problem(trace, "1x2x2", **options).layer(1)
    assert layer.heat.tolist() == activated(trace, 1)
    assert plain.heat is plain.load
    assert layer.heat.tolist() != layer.load.tolist()
    assert np.allclose(layer.caps[:2], 1.3 * layer.heat.sum() / np.array([4, 2]))
    occupant = layer.linear()
    assert layer.cost(occupant) == plain.cost(occupant)
    assert layer.score(layer.slots(occupant))[1] == plain.score(layer.slots(occupant))[1]
    row, limits = layer.slots(occupant), layer.caps
    above = sum(
        max(0.0, load - cap)
        for units, cap in ((4, limits[0]), (2, limits[1]))
        for load in unit_loads(row, activated(trace, 1), units)
    )
    assert layer.excess(occupant) == pytest.approx(above)
    assert layer.score(row)[0] == pytest.approx(above)


@pytest.mark.parametrize("name", CAPPED)
@pytest.mark.parametrize("shape", ["1x4x1", "1x2x2"])
def test_methods_keep_caps_on_activated_experts(name: str, shape: str) -> None:
    # Hot experts take many tokens of few steps, so that both loads ask for different placements.
    rng = np.random.default_rng(3)
    step = rng.integers(40, size=800)
    ids = np.argsort(
        rng.gumbel(size=(800, 1, 16))
        + np.where(step % 16 < 8, 3.0, 0.0)[:, None, None] * (np.arange(16) % 4 == 0),
        axis=2,
    )[:, :, -3:]
    trace = Trace(topk_idx=ids, num_experts=16, step=step, sequence=np.arange(800) // 10)
    posed = problem(trace, shape, max_load=1.02, load_model="activated")
    result = solve(posed, name, budget=QUICK)
    units = {"gpu": 4} if shape == "1x4x1" else {"gpu": 4, "server": 2}
    limits = {row["level"]: row["cap"] for row in result.caps_raised}
    for level, number in units.items():
        loads = unit_loads(result.placement.physical_to_logical[0], activated(trace, 0), number)
        assert max(loads) * number / sum(loads) <= max(limits.get(level, 0.0), 1.02) + 1e-9
    layer = posed.layer(0)
    assert raised(layer) == [
        {**row, "level": ["gpu", "server", "rack"].index(row["level"])} for row in result.caps_raised
    ]


def test_a_proof_under_a_cap_on_activated_experts_is_the_optimum_of_an_enumeration() -> None:
    trace = stepped(tokens=300, per_step=6, num_experts=8, top_k=2, layers=1)
    posed = problem(trace, "1x2x1", max_load=1.01, load_model="activated")
    result = solve(posed, "cpsat", budget=QUICK)
    layer, heat = posed.layer(0), activated(trace, 0)
    cap = layer.caps[0]

    def contents() -> Iterator[tuple[int, ...]]:
        for held in combinations(range(8), 4):
            if sum(heat[e] for e in held) <= cap >= sum(heat) - sum(heat[e] for e in held):
                yield held

    def touched(held: tuple[int, ...]) -> int:
        tokens = [ids for step in used(trace, 0).values() for ids in step]
        return sum(bool(ids & set(held)) + bool(ids - set(held)) for ids in tokens)

    best = min(touched(held) for held in contents())
    assert result.status == "optimal"
    found = tuple(result.placement.physical_to_logical[0][:4].tolist())
    assert touched(found) == best
    assert found in set(contents()) or tuple(sorted(set(range(8)) - set(found))) in set(contents())
    freely = solve(problem(trace, "1x2x1"), "cpsat", budget=QUICK).objective
    assert freely < result.objective


def test_samples_keep_the_activations_of_the_whole_and_halves_count_their_own() -> None:
    trace = stepped(tokens=900)
    layer = problem(trace, "1x4x1", max_load=1.1, load_model="activated").layer(0)
    small = layer.sample(40)
    assert len(small.tokens) < len(layer.tokens)
    assert small.heat.tolist() == layer.heat.tolist()
    assert small.caps.tolist() == layer.caps.tolist()
    assert layer.key is not None
    assert trace.step is not None
    middle = np.unique(layer.key)[(len(np.unique(layer.key)) - 1) // 2]
    first = replace(
        trace,
        topk_idx=trace.topk_idx[layer.key <= middle],
        step=trace.step[layer.key <= middle],
        sequence=None,
    )
    assert layer.split()[0].heat.tolist() == activated(first, 0)


def test_a_report_counts_activated_experts_beside_tokens() -> None:
    trace = stepped(layers=3)
    posed = problem(trace, "2x2x2")
    placement = solve(posed, "tabu", budget=QUICK).placement
    report = evaluate(placement, trace, posed.topology)
    assert report.load_activated is not None
    for level, units in (("gpu", 8), ("server", 4), ("rack", 2)):
        loads = [
            unit_loads(row, activated(trace, layer), units)
            for layer, row in enumerate(placement.physical_to_logical)
        ]
        heat = [max(each) * units / sum(each) for each in loads]
        expected = {"max_over_mean": np.mean(heat), "worst_layer": max(heat)}
        assert report.load_activated[level] == pytest.approx(expected)
    assert report.to_dict()["load_activated"] == report.load_activated
    assert "steps in which experts are used" in str(report)
    bare = evaluate(placement, replace(trace, step=None), posed.topology)
    assert "load_activated" not in bare.to_dict()
    assert "steps in which experts are used" not in str(bare)
    assert bare.load == report.load


def test_a_report_with_copies_knows_no_activated_load() -> None:
    trace = stepped(layers=1)
    copied = Placement(physical_to_logical=np.array([[*range(16), 0, 1]]), num_experts=16, shape=(1, 2, 1))
    report = evaluate(copied, trace, Topology.load("dgx-h100").with_shape("1x2x1"))
    assert report.load_activated is None
    assert report.to_dict()["load_activated"] is None


def test_a_layer_without_any_choice_is_even() -> None:
    ids = np.full((4, 1, 2), -1)
    trace = Trace(topk_idx=ids, num_experts=4, step=np.array([0, 0, 1, 1]))
    posed = problem(trace, "1x1x2", max_load=1.0, load_model="activated")
    result = solve(posed, "tabu", budget=QUICK, steady=True)
    report = evaluate(result.placement, trace, posed.topology)
    assert report.load_activated == {
        level: {"max_over_mean": 1.0, "worst_layer": 1.0} for level in ("gpu", "server", "rack")
    }
    assert result.steady is not None
    assert result.steady["activated_per_step.gpu.mean"] == {"before": 1.0, "after": 1.0}


def test_what_is_not_defined_is_refused_in_one_line() -> None:
    trace = stepped()
    with pytest.raises(InvalidInput, match=r"found 'bytes', expected one of tokens, activated"):
        problem(trace, "1x4x1", load_model="bytes")
    for options in ({"load_model": "activated"}, {}):
        bare = replace(trace, step=None)
        with pytest.raises(InvalidInput, match=r"found no step in the trace, .*--tokens-per-step") as caught:
            solve(problem(bare, "1x4x1", **options), "tabu", steady=True)
        assert "\n" not in str(caught.value)
    copied = solve(problem(trace, "1x4x1", redundant=4), "eplb").placement
    posed = problem(trace, "1x4x1", redundant=4, load_model="activated")
    for steady in (False, True):
        for name in ("auto", "eplb"):
            with pytest.raises(InvalidInput, match=r"not defined with copies: found 4 spare slots") as caught:
                solve(posed, name, steady=steady)
            assert "\n" not in str(caught.value)
        with pytest.raises(InvalidInput, match=r"not defined with copies: found some in the initial"):
            solve(posed, "tabu", initial=copied, steady=steady)
        assert not solve(posed, "tabu", budget=QUICK, steady=steady).placement.has_copies
    plain = problem(trace, "1x2x2", redundant=4)
    assert solve(plain, "eplb", budget=QUICK, steady=True).placement.has_copies
    assert not solve(plain, "tabu", budget=QUICK, steady=True).placement.has_copies


# -- single steps ------------------------------------------------------------------------------------------


def layer_and_row(
    shape: str, seed: int, speeds: tuple[float, ...] = (), **options: Any
) -> tuple[Trace, Layer, np.ndarray]:
    trace = stepped(tokens=240, per_step=12, layers=1, seed=seed)
    layer = at_speeds(problem(trace, shape, **options), speeds).layer(0)
    return trace, layer, layer.slots(np.random.default_rng(seed).permutation(16).astype(np.int32))


def swapped(row: np.ndarray, i: int, j: int) -> np.ndarray:
    other = row.copy()
    other[[i, j]] = row[[j, i]]
    return other


@given(
    st.integers(0, 10**6),
    st.sampled_from(["1x1x4", "1x2x4", "2x2x2", "1x4x1"]),
    st.sampled_from([None, 1.2]),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_no_swap_inside_a_server_evens_out_steps_any_further(
    seed: int, shape: str, max_load: float | None, alike: bool
) -> None:
    number = Topology.load("dgx-h100").with_shape(shape).num_ranks
    speeds = () if alike else tuple(np.random.default_rng(seed).choice([0.5, 1.0, 1.5], number).tolist())
    trace, layer, row = layer_and_row(shape, seed, speeds, max_load=max_load)
    ranks, per_server = layer.num_ranks, layer.server_ranks * layer.slots_per_rank
    found = steadied(layer, row)
    expected = sum(peaks(trace, 0, found, ranks, speeds=speeds))
    assert steadiness(layer, found).peaks == pytest.approx(expected)
    before, after = (steadiness(layer, each) for each in (row, found))
    assert after.peaks <= before.peaks + 1e-9
    assert {frozenset(held) for held in found.reshape(-1, per_server).tolist()} == {
        frozenset(held) for held in row.reshape(-1, per_server).tolist()
    }
    held = layer.excess(layer.occupant(found))
    assert held <= layer.excess(layer.occupant(row)) + 1e-6
    for server in range(16 // per_server):
        for i, j in combinations(range(server * per_server, (server + 1) * per_server), 2):
            other = swapped(found, i, j)
            if layer.excess(layer.occupant(other)) <= held + 1e-9:
                assert sum(peaks(trace, 0, other, ranks, speeds=speeds)) >= after.peaks * (1 - 1e-9)


@pytest.mark.parametrize("once", [False, True])
def test_steadiness_counts_what_caps_count(once: bool) -> None:
    trace, layer, row = layer_and_row("1x1x4", 8, load_model="activated" if once else "tokens")
    found = steadiness(layer, row)
    expected = peaks(trace, 0, row, 4, once=once)
    assert found.peaks == pytest.approx(sum(expected))
    assert found.steps == len(expected)
    gpu_of = {e: g for g, held in enumerate(row.reshape(4, -1).tolist()) for e in held}
    tokens = [ids for step in used(trace, 0).values() for ids in step]
    assert found.touched == sum(len({gpu_of[e] for e in ids}) for ids in tokens)
    even = steadied(layer, row)
    assert sum(peaks(trace, 0, even, 4, once=once)) < sum(expected)


def test_what_steady_counts_has_the_name_of_what_caps_count() -> None:
    trace = stepped(tokens=900, layers=2)
    posed = problem(trace, "1x2x4", max_load=1.2, load_model="activated")
    result = solve(posed, "tabu", budget=QUICK, steady=True)
    assert result.steady is not None
    assert result.steady.keys() == {"activated_per_step.gpu.mean", "touched.gpu"}


def test_gpus_of_different_speed_are_compared_with_the_same_contiguous_experts_and_copies() -> None:
    posed = problem(stepped(), "1x2x4", slots_per_gpu=3)
    plain = baseline_placement(posed)
    assert plain.has_copies
    uneven = baseline_placement(at_speeds(posed, (1.0, 2.0, 1.0, 1.0)))
    assert uneven.physical_to_logical.tolist() == plain.physical_to_logical.tolist()


def test_solve_says_both_prices_as_the_evaluator_counts_them() -> None:
    trace = stepped(tokens=900, layers=3)
    posed = problem(trace, "1x2x4", max_load=1.2)
    plain = solve(posed, "tabu", budget=QUICK, jobs=2)
    result = solve(posed, "tabu", budget=QUICK, jobs=2, steady=True)
    assert plain.steady is None
    assert "steady" not in plain.to_dict()
    assert result.steady is not None
    assert result.to_dict()["steady"] == result.steady
    for when, placement in (("before", plain.placement), ("after", result.placement)):
        report = evaluate(placement, trace, posed.topology)
        assert report.load_per_step is not None
        heat, touched = (result.steady[name][when] for name in ("load_per_step.gpu.mean", "touched.gpu"))
        assert heat == pytest.approx(report.load_per_step["gpu"]["mean"])
        assert touched == pytest.approx(report.touched["gpu"])
    gained = result.steady["load_per_step.gpu.mean"]
    assert gained["after"] < gained["before"]
    servers = [evaluate(each.placement, trace, posed.topology).touched["server"] for each in (plain, result)]
    assert servers[0] == servers[1]


def test_steps_are_evened_out_within_constraints() -> None:
    trace = stepped(layers=1)
    constraints = Constraints(apart=(Apart(experts=(0, 4, 8, 12), level="gpu"),))
    posed = problem(trace, "1x1x4", constraints=constraints)
    result = solve(posed, "tabu", budget=QUICK, steady=True)
    assert not constraints.check(result.placement)
    assert result.steady is not None
    assert (
        result.steady["load_per_step.gpu.mean"]["after"] < result.steady["load_per_step.gpu.mean"]["before"]
    )


# -- GPUs of unequal speed ---------------------------------------------------------------------------------

SPEEDS = (1.0, 0.5, 1.0, 1.5)


def busiest(row: np.ndarray, load: list[int], speeds: Sequence[float], units: int) -> float:
    """Largest load of a unit over its share of the speed."""
    fast = np.array(speeds).reshape(units, -1).sum(axis=1) / sum(speeds)
    return float((np.array(unit_loads(row, load, units)) / fast).max()) / sum(load)


def counted(trace: Trace, layer: int) -> list[int]:
    """Tokens that use each expert."""
    return [int((trace.topk_idx[:, layer] == expert).sum()) for expert in range(trace.num_experts)]


@given(st.integers(0, 10**6), st.sampled_from(["1x2x4", "2x2x1", "1x4x2"]), st.floats(1.0, 1.5))
@settings(max_examples=25, deadline=None)
def test_a_cap_leaves_every_unit_as_much_over_its_share_of_the_speed(
    seed: int, shape: str, max_load: float
) -> None:
    rng = np.random.default_rng(seed)
    number = Topology.load("dgx-h100").with_shape(shape).num_ranks
    speeds = tuple(rng.choice([0.5, 1.0, 1.25, 2.0], number).tolist())
    trace = noisy_trace(tokens=200, layers=1, seed=seed % 5)
    layer = at_speeds(problem(trace, shape, max_load=max_load), speeds).layer(0)
    row = layer.slots(rng.permutation(16).astype(np.int32))
    load, limit, above = counted(trace, 0), layer.slots(layer.reference), 0.0
    for size in {1, layer.server_ranks, layer.unit_ranks[2]} - {number}:
        fast = np.array(speeds).reshape(-1, size).sum(axis=1) / sum(speeds)
        cap = max(max_load, busiest(limit, load, speeds, number // size)) * sum(load) * fast
        above += np.maximum(np.array(unit_loads(row, load, number // size)) - cap, 0.0).sum() * (
            sum(ranks == size for ranks in layer.unit_ranks)
        )
    assert layer.excess(layer.occupant(row)) == pytest.approx(above, abs=1e-6)
    assert layer.score(row)[0] == pytest.approx(above, abs=1e-5)
    changes = excess_changes(layer, layer.occupant(row))
    i, j = rng.integers(16, size=2)
    after = layer.excess(layer.occupant(swapped(row, i, j)))
    assert changes[i, j] == pytest.approx(after - above, abs=1e-6)


@pytest.mark.parametrize("name", CAPPED)
@pytest.mark.parametrize("shape", ["1x4x1", "1x2x4"])
def test_methods_keep_caps_over_speeds(name: str, shape: str) -> None:
    trace = noisy_trace(num_experts=24, tokens=600, layers=1)
    posed = at_speeds(problem(trace, shape, max_load=1.15), SPEEDS)
    budget = Budget(seconds=10, rounds=1)
    result = solve(posed, name, budget=budget)
    row, speeds = result.placement.physical_to_logical[0], posed.topology.speeds
    limits = {row["level"]: row["cap"] for row in result.caps_raised}
    for level, units in (("gpu", posed.num_ranks), ("server", 4 if shape == "1x4x1" else 2)):
        assert busiest(row, counted(trace, 0), speeds, units) <= max(limits.get(level, 0.0), 1.15) + 1e-9
    assert all(cap < 1.4 for cap in limits.values())
    blind = solve(problem(trace, shape, max_load=1.15), name, budget=budget).placement.physical_to_logical[0]
    assert busiest(blind, counted(trace, 0), speeds, posed.num_ranks) > 1.5


@pytest.mark.parametrize("seed", range(4))
def test_the_reference_is_nearly_as_even_as_can_be(seed: int) -> None:
    trace = noisy_trace(num_experts=6, top_k=2, tokens=400, layers=1, seed=seed)
    speeds = (1.0, 2.0, 1.0)
    layer = at_speeds(problem(trace, "1x3x1", max_load=1.0), speeds).layer(0)
    load = counted(trace, 0)
    best = min(busiest(np.array(row), load, speeds, 3) for row in permutations(range(6)))
    found = busiest(layer.slots(layer.reference), load, speeds, 3)
    assert best - 1e-9 <= found <= 1.1 * best
    assert layer.caps[0] == pytest.approx(max(1.0, found) * sum(load) / 2)


@pytest.mark.parametrize("seed", range(4))
def test_a_proof_over_speeds_holds_against_an_enumeration(seed: int) -> None:
    trace = noisy_trace(num_experts=8, top_k=2, tokens=300, layers=1, seed=seed)
    posed = at_speeds(problem(trace, "1x2x1", max_load=1.1), (1.0, 2.0))
    result = solve(posed, "cpsat", budget=QUICK)
    layer = posed.layer(0)
    rows = [np.array([*left, *sorted(set(range(8)) - set(left))]) for left in combinations(range(8), 4)]
    scores = [layer.score(row.astype(np.int32)) for row in rows]
    best = min(cost for excess, cost in scores if excess == 0) / trace.num_tokens
    assert result.bound is not None
    assert result.bound <= best * (1 + 1e-9)
    assert result.objective >= best * (1 - 1e-9)
    assert layer.score(result.placement.physical_to_logical[0])[0] == 0.0


def test_rules_hold_where_gpus_differ_in_speed() -> None:
    trace = noisy_trace(num_experts=32, tokens=600, layers=1)
    constraints = Constraints(apart=(Apart(experts=(0, 4, 8), level="gpu"),), free=(Free(gpus=(2,)),))
    posed = at_speeds(
        problem(trace, "1x1x4", slots_per_gpu=16, constraints=constraints, max_load=1.1), SPEEDS
    )
    result = solve(posed, "tabu", budget=QUICK)
    assert not constraints.check(result.placement)
    loads = unit_loads(result.placement.physical_to_logical[0], counted(trace, 0), 4)
    assert loads[2] == 0.0
    held = np.array([loads[0], loads[1], loads[3]]) / np.array([1.0, 0.5, 1.5])
    assert max(held) * 3.0 / sum(loads) <= 1.1 + 1e-9


def test_a_report_counts_load_in_time() -> None:
    trace = stepped(layers=2)
    posed = at_speeds(problem(trace, "1x2x2"), (1.0, 3.0))
    placement = solve(problem(trace, "1x2x2"), "linear").placement
    report = evaluate(placement, trace, posed.topology)
    plain = evaluate(placement, trace, replace(posed.topology, gpu_speeds=()))
    speeds = (1.0, 3.0, 1.0, 3.0)
    rows = list(enumerate(placement.physical_to_logical))
    heat = [busiest(row, counted(trace, layer), speeds, 4) for layer, row in rows]
    active = [busiest(row, activated(trace, layer), speeds, 4) for layer, row in rows]
    single = [peak for layer, row in rows for peak in peaks(trace, layer, row, 4, speeds=speeds)]
    assert report.load_activated is not None
    assert report.load_per_step is not None
    assert report.load["gpu"] == pytest.approx({"max_over_mean": np.mean(heat), "worst_layer": max(heat)})
    assert report.load_activated["gpu"]["worst_layer"] == pytest.approx(max(active))
    assert report.load_per_step["gpu"]["mean"] == pytest.approx(np.mean(single))
    for level in ("server", "rack"):  # alike again
        assert report.load[level] == pytest.approx(plain.load[level])
    assert report.touched == plain.touched
    assert any("GPUs differ in speed" in line for line in report.assumptions)
    assert not any("speed" in line for line in plain.assumptions)
    with pytest.raises(InvalidInput, match="best split: found gpu_speeds"):
        evaluate(placement, trace, posed.topology, best_split=True)


def test_slow_gpus_compute_longer() -> None:
    machine = Topology.load("dgx-h100").with_shape("1x1x2")
    model = Model.named("olmoe-1b-7b")
    load, none = np.array([9e6, 9e6]), np.zeros(2)
    usual = compute_seconds(load, none, machine, model)
    for speeds, factor in (((1.0, 0.5), 2.0), ((0.5, 0.5), 2.0), ((1.0, 2.0), 1.0), ((1.0, 1.0), 1.0)):
        found = compute_seconds(load, none, replace(machine, gpu_speeds=speeds), model)
        assert found == pytest.approx(factor * usual)


def test_equal_speeds_change_nothing() -> None:
    posed = problem(noisy_trace(), "2x2x2", max_load=1.1)
    same = at_speeds(posed, (2.0, 2.0))
    assert same.topology.speeds == ()
    digests = {solve(each, "tabu", budget=QUICK).placement.digest for each in (posed, same)}
    assert len(digests) == 1


COPIED = {
    "1x4x2": (1.0, 2.0) * 4,
    "1x8x1": (1.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0, 2.0),
    "2x2x2": (1.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 2.0),
}


def shared(row: np.ndarray, load: list[int], units: int) -> list[float]:
    """Load of every unit when copies share evenly."""
    slots = row.tolist()
    return [sum(load[e] / slots.count(e) for e in held if e >= 0) for held in row.reshape(units, -1).tolist()]


def over_speeds(loads: Sequence[float], speeds: Sequence[float]) -> float:
    """Largest load of a unit over its share of the speed."""
    fast = np.array(speeds).reshape(len(loads), -1).sum(axis=1) / sum(speeds)
    return float((np.array(loads) / fast).max()) / sum(loads)


@pytest.mark.parametrize("shape", COPIED)
@pytest.mark.parametrize(("rule", "most"), [("nearest", 1.1), ("table", 1.3), ("cover", 1.3)])
def test_copies_keep_caps_over_speeds_and_cost_no_more_than_none(shape: str, rule: str, most: float) -> None:
    twice = Budget(seconds=None, rounds=2)
    speeds, trace = COPIED[shape], noisy_trace(num_experts=32, tokens=600, layers=1)
    posed = at_speeds(problem(trace, shape, slots_per_gpu=5, max_load=most, replica_choice=rule), speeds)
    result, single = (solve(posed, name, budget=twice) for name in ("auto", "tabu"))
    row, units = result.placement.physical_to_logical[0], {"gpu": 8, "server": 8 if shape == "1x8x1" else 4}
    assert result.placement.has_copies or rule == "table"
    assert not single.placement.has_copies
    assert result.caps_raised == []
    assert result.objective <= single.objective * (1 + 1e-9)
    report = evaluate(result.placement, trace, posed.topology)
    assert (
        report.remote["server"] <= evaluate(single.placement, trace, posed.topology).remote["server"] + 1e-9
    )
    for level, number in units.items():
        assert report.load[level]["worst_layer"] <= most + 1e-6
        if rule == "nearest" and shape != "2x2x2":
            assert over_speeds(shared(row, counted(trace, 0), number), speeds) == pytest.approx(
                report.load[level]["worst_layer"]
            )
    for held in row.reshape(8, -1).tolist():
        assert len({e for e in held if e >= 0}) == sum(e >= 0 for e in held)
    loads = np.array(shared(row, counted(trace, 0), 8))
    assert loads[np.array(speeds) == 2.0].mean() > 1.2 * loads[np.array(speeds) == 1.0].mean()
    again = solve(posed, "auto", budget=twice, jobs=2).placement
    assert again.digest == result.placement.digest


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", ["1x8x1", "2x2x2"])
def test_least_load_with_copies_is_the_lighter_of_two_arrangements(seed: int, shape: str) -> None:
    rng = np.random.default_rng(seed)
    speeds = tuple(rng.choice([1.0, 2.0], 8).tolist()) if seed else (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.25)
    trace = noisy_trace(tokens=300, layers=1, seed=seed)
    posed = at_speeds(problem(trace, shape, slots_per_gpu=3, replica_choice="spread"), speeds)
    layer, load = replace(posed.layer(0), copies=True), counted(trace, 0)
    rows = [layer.slots(layer.reference), solve(posed, "eplb", budget=QUICK).placement.physical_to_logical[0]]
    by_gpu = [over_speeds(shared(row, load, 8), speeds) for row in rows]
    chosen = rows[int(by_gpu[1] < by_gpu[0])]
    for level, ranks in enumerate(layer.unit_ranks):
        units = 8 // ranks
        expected = over_speeds(shared(chosen, load, units), speeds) * sum(load) / units
        assert least_load(layer)[level] == pytest.approx(expected)


def test_copies_make_caps_that_no_single_experts_could_keep() -> None:
    # One expert takes all tokens: alone it fills a GPU, and copies bring a GPU as much as it is fast.
    ids = np.zeros((64, 1, 1), np.int64)
    ids[:8, 0, 0] = np.arange(8)
    trace = Trace(topk_idx=ids, num_experts=8, sequence=np.arange(64) // 4)
    posed = at_speeds(problem(trace, "1x4x1", slots_per_gpu=5, max_load=1.0), (1.0, 1.0, 1.0, 2.0))
    layer = posed.layer(0)
    bare, copied = least_load(layer), least_load(replace(layer, copies=True))
    assert bare[0] >= 57 / 1.6 - 1e-9
    assert copied[0] < bare[0]


def test_a_report_with_copies_counts_load_and_seconds_in_time() -> None:
    trace, speeds = stepped(layers=1), (1.0, 2.0, 2.0, 1.0)
    row = np.array([*range(8), 8, 9, 10, 0, 1, 2, 11, 12, 13, 14, 15, 0, 1, 3, 4, 5])
    copied = Placement(physical_to_logical=row[None], num_experts=16, shape=(1, 4, 1))
    model = replace(Model.named("olmoe-1b-7b"), num_experts=16)
    machine = Topology.load("dgx-h100").with_shape("1x4x1")
    uneven = replace(machine, gpu_speeds=speeds)
    slots = row.reshape(4, -1)
    load = [0.0] * 4
    for expert, tokens in enumerate(counted(trace, 0)):  # a home that holds it serves itself
        holders = [g for g in range(4) if expert in slots[g]]
        for home in range(4):
            for gpu in [home] if home in holders else holders:
                load[gpu] += tokens / 4 / (1 if home in holders else len(holders))
    found, plain = (
        evaluate(copied, trace, each, model=model, tokens_per_gpu=2**20) for each in (uneven, machine)
    )
    assert found.load["gpu"]["worst_layer"] == pytest.approx(over_speeds(load, speeds))
    assert plain.load["gpu"]["worst_layer"] == pytest.approx(max(load) * 4 / sum(load))
    slowed = max(h / v for h, v in zip(load, speeds, strict=True)) / max(load)
    assert found.seconds["compute"] == pytest.approx(slowed * plain.seconds["compute"], rel=1e-3)
    assert found.seconds["dispatch"] == plain.seconds["dispatch"]
    assert found.load_per_step is not None
    expected = []
    for step in used(trace, 0).values():
        heat = [sum((e in slots[g]) / (row == e).sum() for ids in step for e in ids) for g in range(4)]
        expected.append(over_speeds(heat, speeds))
    assert found.load_per_step["gpu"]["mean"] == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("seed", [3, 11])
def test_copies_that_make_way_leave_no_empty_slot_before_a_held_one(seed: int) -> None:
    trace = noisy_trace(num_experts=32, tokens=400, layers=1, seed=seed % 3)
    posed = at_speeds(problem(trace, "1x4x2", slots_per_gpu=5, max_load=1.1), (1.0, 2.0))
    result = solve(posed, "auto", budget=QUICK, seed=seed)
    assert posed.layer(0).score(result.placement.physical_to_logical[0])[0] == 0.0


def test_equal_speeds_change_nothing_with_copies() -> None:
    posed = problem(noisy_trace(layers=1), "2x2x2", slots_per_gpu=3, max_load=1.1)
    digests = {
        solve(each, "auto", budget=QUICK).placement.digest for each in (posed, at_speeds(posed, (2.0, 2.0)))
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("gpu_speeds = [1.0, 0.5, 1.0]", "gpu_speeds lists 3 speeds, expected 8, .* or 64"),
        ("gpu_speeds = 1.0", r"gpu_speeds is 1\.0, expected a list of numbers"),
        ("gpu_speeds = []", "expected a list of numbers"),
        ('gpu_speeds = ["fast"]', "expected a list of numbers"),
        ("gpu_speeds = [1, 1, 1, 1, 1, 1, 1, 0]", "gpu_speeds is 0.0, expected speeds from 0.001"),
        ("gpu_speeds = [1, 1, 1, 1, 1, 1, 1, nan]", "gpu_speeds is nan, expected speeds from 0.001"),
    ],
)
def test_speeds_that_cannot_be_are_refused(tmp_path: Path, line: str, said: str) -> None:
    path = machine_file(tmp_path, line)
    with pytest.raises(InvalidInput, match=said) as caught:
        Topology.load(path)
    assert "\n" not in str(caught.value)


def machine_file(folder: Path, line: str) -> Path:
    """dgx-h100 with one more line."""
    text = (Path(__file__).parent.parent / "topologies" / "dgx-h100.toml").read_text()
    path = folder / "mixed.toml"
    path.write_text(text.replace("[[levels]]", f"{line}\n\n[[levels]]", 1))
    return path


def test_a_file_gives_speeds_to_every_server(tmp_path: Path) -> None:
    machine = Topology.load(machine_file(tmp_path, "gpu_speeds = [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5]"))
    assert machine.speeds == (*[1.0] * 4, *[0.5] * 4) * 8
    assert machine.with_shape("1x2x8").speeds == (*[1.0] * 4, *[0.5] * 4) * 2
    with pytest.raises(InvalidInput, match="gpu_speeds lists 8 speeds, expected 4"):
        machine.with_shape("1x3x4")
    path, runner = tmp_path / "noisy.npz", CliRunner()
    noisy_trace(num_experts=32).save(path)
    asked = [
        "solve",
        str(path),
        "-t",
        str(tmp_path / "mixed.toml"),
        "--shape",
        "1x1x8",
        "--rounds",
        "1",
        "-q",
    ]
    found = json.loads(runner.invoke(main, [*asked, "--json"]).stdout)
    assert any("GPUs differ in speed" in line for line in found["report"]["assumptions"])
    assert found["report"]["load"]["gpu"]["max_over_mean"] < found["baseline"]["load"]["gpu"]["max_over_mean"]
    shown = runner.invoke(main, ["topology", str(tmp_path / "mixed.toml")])
    assert "times 0.5 to 1" in shown.stdout


def test_the_command_shows_what_each_option_does(tmp_path: Path) -> None:
    path, output = tmp_path / "noisy.npz", tmp_path / "placement.json"
    noisy_trace(tokens=900).save(path)
    asked = ["solve", str(path), "-t", "dgx-h100", "--shape", "1x2x4", "--rounds", "1", "-q", "--no-bound"]
    steps = ["--tokens-per-step", "30", "--phase", "decode"]
    runner = CliRunner()
    shown = runner.invoke(main, [*asked, *steps, "--steady"])
    assert shown.exit_code == 0
    assert "steady: load_per_step.gpu.mean 1." in shown.stdout
    assert "touched.gpu" in shown.stdout.split("steady: ")[1]
    found = runner.invoke(
        main, [*asked, *steps, "--steady", "--load-model", "activated", "--json", "-o", str(output)]
    )
    document = json.loads(found.stdout)
    assert document["steady"].keys() == {"activated_per_step.gpu.mean", "touched.gpu"}
    assert document["report"]["load_activated"].keys() == {"gpu", "server", "rack"}
    assert Placement.load(output).provenance["load_model"] == "activated"
    for options, said in (
        (["--load-model", "activated"], "found no step in the trace"),
        (["--steady"], "found no step in the trace"),
        (["--phase", "decode"], "found no --tokens-per-step"),
        ([*steps, "--steady", "--copies", "4"], "--copies and --steady exclude each other"),
        ([*steps, "--load-model", "activated", "--redundant", "auto"], "exclude each other"),
    ):
        refused = runner.invoke(main, [*asked, *options])
        assert refused.exit_code == 2
        assert said in refused.output


def test_problems_and_routes_carry_the_steps() -> None:
    trace = stepped()
    routes = Problem.from_trace(trace, Topology.load("dgx-h100").with_shape("1x4x1")).routes
    assert routes is not None
    assert routes.step is not None
    twice, some = routes + routes, routes.sample(100)
    assert twice.step is not None
    assert twice.step.tolist() == routes.step.tolist() * 2
    assert some.step is not None
    assert len(some.step) == some.num_tokens < routes.num_tokens
    assert (routes + replace(routes, step=None)).step is None
