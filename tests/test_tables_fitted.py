"""Dispatch tables fitted to a placement, against enumeration of all tables; solving for the rules that need choices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer import Budget, Placement, Problem, Trace, evaluate, solve
from placer.errors import InvalidInput
from placer.layer import Layer
from placer.solvers import method, names
from placer.tables import fitted_table, judged
from tests.instances import noisy_trace, problem

Slots = npt.NDArray[np.int32]
Table = npt.NDArray[np.int32]

SERVER = 1  # position of the level
COPYING = [name for name in names() if "copies" in method(name).handles]
QUICK = Budget(seconds=None, rounds=1)


def posed_for(topk: npt.NDArray[Any], experts: int, shape: str, slots: int, **options: Any) -> Problem:
    trace = Trace(topk_idx=topk[:, None].astype(np.int16), num_experts=experts)
    return problem(trace, shape, slots_per_gpu=slots, replica_choice="table", **options)


def copied_slots(
    rng: np.random.Generator, experts: int, ranks: int, per_rank: int, most_copies: int = 4
) -> Slots:
    """Every expert somewhere and most with copies, none twice on a GPU, empty slots last within a GPU."""
    rows: list[list[int]] = [[] for _ in range(ranks)]
    wanted = [*range(experts), *rng.permutation(np.repeat(np.arange(experts), most_copies - 1)).tolist()]
    for expert in wanted:
        free = [row for row in rows if len(row) < per_rank and expert not in row]
        if free:
            least = min(map(len, free))
            near = [row for row in free if len(row) == least]
            near[int(rng.integers(len(near)))].append(expert)
    return np.array([[*row, *[-1] * (per_rank - len(row))] for row in rows], np.int32).ravel()


@st.composite
def layers(draw: st.DrawFn) -> tuple[Layer, Slots]:
    """Up to eight servers of up to three GPUs, or one server."""
    shape = draw(
        st.sampled_from([(1, 4, 1), (1, 3, 2), (2, 2, 1), (1, 8, 1), (2, 2, 2), (1, 1, 4), (1, 2, 3)])
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    experts, ranks = draw(st.integers(4, 9)), int(np.prod(shape))
    per_rank = -(-experts // ranks) + draw(st.integers(1, 2))
    topk = np.argsort(rng.random((40, experts)) * rng.random(experts), axis=1)[:, : draw(st.integers(1, 4))]
    topk[rng.random(topk.shape) < 0.1] = -1
    layer = posed_for(
        topk,
        experts,
        "x".join(map(str, shape)),
        per_rank,
        max_load=draw(st.sampled_from([None, 1.0, 1.2])),
    ).layer(0)
    return layer, copied_slots(rng, experts, ranks, per_rank)


def tables(layer: Layer, slots: Slots) -> Iterator[Table]:
    """All that take own copies, of servers of one GPU; of a single server, all."""
    servers = layer.num_ranks // layer.server_ranks
    width = layer.num_slots // servers
    options = []
    for server in range(servers):
        for expert in range(layer.num_experts):
            held = np.flatnonzero(slots == expert)
            own = held[held // width == server] if servers > 1 else held[:0]
            options.append((own if len(own) else held).tolist())
    for chosen in product(*options):
        yield np.array(chosen, np.int32).reshape(servers, -1)


def first_copies(layer: Layer, slots: Slots) -> Table:
    """The table that looks at nothing."""
    first = [int(np.flatnonzero(slots == expert)[0]) for expert in range(layer.num_experts)]
    return np.tile(np.array(first, np.int32), (layer.num_ranks // layer.server_ranks, 1))


# -- what any table is ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(case=layers())
def test_a_fitted_table_names_slots_that_hold_the_expert_and_own_ones_first(
    case: tuple[Layer, Slots],
) -> None:
    layer, slots = case
    servers = layer.num_ranks // layer.server_ranks
    table = fitted_table(layer, slots)
    if np.bincount(slots[slots >= 0]).max() == 1:
        assert table is None
        return
    assert table is not None
    assert table.shape == (servers, layer.num_experts)
    assert table.dtype == np.int32
    assert (slots[table] == np.arange(layer.num_experts)).all()
    shape = (1, servers, layer.server_ranks)
    Placement(
        physical_to_logical=slots[None],
        num_experts=layer.num_experts,
        shape=shape,
        rule="table",
        table=table[None],
    )
    width = layer.num_slots // servers
    for server, row in enumerate(table):
        for expert, slot in enumerate(row.tolist()):
            held = np.flatnonzero(slots == expert) // width
            assert slot // width == server or server not in held


@settings(max_examples=60, deadline=None)
@given(case=layers())
def test_without_a_cap_no_table_of_first_copies_is_better(case: tuple[Layer, Slots]) -> None:
    layer, slots = case
    layer = replace(layer, max_load=None)
    table = fitted_table(layer, slots)
    level = SERVER if layer.server_ranks < layer.num_ranks else 0
    if table is not None:
        found, simple = (
            layer.counts(slots, t).remote[level].sum() for t in (table, first_copies(layer, slots))
        )
        if level == SERVER:
            assert found <= simple + 1e-9
        touched, plain = (
            layer.counts(slots, t).touched[level].sum() for t in (table, first_copies(layer, slots))
        )
        if level == 0:
            assert touched <= plain + 1e-9


@settings(max_examples=20, deadline=None)
@given(case=layers())
def test_judging_without_a_table_fits_one(case: tuple[Layer, Slots]) -> None:
    layer, slots = case
    value, table = judged(layer, slots)
    fitted = fitted_table(layer, slots)
    assert (table is None) == (fitted is None)
    if table is not None and fitted is not None:
        assert np.array_equal(table, fitted)
    assert value == layer.judge(slots, table)
    given_one = first_copies(layer, slots)
    value, kept = judged(layer, slots, given_one)
    assert kept is given_one
    assert value == layer.judge(slots, given_one)
    assert judged(replace(layer, rule="nearest"), slots)[1] is None


def test_without_copies_there_is_no_table() -> None:
    layer = posed_for(np.array([[0, 1], [2, 3]]), 4, "1x2x1", 3).layer(0)
    assert fitted_table(layer, np.array([0, 1, -1, 2, 3, -1], np.int32)) is None
    assert fitted_table(layer, np.array([0, 1, -1, 2, 3, 0], np.int32)) is not None


def test_several_copies_in_one_server_are_taken_in_turn() -> None:
    """Expert 0 on both GPUs of the first of four servers."""
    topk = np.array([[0, 1], [0, 2], [0, 3]])
    layer = posed_for(topk, 4, "1x4x2", 1).layer(0)
    table = fitted_table(layer, np.array([0, 0, 1, -1, 2, -1, 3, -1], np.int32))
    assert table is not None
    assert table[:, 0].tolist() == [0, 1, 0, 1]
    assert layer.counts(np.array([0, 0, 1, -1, 2, -1, 3, -1], np.int32), table).load[0, :2].tolist() == [
        1.5,
        1.5,
    ]


def test_a_table_sends_an_expert_where_the_token_goes_anyway() -> None:
    """Expert 0 beside 2 and beside 3; the server of expert 1 has tokens of {0, 2} only or {0, 3} only."""
    slots = np.array([1, -1, 0, 2, 0, 3], np.int32)
    for partner, slot in ((2, 2), (3, 4)):
        topk = np.array([[0, partner]] * 5 + [[1, -1]])
        layer = posed_for(topk, 4, "1x3x1", 2).layer(0)
        table = fitted_table(layer, slots)
        assert table is not None
        assert table[:, 0].tolist() == [slot, 2, 4]


# -- against all tables ---------------------------------------------------------------------------------------------


def small(seed: int, max_load: float | None = None, shape: str = "1x4x1") -> tuple[Layer, Slots]:
    """Five experts on four servers or GPUs of two slots, three of them twice: 64 tables, or 8 for one server."""
    rng = np.random.default_rng(seed)
    topk = np.argsort(rng.gumbel(size=(80, 5)) + rng.normal(size=5) * 0.7, axis=1)[:, :3]
    slots = copied_slots(rng, 5, 4, 2, most_copies=2)
    return posed_for(topk, 5, shape, 2, max_load=max_load).layer(0), slots


@pytest.mark.parametrize(("shape", "expected"), [("1x4x1", 11), ("1x1x4", 16)])
def test_the_best_of_all_tables_is_found_in_most_small_cases(shape: str, expected: int) -> None:
    """Twenty seeded cases."""
    hits = 0
    for seed in range(20):
        layer, slots = small(seed, shape=shape)
        table = fitted_table(layer, slots)
        assert table is not None
        cost = layer.score(slots, table)[1]
        least = min(layer.score(slots, other)[1] for other in tables(layer, slots))
        assert least * (1 - 1e-12) <= cost <= 1.1 * least
        hits += cost <= least * (1 + 1e-12)
    assert hits >= expected


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), shape=st.sampled_from(["1x4x1", "1x1x4"]))
def test_no_single_entry_of_a_fitted_table_can_be_bettered(seed: int, shape: str) -> None:
    layer, slots = small(seed, shape=shape)
    table = fitted_table(layer, slots)
    assert table is not None
    cost = layer.score(slots, table)[1]
    for other in tables(layer, slots):
        if (other != table).sum() == 1:
            assert layer.score(slots, other)[1] >= cost * (1 - 1e-12)


def test_the_cap_is_kept_where_some_table_keeps_it() -> None:
    """Counted are cases in which the table for no cap breaks it; one of them ends dearer than it need."""
    asked = cheapest = 0
    for seed in range(30):
        free, slots = small(seed)
        layer = replace(free, max_load=1.1)
        table, uncapped = fitted_table(layer, slots), fitted_table(free, slots)
        assert table is not None
        assert uncapped is not None
        least = min(layer.score(slots, other) for other in tables(layer, slots))
        if layer.score(slots, uncapped)[0] > 0 == least[0]:
            asked += 1
            excess, cost = layer.score(slots, table)
            assert excess == 0
            cheapest += cost <= least[1] * (1 + 1e-12)
    assert asked >= 8
    assert cheapest >= asked - 1


def test_a_cap_decides_between_equally_near_copies() -> None:
    """Servers hold 01, 01, 2, 3 and tokens use {0, 1}: half of those of the last two go to each of the first."""
    topk = np.array([[0, 1]] * 12 + [[2, 3]])
    slots = np.array([0, 1, 0, 1, 2, -1, 3, -1], np.int32)
    free, capped = (posed_for(topk, 4, "1x4x1", 2, max_load=cap).layer(0) for cap in (None, 1.0))
    table = fitted_table(free, slots)
    assert table is not None
    assert free.counts(slots, table).load[SERVER].tolist() == [18.0, 6.0, 1.0, 1.0]
    table = fitted_table(capped, slots)
    assert table is not None
    assert capped.counts(slots, table).load[SERVER].tolist() == [12.0, 12.0, 1.0, 1.0]
    assert (table[:, 0] // 2).tolist() == (table[:, 1] // 2).tolist()


def test_a_single_server_fits_one_row_for_its_gpus() -> None:
    """GPUs hold 01, 02, 3: tokens of {0, 2} are served by one GPU, not two."""
    layer = posed_for(np.array([[0, 2]] * 5 + [[0, 1]] * 2), 4, "1x1x3", 2).layer(0)
    slots = np.array([0, 1, 0, 2, 3, -1], np.int32)
    table = fitted_table(layer, slots)
    assert table is not None
    assert table.tolist() == [[2, 1, 3, 4]]


@pytest.mark.parametrize(
    ("shape", "what"), [("1x65x1", "65 units"), ("5x13x2", "65 units"), ("1x1x66", "66")]
)
def test_more_units_than_bits_of_a_mask_are_refused_in_one_line(shape: str, what: str) -> None:
    racks, servers, gpus = (int(part) for part in shape.split("x"))
    ranks = racks * servers * gpus
    layer = posed_for(np.array([[0, 1], [2, 3]]), 4, shape, 1).layer(0)
    slots = np.full(ranks, -1, np.int32)
    slots[:5] = [0, 1, 2, 3, 0]
    with pytest.raises(InvalidInput, match=f"found {what}.*expected at most 64") as caught:
        fitted_table(layer, slots)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", ["1x64x1", "1x1x64"])
def test_as_many_units_as_bits_of_a_mask_are_fitted(shape: str) -> None:
    """The last two units hold {1, 0} and {2, 0}: what the first one's tokens take goes with 2 to the last."""
    layer = posed_for(np.array([[0, 2]] * 3), 4, shape, 2).layer(0)
    slots = np.full(128, -1, np.int32)
    slots[0] = 3
    slots[124:] = [1, 0, 2, 0]
    table = fitted_table(layer, slots)
    assert table is not None
    assert table[0].tolist() == [127, 124, 126, 0]


# -- solving with it -------------------------------------------------------------------------------------------------


def priced(posed: Problem, placement: Placement, trace: Trace) -> float:
    """The objective by the evaluator: link seconds of remote units, all layers, a token."""
    report = evaluate(placement, trace, posed.topology, model=posed.model)
    assert report.replica_choice == posed.replica_choice
    names_of = [level.name for level in posed.topology.levels]
    seconds = dict(zip(names_of, posed.seconds_per_vector, strict=True))
    return sum(seconds[name] * report.remote[name] * posed.num_layers for name in names_of)


@pytest.mark.parametrize("rule", ["table", "cover"])
@pytest.mark.parametrize("name", COPYING)
@pytest.mark.parametrize("shape", ["1x4x2", "2x2x1", "1x1x4"])
def test_what_is_solved_is_what_the_evaluator_prices(
    name: str, rule: str, shape: str, tmp_path: Path
) -> None:
    trace = noisy_trace(tokens=200)
    ranks = int(np.prod([int(part) for part in shape.split("x")]))
    posed = problem(trace, shape, slots_per_gpu=16 // ranks + 1, max_load=1.2, replica_choice=rule)
    result = solve(posed, name, budget=QUICK)
    placement = result.placement
    assert placement.rule == rule
    copied = (placement.replica_count > 1).any()
    assert (placement.table is not None) == (rule == "table" and bool(copied))
    assert copied or (name, rule, shape) == ("auto", "table", "1x1x4")  # where one copy serves all homes
    placement.save(tmp_path / "placement.json")
    again = Placement.load(tmp_path / "placement.json")
    assert again.digest == placement.digest
    if placement.table is not None:
        assert again.table is not None
        assert np.array_equal(again.table, placement.table)
    assert priced(posed, again, trace) == pytest.approx(result.objective, rel=1e-9)


def test_a_fitted_table_beats_the_nearest_copies_of_the_same_slots() -> None:
    trace = noisy_trace()
    posed = problem(trace, "1x4x1", slots_per_gpu=6, replica_choice="table")
    result = solve(posed, "auto", budget=QUICK)
    nearest = evaluate(result.placement, trace, posed.topology, model=posed.model, replica_choice="nearest")
    cover = evaluate(result.placement, trace, posed.topology, model=posed.model, replica_choice="cover")
    table = evaluate(result.placement, trace, posed.topology, model=posed.model)
    assert cover.remote["server"] <= table.remote["server"] < nearest.remote["server"]


def test_a_table_of_a_layer_without_copies_is_left_open() -> None:
    """No expert of the second layer is used, so nothing is gained by copying any."""
    topk = noisy_trace(layers=2, tokens=200).topk_idx.copy()
    topk[:, 1] = -1
    trace = Trace(topk_idx=topk, num_experts=16)
    posed = problem(trace, "1x4x1", slots_per_gpu=5, replica_choice="table")
    result = solve(posed, "auto", budget=QUICK)
    assert result.placement.table is not None
    copied = result.placement.replica_count.max(axis=1) > 1
    assert copied[0]
    for layer, table in enumerate(result.placement.table):
        assert (table >= 0).all() if copied[layer] else (table == -1).all()
    assert priced(posed, result.placement, trace) == pytest.approx(result.objective, rel=1e-9)


def test_a_start_with_copies_keeps_a_table_that_prices_it() -> None:
    trace = noisy_trace(tokens=200)
    posed = problem(trace, "1x4x1", slots_per_gpu=6, replica_choice="table")
    start = solve(posed, "auto", budget=QUICK).placement
    result = solve(posed, "linear", budget=Budget(seconds=0), initial=start)
    assert np.array_equal(result.placement.physical_to_logical, start.physical_to_logical)
    assert priced(posed, result.placement, trace) == pytest.approx(result.objective, rel=1e-9)


# -- cover, in the words of an outside judge ----------------------------------------------------------------------


def greedy_cover(
    holders: dict[int, set[int]], token: list[int], home: int, rng: np.random.Generator
) -> tuple[set[int], list[int]]:
    """Units used besides the home's, and the unit that serves each expert; exact for three experts a token."""
    left = [e for e in token if home not in holders[e]]
    used = {unit for e in left if len(holders[e]) == 1 for unit in holders[e]}
    rest = [e for e in left if not holders[e] & used]
    while rest:
        counts = {unit: sum(unit in holders[e] for e in rest) for e in rest for unit in holders[e]}
        best = [unit for unit, count in sorted(counts.items()) if count == max(counts.values())]
        used.add(int(rng.choice(best)))
        rest = [e for e in rest if not holders[e] & used]
    options = [[home] if e not in left else sorted(holders[e] & used) for e in token]
    return used, [int(rng.choice(units)) for units in options]


@pytest.mark.parametrize("shape", ["1x4x1", "1x5x2"])
def test_cover_agrees_with_a_greedy_cover_of_every_token(shape: str) -> None:
    trace = noisy_trace(top_k=3, tokens=300, layers=1)
    servers, gpus = (int(part) for part in shape.split("x")[1:])
    posed = problem(trace, shape, slots_per_gpu=-(-28 // servers // gpus), replica_choice="cover")
    placement = solve(posed, "auto", budget=QUICK).placement
    content = placement.physical_to_logical[0].reshape(servers, -1)
    holders = {e: {u for u in range(servers) if e in content[u]} for e in range(16)}
    assert max(map(len, holders.values())) > 2
    rng, load, remote = np.random.default_rng(0), np.zeros(servers), 0
    for token in trace.topk_idx[:, 0].tolist():
        for home in range(servers):
            used, served = greedy_cover(holders, [e for e in token if e >= 0], home, rng)
            remote += len(used)
            np.add.at(load, served, 1)
    report = evaluate(placement, trace, posed.topology, model=posed.model)
    assert report.remote["server"] == pytest.approx(remote / servers / 300, rel=1e-9)
    assert report.load["server"]["max_over_mean"] == pytest.approx(load.max() / load.mean(), abs=0.06)
