"""Steady steps of layers with copies, against loops over steps, tokens and slots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import noisy_trace, problem

from placer import Budget, Constraints, Placement, Problem, Topology, Trace, evaluate, solve
from placer.cli import main
from placer.constraints import Apart, Free, Pin
from placer.gpus import lightened
from placer.layer import Layer
from placer.steadiness import steadied, steadiness

QUICK = Budget(seconds=None, rounds=1)
RULES = (
    None,
    Constraints(apart=(Apart(experts=(0, 1), level="gpu"), Apart(experts=(2, 5, 7), level="gpu"))),
    Constraints(pin=(Pin(experts=(3, 4), level="gpu", unit=1), Pin(experts=(5,), level="server", unit=0))),
    Constraints(free=(Free(gpus=(0, 1), slots=1), Free(gpus=(3,), slots=2))),
    Constraints(
        pin=(Pin(experts=(0,), level="gpu", unit=0),),
        apart=(Apart(experts=(0, 1), level="server"),),
        free=(Free(gpus=(2,), slots=1),),
    ),
)


def stepped(seed: int = 0, tokens: int = 144, layers: int = 1) -> Trace:
    return noisy_trace(tokens=tokens, layers=layers, seed=seed).rebatch(12, phase="decode")


def posed(trace: Trace, shape: str, speeds: tuple[float, ...] = (), **options: object) -> Problem:
    made = problem(trace, shape, **options)
    return replace(made, topology=replace(made.topology, gpu_speeds=speeds))


def filled(layer: Layer, rng: np.random.Generator, span: int) -> np.ndarray:
    """Every expert once and the rules kept, then copies of others, no expert twice in a unit of `span` slots."""
    occupant = rng.permutation(layer.num_slots) if layer.rules is None else layer.rules.start
    row = np.where(occupant < layer.num_experts, occupant, -1).astype(np.int32)
    for at in rng.permutation(np.flatnonzero(row < 0)).tolist():
        for expert in rng.permutation(layer.num_experts)[:5].tolist():
            trial = row.copy()
            trial[at] = expert
            begin = at // span * span
            if expert not in row[begin : begin + span] and (layer.rules is None or layer.rules.keeps(trial)):
                row = trial
                break
    held = np.sort(np.where(row < 0, layer.num_experts, row).reshape(layer.num_ranks, -1), axis=1).ravel()
    return np.where(held < layer.num_experts, held, -1).astype(np.int32)


def tokens_of(trace: Trace, layer: int = 0) -> dict[int, list[list[int]]]:
    """The experts of the tokens of every step."""
    steps: dict[int, list[list[int]]] = {}
    for step, ids in zip(np.asarray(trace.step).tolist(), trace.topk_idx[:, layer].tolist(), strict=True):
        steps.setdefault(step, []).append([e for e in ids if e >= 0])
    return dict(sorted(steps.items()))


def peaks(
    trace: Trace, row: np.ndarray, ranks: int, speeds: tuple[float, ...] = (), layer: int = 0
) -> list[float]:
    """Busiest GPU over mean of every step, in time; every copy takes an equal share."""
    slots, each = row.tolist(), len(row) // ranks
    pace = speeds or (1.0,) * ranks
    found = []
    for tokens in tokens_of(trace, layer).values():
        heat = [0.0] * ranks
        for expert in (e for ids in tokens for e in ids):
            at = [p for p, held in enumerate(slots) if held == expert]
            for p in at:
                heat[p // each] += 1 / len(at)
        found.append(max(h / v for h, v in zip(heat, pace, strict=True)) * sum(pace) / sum(heat))
    return found


def excess(layer: Layer, row: np.ndarray) -> float:
    """Load above the caps when copies share evenly."""
    slots, over = row.tolist(), 0.0
    for level, width in enumerate(layer.unit_slots):
        for unit, idle in enumerate(layer.idle(level)):
            held = [e for e in slots[unit * width : (unit + 1) * width] if e >= 0]
            over += max(0.0, sum(layer.load[e] / slots.count(e) for e in held) - layer.caps[level] + idle)
    return over


def contents(row: np.ndarray, units: int) -> list[list[int]]:
    return [sorted(held) for held in row.reshape(units, -1).tolist()]


def twice(row: np.ndarray, ranks: int) -> bool:
    """Whether a GPU holds an expert twice."""
    return any(
        len(held) > len(set(held)) for held in ([e for e in g if e >= 0] for g in contents(row, ranks))
    )


def swaps(layer: Layer, row: np.ndarray) -> Iterator[np.ndarray]:
    """The slots after every swap between two GPUs of one server that keeps the rules."""
    each, width = layer.slots_per_rank, layer.server_ranks * layer.slots_per_rank
    for i, j in combinations(range(layer.num_slots), 2):
        if i // width != j // width or i // each == j // each or row[i] == row[j]:
            continue
        other = row.copy()
        other[[i, j]] = row[[j, i]]
        if not twice(other, layer.num_ranks) and (layer.rules is None or layer.rules.keeps(other)):
            yield other


@given(st.integers(0, 10**6), st.sampled_from(["1x4x2", "2x2x2", "1x1x4"]), st.booleans())
@settings(max_examples=15, deadline=None)
def test_copies_share_every_step_as_the_rule_has_them_do(seed: int, shape: str, near: bool) -> None:
    trace, rng = stepped(seed % 5), np.random.default_rng(seed)
    made = posed(trace, shape, slots_per_gpu=6 if shape == "1x1x4" else 4)
    layer = replace(made.layer(0), rule="nearest" if near and shape != "2x2x2" else "spread")
    server = layer.server_ranks * layer.slots_per_rank
    row = filled(layer, rng, server if server < layer.num_slots else layer.slots_per_rank)
    found = steadiness(layer, row)
    assert found.peaks == pytest.approx(sum(peaks(trace, row, layer.num_ranks)))
    total = 0.0
    steps = np.asarray(trace.step)
    for step in np.unique(steps):
        ids = trace.topk_idx[steps == step, 0]
        load = replace(layer, topk=ids, load=np.bincount(ids[ids >= 0], minlength=16)).counts(row).load[0]
        total += load.max() / load.mean()
    assert found.peaks == pytest.approx(total)
    assert found.steps == len(tokens_of(trace))
    assert found.touched == pytest.approx(layer.counts(row).touched[0].sum())


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from(["1x1x4", "1x2x2", "1x2x4", "2x2x2"]),
    constraints=st.sampled_from(RULES),
    max_load=st.sampled_from([None, 1.05, 1.3]),
    alike=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_no_swap_of_copies_inside_a_server_evens_out_steps_any_further(
    seed: int, shape: str, constraints: Constraints | None, max_load: float | None, alike: bool
) -> None:
    rng, trace = np.random.default_rng(seed), stepped(seed % 5)
    ranks = Topology.load("dgx-h100").with_shape(shape).num_ranks
    speeds = () if alike else tuple(rng.choice([0.5, 1.0, 2.0], ranks).tolist())
    if constraints is not None and shape == "1x1x4":
        constraints = replace(constraints, apart=tuple(e for e in constraints.apart if e.level == "gpu"))
    each = 16 // ranks + 2
    layer = posed(trace, shape, speeds, slots_per_gpu=each, max_load=max_load, constraints=constraints).layer(
        0
    )
    row = filled(layer, rng, each)
    found = steadied(layer, row)
    servers = ranks // layer.server_ranks
    alike_units = not speeds and constraints is None and len(set(row[row >= 0])) == (row >= 0).sum()
    if alike_units:
        assert sorted(contents(found, servers)) == sorted(contents(row, servers))
    else:
        assert contents(found, servers) == contents(row, servers)
    assert not twice(found, ranks)
    assert layer.rules is None or layer.rules.keeps(found)
    assert found.tolist() == steadied(layer, row).tolist()
    for gpu in found.reshape(ranks, -1).tolist():
        assert gpu == [*sorted(e for e in gpu if e >= 0), *(e for e in gpu if e < 0)]
    over, least = excess(layer, found), sum(peaks(trace, found, ranks, speeds))
    assert steadiness(layer, found).peaks == pytest.approx(least)
    assert over <= excess(layer, row) + 1e-6
    assert least <= sum(peaks(trace, row, ranks, speeds)) + 1e-9
    for other in swaps(layer, found):
        if excess(layer, other) <= over + 1e-9:
            assert steadiness(layer, other).peaks >= least * (1 - 1e-9)


@given(
    seed=st.integers(0, 10**6),
    constraints=st.sampled_from(RULES),
    rule=st.sampled_from(["nearest", "spread", "cover"]),
    max_load=st.sampled_from([1.0, 1.1, 1.3]),
    alike=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_what_makes_a_gpu_lighter_keeps_every_expert_in_its_servers(
    seed: int, constraints: Constraints | None, rule: str, max_load: float, alike: bool
) -> None:
    rng = np.random.default_rng(seed)
    speeds = () if alike else tuple(rng.choice([1.0, 2.0], 8).tolist())
    made = posed(
        stepped(seed % 5), "1x2x4", speeds, slots_per_gpu=4, max_load=max_load, constraints=constraints
    )
    layer = replace(made.layer(0), rule=rule)
    row = filled(layer, rng, 16)
    found = lightened(layer, row)
    before, after = (layer.above_caps(layer.expected_load(slots)) for slots in (row, found))
    assert after < before or found.tolist() == row.tolist()
    assert set(found.tolist()) - {-1} == set(range(16))
    for held, kept in zip(contents(row, 2), contents(found, 2), strict=True):
        assert {e for e in kept if e >= 0} <= {e for e in held if e >= 0}
    assert not twice(found, 8)
    assert layer.rules is None or layer.rules.keeps(found)
    Placement(physical_to_logical=found[None], num_experts=16, shape=(1, 2, 4))


@pytest.mark.parametrize("seed", range(3))
def test_swaps_that_an_expert_must_not_meet_itself_by_are_all_that_copies_take_away(seed: int) -> None:
    # Two GPUs share both copies of every expert: none can move, whatever a step would gain.
    layer = posed(stepped(seed), "1x1x2", slots_per_gpu=16).layer(0)
    row = np.tile(np.arange(16, dtype=np.int32), 2)
    assert steadied(layer, row).tolist() == row.tolist()
    assert steadiness(layer, row).peaks == pytest.approx(len(tokens_of(stepped(seed))))


def test_without_copies_slots_come_in_their_canonical_order() -> None:
    layer = posed(stepped(), "1x2x4", slots_per_gpu=3).layer(0)
    for seed in range(3):
        row = layer.slots(np.random.default_rng(seed).permutation(24).astype(np.int32))
        found = steadied(layer, row)
        assert found.tolist() == layer.slots(layer.occupant(found)).tolist()
        assert sorted(contents(found, 2)) == sorted(contents(row, 2))


@pytest.mark.parametrize("rule", ["nearest", "spread", "cover", "table"])
def test_solve_steadies_copies_and_says_what_the_evaluator_counts(rule: str) -> None:
    trace = stepped(tokens=480, layers=2)
    made = posed(trace, "1x3x4", redundant=8, replica_choice=rule, max_load=1.2)
    plain = solve(made, "eplb", budget=QUICK)
    result = solve(made, "eplb", budget=QUICK, steady=True)
    assert result.placement.has_copies
    assert result.steady is not None
    pairs = zip(plain.placement.physical_to_logical, result.placement.physical_to_logical, strict=True)
    for before, after in pairs:
        assert contents(before, 3) == contents(after, 3)
    for when, placement in (("before", plain.placement), ("after", result.placement)):
        report = evaluate(placement, trace, made.topology)
        assert report.load_per_step is not None
        found = result.steady["load_per_step.gpu.mean"][when]
        assert found == pytest.approx(report.load_per_step["gpu"]["mean"])
        assert result.steady["touched.gpu"][when] == pytest.approx(report.touched["gpu"])
    gained = result.steady["load_per_step.gpu.mean"]
    assert gained["after"] < gained["before"]
    table = result.placement.table
    tables = [None, None] if table is None else list(table)
    rows = zip(result.placement.physical_to_logical, tables, strict=True)
    seconds = sum(made.layer(i).score(row, its)[1] for i, (row, its) in enumerate(rows))
    assert result.objective == pytest.approx(seconds / trace.num_tokens)


def test_a_gpu_that_takes_no_experts_counts_in_steps_as_the_evaluator_has_it() -> None:
    trace = stepped(tokens=480)
    limits = Constraints(free=(Free(gpus=(3,)),))
    made = posed(trace, "1x1x4", (1.0, 2.0, 1.0, 4.0), slots_per_gpu=6, constraints=limits)
    result = solve(made, "tabu", budget=QUICK, steady=True)
    report = evaluate(result.placement, trace, made.topology)
    assert result.steady is not None
    assert report.load_per_step is not None
    found = result.steady["load_per_step.gpu.mean"]["after"]
    assert found == pytest.approx(report.load_per_step["gpu"]["mean"])


def test_copies_rules_speeds_and_steady_steps_go_together() -> None:
    trace = stepped(tokens=480, layers=2)
    speeds = (1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 2.0, 1.0)
    limits = Constraints(
        pin=(Pin(experts=(3,), level="gpu", unit=2),),
        apart=(Apart(experts=(0, 1, 2), level="gpu"), Apart(experts=(4, 5), level="server")),
        free=(Free(gpus=(1,), slots=1),),
    )
    made = posed(trace, "1x2x4", speeds, slots_per_gpu=4, max_load=1.25, constraints=limits)
    results = [solve(made, "auto", budget=QUICK, jobs=jobs, steady=True) for jobs in (1, 2)]
    placement = results[0].placement
    assert placement.digest == results[1].placement.digest
    assert results[0].steady == results[1].steady
    assert placement.has_copies
    assert not limits.check(placement)
    assert results[0].steady is not None
    found = results[0].steady["load_per_step.gpu.mean"]
    single = peaks(trace, placement.physical_to_logical[0], 8, speeds)
    other = peaks(trace, placement.physical_to_logical[1], 8, speeds, layer=1)
    assert found["after"] == pytest.approx(np.mean([*single, *other]))
    assert found["after"] < found["before"]
    for index, row in enumerate(placement.physical_to_logical):
        assert not twice(row, 8)
        assert row[7] == -1
        layer = made.layer(index)
        assert layer.score(row)[0] == pytest.approx(0.0, abs=1e-5)


def test_the_command_steadies_copies_within_constraints(tmp_path: Path) -> None:
    path, limits, output = (tmp_path / name for name in ("noisy.npz", "limits.toml", "placement.json"))
    noisy_trace(tokens=480).save(path)
    limits.write_text("[[apart]]\nexperts = [0, 1]\nlevel = 'gpu'\n\n[[pin]]\nexperts = [3]\ngpu = 2\n")
    asked = ["solve", str(path), "-t", "dgx-h100", "--shape", "1x4x2", "--redundant", "8", "--rounds", "1"]
    steps = ["--tokens-per-step", "24", "--phase", "decode", "--steady", "--constraints", str(limits), "-q"]
    runner = CliRunner()
    for choice in ("nearest", "table", "cover", "spread"):
        found = runner.invoke(main, [*asked, *steps, "--replica-choice", choice, "-o", str(output)])
        assert found.exit_code == 0, found.output
        assert "steady: load_per_step.gpu.mean" in found.stdout
        assert not Constraints.load(limits).check(Placement.load(output))
        checked = runner.invoke(main, ["check", str(output), "--constraints", str(limits)])
        assert checked.exit_code == 0


def test_within_constraints_caps_on_activated_experts_take_no_copies() -> None:
    made = posed(stepped(), "1x2x4", slots_per_gpu=3, max_load=1.2, load_model="activated")
    result = solve(replace(made, constraints=RULES[1]), "auto", budget=QUICK, steady=True)
    assert not result.placement.has_copies
    assert any("spare slots stay empty" in note for note in result.notes)
