"""Constraints: against all arrangements there are, against a second check, and what is said about wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from instances import noisy_trace, problem
from terminal import Outcome, placer

from placer import Budget, Placement, Problem, solve
from placer.baseline import baseline_placement
from placer.constraints import Apart, Constraints, Free, Pin, Violation
from placer.errors import Infeasible, InvalidInput, PlacerError
from placer.layer import Layer
from placer.rules import Rules
from placer.search import descend
from placer.search.rules import bar_swaps, may_swap
from placer.solvers import linear, tabu

Shape = tuple[int, int, int]

QUICK = Budget(seconds=None, rounds=1)
# Shape, slots of a GPU, experts: with and without spare slots, of one to three levels, one slot a GPU or several.
TINY: tuple[tuple[Shape, int, int], ...] = (
    ((1, 2, 1), 3, 6),
    ((1, 3, 1), 2, 6),
    ((1, 2, 2), 2, 6),
    ((2, 2, 1), 2, 5),
    ((1, 3, 2), 1, 6),
    ((2, 2, 1), 1, 4),
    ((1, 1, 3), 3, 6),
)


# -- a second check, as plain as possible ----------------------------------------------------------------------


def ranks_of(shape: Shape, level: str) -> int:
    _, servers, gpus = shape
    return {"gpu": 1, "server": gpus, "rack": gpus * servers}[level]


def broken(rules: Constraints, layer: int, gpus: list[list[int]], shape: Shape) -> set[Any]:
    """(rule, layer, level, unit, experts) of all that a layer breaks; `gpus` are the experts of each, no -1."""
    found = set()

    def inside(level: str, unit: int) -> set[int]:
        return {e for g, held in enumerate(gpus) if g // ranks_of(shape, level) == unit for e in held}

    for number, pin in enumerate(rules.pin, start=1):
        for unit in range(len(gpus) // ranks_of(shape, pin.level)):
            wrong = inside(pin.level, unit) & set(pin.experts)
            if (pin.layers is None or layer in pin.layers) and unit != pin.unit and wrong:
                found.add((f"pin {number}", layer, pin.level, unit, tuple(sorted(wrong))))
    for number, apart in enumerate(rules.apart, start=1):
        for unit in range(len(gpus) // ranks_of(shape, apart.level)):
            wrong = inside(apart.level, unit) & set(apart.experts)
            if (apart.layers is None or layer in apart.layers) and len(wrong) > 1:
                found.add((f"apart {number}", layer, apart.level, unit, tuple(sorted(wrong))))
    return found


def too_full(rules: Constraints, layer: int, gpus: list[list[int]], slots: int) -> set[Any]:
    found = set()
    for number, free in enumerate(rules.free, start=1):
        for gpu in free.gpus:
            most = slots - (slots if free.slots is None else free.slots)
            if (free.layers is None or layer in free.layers) and len(gpus[gpu]) > most:
                found.add((f"free {number}", layer, "gpu", gpu, tuple(sorted(set(gpus[gpu])))))
    return found


def violations(rules: Constraints, placement: Placement) -> set[Any]:
    found = set()
    for layer, row in zip(placement.layer_ids, placement.physical_to_logical.tolist(), strict=True):
        size = placement.slots_per_rank
        gpus = [[e for e in row[at : at + size] if e >= 0] for at in range(0, len(row), size)]
        found |= broken(rules, layer, gpus, placement.shape) | too_full(rules, layer, gpus, size)
    return found


def arrangements(
    rules: Constraints, shape: Shape, slots: int, experts: int
) -> Iterator[np.ndarray[Any, Any]]:
    """Slot arrays of layer 0 that keep all rules: every way to give each expert a GPU."""
    ranks = shape[0] * shape[1] * shape[2]
    for choice in product(range(ranks), repeat=experts):
        gpus = [[e for e in range(experts) if choice[e] == rank] for rank in range(ranks)]
        if max(map(len, gpus)) <= slots and not broken(rules, 0, gpus, shape) | too_full(
            rules, 0, gpus, slots
        ):
            yield np.array([[*held, *[-1] * (slots - len(held))] for held in gpus], np.int32).ravel()


# -- random rules ----------------------------------------------------------------------------------------------


def layer_sets(layers: int) -> st.SearchStrategy[tuple[int, ...] | None]:
    return st.none() | st.sets(st.integers(0, layers - 1), min_size=1).map(lambda ids: tuple(sorted(ids)))


@st.composite
def some_rules(
    draw: st.DrawFn, shape: Shape, slots: int, experts: int, layers: int = 1, most: int = 3
) -> Constraints:
    ranks = shape[0] * shape[1] * shape[2]
    several = st.sets(st.integers(0, experts - 1), min_size=1, max_size=most).map(lambda e: tuple(sorted(e)))
    levels = st.sampled_from(["gpu", "server", "rack"])
    pins = []
    for _ in range(draw(st.integers(0, 2))):
        level = draw(levels)
        unit = draw(st.integers(0, ranks // ranks_of(shape, level) - 1))
        pins.append(Pin(experts=draw(several), level=level, unit=unit, layers=draw(layer_sets(layers))))
    apart = [
        Apart(
            experts=draw(several.filter(lambda e: len(e) > 1)),
            level=draw(levels),
            layers=draw(layer_sets(layers)),
        )
        for _ in range(draw(st.integers(0, 2)))
    ]
    free = [
        Free(
            gpus=(draw(st.integers(0, ranks - 1)),),
            slots=draw(st.none() | st.integers(1, slots)),
            layers=draw(layer_sets(layers)),
        )
        for _ in range(draw(st.integers(0, 1)))
    ]
    return Constraints(pin=tuple(pins), apart=tuple(apart), free=tuple(free))


@st.composite
def tiny(draw: st.DrawFn) -> tuple[Problem, Constraints, Shape]:
    """A tiny problem without its rules, rules for it, its shape."""
    shape, slots, experts = draw(st.sampled_from(TINY))
    posed = tiny_problem(
        shape, slots, experts, draw(st.integers(0, 99)), max_load=draw(st.sampled_from([None, 1.2]))
    )
    return posed, draw(some_rules(shape, slots, experts)), shape


def tiny_problem(shape: Shape, slots: int, experts: int, seed: int, **options: Any) -> Problem:
    trace = noisy_trace(num_experts=experts, top_k=2, tokens=60, layers=1, seed=seed)
    return problem(trace, "x".join(map(str, shape)), slots_per_gpu=slots, **options)


def drawn_rules(rng: np.random.Generator, shape: Shape, slots: int, experts: int) -> Constraints:
    """One or two experts pinned, two or three kept apart and, where slots are spare, one that stays empty."""
    ranks = shape[0] * shape[1] * shape[2]
    level = str(rng.choice(["gpu", "server"]))
    unit = int(rng.integers(ranks // ranks_of(shape, level)))
    chosen = tuple(rng.choice(experts, int(rng.integers(1, 3)), replace=False).tolist())
    pin = Pin(experts=chosen, level=level, unit=unit)
    chosen = tuple(rng.choice(experts, int(rng.integers(2, 4)), replace=False).tolist())
    apart = Apart(experts=chosen, level=str(rng.choice(["gpu", "server"])))
    free = Free(gpus=(int(rng.integers(ranks)),), slots=1)
    return Constraints(pin=(pin,), apart=(apart,), free=(free,) if ranks * slots > experts else ())


# -- the search ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [None, 1.2])
def test_tabu_reaches_the_optimum_under_constraints_of_nearly_all_small_layers(cap: float | None) -> None:
    missed, tried = [], 0
    for seed in range(49):
        shape, slots, experts = TINY[seed % len(TINY)]
        rules = drawn_rules(np.random.default_rng(seed), shape, slots, experts)
        try:
            posed = replace(tiny_problem(shape, slots, experts, seed, max_load=cap), constraints=rules)
        except Infeasible:
            continue
        layer = posed.layer(0)
        every = arrangements(rules, shape, slots, experts)
        least = min(tabu.quality(layer, layer.occupant(option)) for option in every)
        result = solve(posed, "tabu", seed=seed, budget=Budget(seconds=None, rounds=5))
        found = result.placement.physical_to_logical[0]
        if any("contiguous experts kept" in note for note in result.notes):  # a choice, not an optimum
            assert np.array_equal(found, layer.slots(layer.linear()))
            continue
        excess, cost = tabu.quality(layer, layer.occupant(found))
        assert excess == least[0] == 0
        assert cost >= least[1] * (1 - 1e-9)
        tried += 1
        if cost > least[1] * (1 + 1e-9):
            missed.append(seed)
    assert tried >= 20
    assert len(missed) <= 1, missed


@settings(max_examples=40, deadline=None)
@given(case=tiny())
def test_what_is_refused_as_infeasible_is_and_nothing_else(case: tuple[Problem, Constraints, Shape]) -> None:
    posed, rules, shape = case
    if next(arrangements(rules, shape, posed.slots_per_rank, posed.num_experts), None) is None:
        with pytest.raises(
            (Infeasible, InvalidInput), match=r"and to|leaves|which has|kept apart|hold together"
        ):
            replace(posed, constraints=rules)
    else:
        result = solve(replace(posed, constraints=rules), "tabu", budget=QUICK)
        assert violations(rules, result.placement) == set()


SHAPES: tuple[tuple[Shape, int], ...] = (
    ((1, 4, 1), 4),
    ((1, 4, 2), 2),
    ((2, 2, 2), 3),
    ((1, 2, 8), 1),
    ((2, 2, 4), 1),
    ((1, 3, 2), 4),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data(), case=st.sampled_from(SHAPES), method=st.sampled_from(["tabu", "auto", "lpt"]))
def test_no_constraint_is_ever_broken(data: st.DataObject, case: tuple[Shape, int], method: str) -> None:
    shape, slots = case
    rules = data.draw(some_rules(shape, slots, 16, layers=2, most=6))
    trace = noisy_trace(tokens=200, seed=data.draw(st.integers(0, 99)))
    cap = data.draw(st.sampled_from([None, 1.1]))
    posed = problem(trace, "x".join(map(str, shape)), slots_per_gpu=slots, max_load=cap)
    try:
        posed = replace(posed, constraints=rules)
    except (Infeasible, InvalidInput):
        reject()
    result = solve(posed, method, budget=QUICK)
    assert violations(rules, result.placement) == set()
    layers = [posed.layer(index) for index in range(2)]
    rows = result.placement.physical_to_logical
    assert all(layer.score(row)[0] == 0 for layer, row in zip(layers, rows, strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), case=st.sampled_from(SHAPES), seed=st.integers(0, 999))
def test_repairs_keep_the_rules_and_leave_alone_what_keeps_them(
    data: st.DataObject, case: tuple[Shape, int], seed: int
) -> None:
    shape, slots = case
    layer = layer_under(data, shape, slots)
    rng = np.random.default_rng(seed)
    begun = rng.permutation(layer.num_slots).astype(np.int32)
    ended = layer.repaired(begun, rng)
    assert sorted(ended.tolist()) == list(range(layer.num_slots))
    assert layer.rules.keeps(ended)
    assert layer.repaired(ended, rng) is ended
    assert layer.rules.keeps(layer.reference)
    assert layer.excess(layer.reference) == 0


def layer_under(data: st.DataObject, shape: Shape, slots: int) -> Layer:
    """A layer under random rules that can be kept."""
    try:
        return layer_of(shape, slots, data.draw(some_rules(shape, slots, 16, most=6)))
    except (Infeasible, InvalidInput):
        reject()


def layer_of(shape: Shape, slots: int, rules: Constraints) -> Layer:
    trace = noisy_trace(tokens=200, layers=1)
    return problem(
        trace, "x".join(map(str, shape)), slots_per_gpu=slots, max_load=1.1, constraints=rules
    ).layer(0)


def test_a_repair_that_fails_ends_with_the_known_arrangement(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of((1, 4, 1), 4, Constraints(pin=(Pin(experts=(0,), level="server", unit=3),)))
    monkeypatch.setattr("placer.rules.REPAIRS", 0)
    assert isinstance(layer.rules, Rules)
    assert layer.repaired(layer.linear()) is layer.rules.start


def test_units_keep_their_numbers_under_constraints() -> None:
    rules = Constraints(pin=(Pin(experts=(0,), level="gpu", unit=7),))
    posed = problem(noisy_trace(), "1x4x2", constraints=rules)
    for row in solve(posed, "tabu", budget=QUICK).placement.physical_to_logical:
        assert 0 in row.reshape(8, 2)[7].tolist()


def test_a_rule_holds_in_its_layers_only() -> None:
    pin = Pin(experts=tuple(range(4)), level="server", unit=2, layers=(1,))
    posed = problem(noisy_trace(), "1x4x1", constraints=Constraints(pin=(pin,)))
    assert posed.rules[0] is not posed.rules[1]
    result = solve(posed, "tabu", budget=QUICK).placement.physical_to_logical
    assert sorted(result[1].reshape(4, 4)[2].tolist()) == [0, 1, 2, 3]
    alone = solve(problem(noisy_trace(), "1x4x1"), "tabu", budget=QUICK).placement.physical_to_logical
    layer = posed.layer(0)
    assert layer.cost(layer.occupant(result[0])) <= 1.005 * layer.cost(layer.occupant(alone[0]))


def test_experts_kept_apart_twice_keep_the_greater_distance() -> None:
    shape: Shape = (1, 2, 4)
    pairs = layer_of(shape, 2, Constraints()).pairs
    one, other = (int(e) for e in np.unravel_index(pairs.argmax(), pairs.shape))  # which attract each other
    wide, near = Apart(experts=(one, other), level="server"), Apart(experts=(one, other), level="gpu")
    for order in ((wide, near), (near, wide)):
        layer = layer_of(shape, 2, Constraints(apart=order))
        ended, _ = descend(layer, layer.linear(), exact=True, rng=np.random.default_rng(0))
        assert layer.positions(ended)[one] // 8 != layer.positions(ended)[other] // 8


@settings(max_examples=60, deadline=None)
@given(data=st.data(), case=st.sampled_from(SHAPES), seed=st.integers(0, 999))
def test_barred_are_all_swaps_that_would_break_a_rule_and_no_others(
    data: st.DataObject, case: tuple[Shape, int], seed: int
) -> None:
    shape, slots = case
    layer = layer_under(data, shape, slots)
    rng = np.random.default_rng(seed)
    occupant = layer.repaired(rng.permutation(layer.num_slots).astype(np.int32), rng)
    barred = np.zeros((layer.num_slots, layer.num_slots), bool)
    bar_swaps(occupant, layer.positions(occupant), layer.rules.compiled, barred)
    for i in range(layer.num_slots):
        for j in range(i + 1, layer.num_slots):
            swapped = occupant.copy()
            swapped[[i, j]] = occupant[[j, i]]
            kept = layer.rules.keeps(swapped)
            assert barred[i, j] == (not kept)
            assert may_swap(i, j, occupant, layer.positions(occupant), layer.rules.compiled) == kept


def test_without_a_need_to_move_the_constrained_search_is_as_good_as_the_free_one() -> None:
    free = problem(noisy_trace(tokens=900), "1x4x1", max_load=1.1)
    placed = solve(free, "tabu", budget=QUICK)
    pins = tuple(
        Pin(experts=(int(row[0]),), level="server", unit=unit)
        for unit, row in enumerate(placed.placement.physical_to_logical[0].reshape(4, 4))
    )
    posed = replace(free, constraints=Constraints(pin=tuple(replace(pin, layers=(0,)) for pin in pins)))
    assert solve(posed, "tabu", budget=QUICK).objective <= placed.objective * 1.005


@pytest.mark.parametrize("method", ["tabu", "auto"])
def test_an_initial_placement_that_breaks_a_rule_is_not_returned(method: str) -> None:
    rules = Constraints(pin=(Pin(experts=(0,), level="server", unit=3),))
    free = problem(noisy_trace(), "1x4x1", max_load=1.2)
    initial = solve(free, "tabu", budget=Budget(seconds=None, rounds=5)).placement
    result = solve(replace(free, constraints=rules), method, budget=Budget(seconds=0), initial=initial)
    assert violations(rules, initial) != set()
    assert violations(rules, result.placement) == set()


def test_the_result_is_never_worse_than_an_initial_placement_that_keeps_the_rules() -> None:
    rules = Constraints(pin=(Pin(experts=(0,), level="server", unit=3),))
    posed = problem(noisy_trace(), "1x4x1", constraints=rules)
    initial = solve(posed, "tabu", budget=Budget(seconds=None, rounds=5)).placement
    for method in ("tabu", "lpt"):
        result = solve(posed, method, budget=Budget(seconds=0), initial=initial)
        for index, (row, known) in enumerate(
            zip(result.placement.physical_to_logical, initial.physical_to_logical, strict=True)
        ):
            layer = posed.layer(index)
            assert layer.score(row) <= layer.score(known)


def test_the_same_seed_gives_the_same_placement_for_any_number_of_jobs() -> None:
    rules = Constraints(
        pin=(Pin(experts=(0, 1), level="server", unit=3),), apart=(Apart(experts=(2, 3, 4), level="server"),)
    )
    posed = problem(noisy_trace(layers=3), "1x4x2", max_load=1.2, load_margin="auto", constraints=rules)
    placements = [solve(posed, "tabu", budget=QUICK, seed=5, jobs=jobs).placement for jobs in (1, 2)]
    assert placements[0].digest == placements[1].digest


def test_caps_count_from_the_gpus_that_may_hold_experts() -> None:
    trace = noisy_trace(layers=1)
    posed = problem(
        trace, "1x4x1", slots_per_gpu=8, max_load=1.2, constraints=Constraints(free=(Free(gpus=(2,)),))
    )
    layer = posed.layer(0)
    assert layer.caps[1] == pytest.approx(1.2 * layer.load.sum() / 3)
    result = solve(posed, "tabu", budget=QUICK)
    assert [row["level"] for row in result.caps_raised] == ["gpu", "server"]


@pytest.mark.parametrize("unknown", ["tokens", "what copies do to activations"])
def test_auto_leaves_spare_slots_empty_under_constraints_where_copies_cannot_be_judged(unknown: str) -> None:
    rules = Constraints(apart=(Apart(experts=(0, 1)),))
    trace = replace(noisy_trace(), step=np.arange(600) // 50)
    posed = problem(trace, "1x4x1", redundant=4, constraints=rules)
    known = solve(posed, budget=QUICK)
    assert known.placement.has_copies
    assert not any("spare slots stay empty" in note for note in known.notes)
    posed = replace(posed, routes=None) if unknown == "tokens" else replace(posed, load_model="activated")
    result = solve(posed, budget=QUICK)
    assert not result.placement.has_copies
    assert violations(rules, result.placement) == set()
    assert any("spare slots stay empty: copies within constraints take" in note for note in result.notes)


def test_auto_balances_load_within_the_rules_where_only_counts_are_known() -> None:
    rules = Constraints(pin=(Pin(experts=(0, 1, 2), level="server", unit=3),))
    posed = replace(problem(noisy_trace(), "1x4x1"), routes=None, constraints=rules)
    assert violations(rules, solve(posed, budget=QUICK).placement) == set()


def test_the_baseline_keeps_no_constraints() -> None:
    rules = Constraints(pin=(Pin(experts=(0,), level="server", unit=3),))
    posed = problem(noisy_trace(), "1x4x1", constraints=rules)
    assert baseline_placement(posed).physical_to_logical[0].tolist() == list(range(16))


def test_methods_that_keep_no_constraints_are_refused() -> None:
    posed = problem(noisy_trace(), "1x4x1", constraints=Constraints(apart=(Apart(experts=(0, 1)),)))
    with pytest.raises(InvalidInput, match="greedy keeps no constraints; auto, lpt, tabu do"):
        solve(posed, "greedy")


def test_a_method_that_breaks_a_rule_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Constraints(pin=(Pin(experts=(0,), level="server", unit=3),))
    posed = problem(noisy_trace(), "1x4x1", constraints=rules)
    monkeypatch.setattr("placer.solvers.lpt.place", linear.place)
    with pytest.raises(PlacerError, match="method lpt breaks a constraint: layer 0: pin 1"):
        solve(posed, "lpt")


# -- the check -------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(data=st.data(), case=st.sampled_from(SHAPES), seed=st.integers(0, 9999))
def test_the_check_finds_what_a_second_one_finds(
    data: st.DataObject, case: tuple[Shape, int], seed: int
) -> None:
    shape, slots = case
    ranks, rng = shape[0] * shape[1] * shape[2], np.random.default_rng(seed)
    rows = []
    for _ in range(2):  # every expert once, and copies or nothing in some of the other slots
        row = np.concatenate([np.arange(8), rng.integers(-1, 8, ranks * slots - 8)])
        gpus = rng.permutation(row).reshape(ranks, slots)
        rows.append(np.concatenate([np.concatenate([g[g >= 0], g[g < 0]]) for g in gpus]))
    placement = Placement(physical_to_logical=np.array(rows), num_experts=8, shape=shape)
    rules = data.draw(some_rules(shape, slots, 8, layers=2))
    found = rules.check(placement)
    assert len(found) == len(set(found))
    assert {(v.rule, v.layer, v.level, v.unit, v.experts) for v in found} == violations(rules, placement)


def test_a_violation_reads_as_a_sentence() -> None:
    one = Violation(rule="apart 2", layer=3, level="server", unit=1, experts=(4, 7))
    assert str(one) == "layer 3: apart 2 is broken on server 1 by experts 4, 7"


# -- files -----------------------------------------------------------------------------------------------------

EXAMPLE = """
[[pin]]
layers = [0, 1]
experts = [3, 7]
server = 0
[[pin]]
experts = [2]
gpu = 5
[[apart]]
experts = [1, 2, 3]
level = "server"
[[free]]
gpus = [7]
slots = 1
[[free]]
gpus = [6]
"""


def test_a_file_says_what_the_values_say(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(EXAMPLE)
    assert Constraints.load(path) == Constraints(
        pin=(
            Pin(experts=(3, 7), level="server", unit=0, layers=(0, 1)),
            Pin(experts=(2,), level="gpu", unit=5),
        ),
        apart=(Apart(experts=(1, 2, 3), level="server"),),
        free=(Free(gpus=(7,), slots=1), Free(gpus=(6,))),
        source=str(path),
    )


UNREADABLE = {
    "[[pin]\n": "expected a TOML file",
    "": "found no rule, expected tables [[pin]], [[apart]] or [[free]]",
    "[[pins]]\nexperts = [1]\n": "unknown key 'pins', did you mean pin?",
    "[pin]\nexperts = [1]\n": "pin: found {'experts': [1]}, expected [[pin]] tables",
    "[[pin]]\nexpert = [1]\ngpu = 0\n": "pin 1: unknown key 'expert', did you mean experts?",
    "[[pin]]\ngpu = 0\n": "pin 1: experts: found nothing, expected a list",
    "[[pin]]\nexperts = 1\ngpu = 0\n": "pin 1: experts: found 1, expected a list",
    "[[pin]]\nexperts = []\ngpu = 0\n": "pin 1: experts: found [], expected a list",
    "[[pin]]\nexperts = [1, 1]\ngpu = 0\n": "pin 1: experts: found [1, 1], expected each number once",
    "[[pin]]\nexperts = [true]\ngpu = 0\n": "pin 1: experts: found True, expected a whole number",
    "[[pin]]\nexperts = [1]\ngpu = -1\n": "pin 1: gpu: found -1, expected a whole number",
    "[[pin]]\nexperts = [1]\n": "pin 1: found none of gpu, server and rack, expected one of them",
    "[[pin]]\nexperts = [1]\ngpu = 0\nrack = 0\n": "pin 1: found gpu and rack of gpu, server and rack",
    "[[apart]]\nexperts = [1, 2]\nlevels = 'gpu'\n": "apart 1: unknown key 'levels', did you mean level",
    "[[apart]]\nexperts = [1, 2]\nlevel = 'node'\n": "apart 1: level: found 'node', expected gpu, server or rack",
    "[[apart]]\nexperts = [1]\n": "apart 1: experts: found [1], expected at least two to keep apart",
    "[[free]]\ngpu = [1]\n": "free 1: unknown key 'gpu', did you mean gpus?",
    "[[free]]\ngpus = [1]\nslots = 1.5\n": "free 1: slots: found 1.5, expected a whole number",
}

PIN, APART = "[[pin]]\nexperts = ", "[[apart]]\nexperts = "
MISFIT = {  # 16 experts on 2 racks of 2 servers of 2 GPUs of 2 slots, layers 0 and 1
    "[[pin]]\nlayers = [2]\nexperts = [1]\ngpu = 0\n": "pin 1: layers: found 2, expected layers 0..1",
    f"{PIN}[16]\ngpu = 0\n": "pin 1: experts: found 16, expected experts 0 to 15",
    f"{PIN}[1]\ngpu = 8\n": "pin 1: gpu: found 8, expected 0 to 7",
    f"{PIN}[1]\nserver = 4\n": "pin 1: server: found 4, expected 0 to 3",
    f"{PIN}[1]\nrack = 2\n": "pin 1: rack: found 2, expected 0 to 1",
    f"{APART}[1, 99]\n": "apart 1: experts: found 99, expected experts 0 to 15",
    "[[free]]\ngpus = [8]\n": "free 1: gpus: found 8, expected GPUs 0 to 7",
    "[[free]]\ngpus = [1]\nslots = 3\n": "free 1: slots: found 3, expected 1 to 2, the slots of a GPU",
    "[[free]]\ngpus = [1]\nslots = 0\n": "free 1: slots: found 0, expected 1 to 2, the slots of a GPU",
    f"{PIN}[1]\nserver = 1\n{PIN}[1]\ngpu = 7\n": (
        "pin 2: found expert 1 pinned to gpu 7, and to server 1 by pin 1 (layer 0)"
    ),
}
IMPOSSIBLE = {
    f"{PIN}[1, 2, 3]\ngpu = 5\n": "pin 1: 3 experts are pinned to gpu 5, which has 2 slots for them (layer 0)",
    f"{PIN}[1, 2]\nserver = 0\n{PIN}[3, 4, 5]\nserver = 0\n": "pin 1: 5 experts are pinned to server 0",
    f"{APART}[0, 1, 2, 3, 4]\nlevel = 'server'\n": (
        "apart 1: 5 experts are kept apart, but only 4 servers may hold any (layer 0)"
    ),
    "[[free]]\ngpus = [3]\n": "free: 2 of 16 slots are kept empty, which leaves 14 for 16 experts (layer 0)",
    f"{PIN}[1, 2]\nrack = 1\n{PIN}[4]\ngpu = 0\n{APART}[1, 2, 3]\nlevel = 'server'\n{PIN}[3]\nrack = 1\n": (
        "pin 1 and pin 3 and apart 1 cannot hold together (layer 0)"
    ),
}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "noisy.npz"
    noisy_trace(tokens=100).save(path)
    return path


def solved(trace: Path, folder: Path, text: str, *more: object) -> Outcome:
    rules = folder / "rules.toml"
    rules.write_text(text)
    where = ("-t", "dgx-h100", "--shape", "2x2x2", "--constraints", rules, "--max-load", "none")
    return placer("solve", trace, *where, "--rounds", 1, "--no-bound", "--jobs", 1, *more)


@pytest.mark.parametrize(
    ("text", "said", "code"),
    [
        *((text, said, 2) for text, said in {**UNREADABLE, **MISFIT}.items()),
        *((text, said, 3) for text, said in IMPOSSIBLE.items()),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    text: str, said: str, code: int, trace: Path, tmp_path: Path
) -> None:
    outcome = solved(trace, tmp_path, text)
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.startswith(f"Error: {tmp_path / 'rules.toml'}: ")
    assert outcome.err.count("\n") == 1
    assert said in outcome.err


def test_a_missing_file_is_refused(trace: Path) -> None:
    outcome = placer("solve", trace, "-t", "dgx-h100", "--constraints", "nowhere.toml")
    assert (outcome.code, outcome.err) == (
        2,
        "Error: nowhere.toml: cannot be read: No such file or directory\n",
    )


# -- the commands ----------------------------------------------------------------------------------------------


def test_solve_keeps_a_file_and_check_says_so(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    outcome = solved(trace, tmp_path, EXAMPLE, "--slots-per-gpu", 3, "-o", path)
    assert outcome.code == 0, outcome.err
    held = placer("check", path, "--constraints", tmp_path / "rules.toml")
    assert (held.code, held.err) == (0, "")
    assert "constraints  none broken, of 5" in held.out
    assert Placement.load(path).provenance["constraints"] == str(tmp_path / "rules.toml")


def test_check_prints_violations_and_fails_the_gate(trace: Path, tmp_path: Path) -> None:
    path, rules = tmp_path / "p.json", tmp_path / "rules.toml"
    rules.write_text(EXAMPLE)
    where = ("-t", "dgx-h100", "--shape", "2x2x2")
    assert placer("solve", trace, *where, "--method", "random", "--no-bound", "-o", path).code == 0
    outcome = placer("check", path, "--constraints", rules, "--json")
    assert outcome.code == 5
    listed = [
        Violation(**{**row, "experts": tuple(row["experts"])}) for row in outcome.document["violations"]
    ]
    assert listed == Constraints.load(rules).check(Placement.load(path))
    assert outcome.err == "".join(f"Error: {violation}\n" for violation in listed)
    assert placer("check", path, "--json").document["violations"] is None


@pytest.mark.parametrize("other", [("--redundant", "auto"), ("--copies", 4)])
def test_options_that_are_about_copies_exclude_constraints(
    other: tuple[object, ...], trace: Path, tmp_path: Path
) -> None:
    outcome = solved(trace, tmp_path, EXAMPLE, *other)
    assert outcome.code == 2
    assert "and --constraints exclude each other" in outcome.err
