"""Copies dealt to the layers where they pay most."""

from __future__ import annotations

import itertools
import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from terminal import placer

from placer import Budget, Model, Placement, Problem, Result, Trace, evaluate, shared_out, solve
from placer.allotment import candidates, even_slots, relabelled, resized, thinned
from placer.errors import Infeasible, InvalidInput
from placer.knapsack import knapsack
from placer.tables import judged
from tests.instances import noisy_trace, problem

TOY = Model(name="toy", hidden_size=1000, expert_width=1000)  # 6 MB an expert
QUICK = Budget(seconds=None, rounds=1)


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Three layers that differ: soft clusters, a layer of two hot experts, and a layer of one set of experts."""
    ids = np.array(noisy_trace(layers=3).topk_idx)
    rng = np.random.default_rng(1)
    ids[:, 1, 2:] = -1
    ids[:, 1, :2] = np.where(rng.random((600, 1)) < 0.7, [0, 5], ids[:, 1, :2])
    ids[:, 1, 1] = np.where(ids[:, 1, 1] == ids[:, 1, 0], -1, ids[:, 1, 1])
    ids[:, 2] = [0, 1, 2, 3]
    return Trace(topk_idx=ids, num_experts=16, sequence=np.arange(600) // 20, name="uneven")


@pytest.fixture(scope="module")
def posed(trace: Trace) -> Problem:
    return problem(trace, "1x4x1", model=TOY, reserve=0.0)


def copies_of(result: Result) -> list[int]:
    """Copies of every layer."""
    slots = result.placement.physical_to_logical
    return [int(count) - result.placement.num_experts for count in (slots >= 0).sum(axis=1)]


def seconds_on_links(result: Result, trace: Trace, posed: Problem) -> float:
    """What the evaluator says that a token of the trace costs on the links."""
    remote = evaluate(result.placement, trace, posed.topology, model=posed.model).remote
    names = [level.name for level in posed.topology.levels]
    per_layer = sum(
        seconds * remote[name] for name, seconds in zip(names, posed.seconds_per_vector, strict=True)
    )
    return per_layer * trace.num_layers


# -- the knapsack --------------------------------------------------------------------------------------------


@st.composite
def knapsacks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, np.ndarray, np.ndarray]:
    layers, choices = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (layers, choices)
    excess = rng.choice([0.0, 0.0, 0.0, 2.5, 7.25], size=shape)
    cost = rng.choice([1e-3, 1.0], size=()) * rng.integers(0, 6, size=shape).astype(float)
    cost[:, 1:][rng.random((layers, choices - 1)) < 0.2] = np.inf
    held = rng.integers(0, 4, size=(*shape, 2))
    limit = draw(st.integers(0, 12))
    return excess, cost, held.sum(axis=2), limit, held, rng.integers(0, 12, size=2)


@given(case=knapsacks())
@settings(max_examples=80, deadline=None)
def test_the_knapsack_agrees_with_trying_everything(
    case: tuple[np.ndarray, np.ndarray, np.ndarray, int, np.ndarray, np.ndarray],
) -> None:
    excess, cost, copies, limit, held, room = case
    rows = np.arange(len(cost))
    best: tuple[float, float, int] | None = None
    for picks in itertools.product(range(cost.shape[1]), repeat=len(cost)):
        at = (rows, np.array(picks))
        fits = copies[at].sum() <= limit and (held[at].sum(axis=0) <= room).all()
        if fits and np.isfinite(cost[at]).all():
            value = (excess[at].sum(), round(cost[at].sum(), 9), int(copies[at].sum()))
            best = value if best is None else min(best, value)
    if best is None:
        with pytest.raises(Infeasible):
            knapsack(excess, cost, copies, limit, held=held, room=room)
        return
    at = (rows, knapsack(excess, cost, copies, limit, held=held, room=room))
    assert copies[at].sum() <= limit
    assert (held[at].sum(axis=0) <= room).all()
    assert (excess[at].sum(), round(cost[at].sum(), 9), int(copies[at].sum())) == best


def test_a_tiny_gain_in_one_layer_is_seen_beside_large_costs() -> None:
    cost = np.array([[1e6, 2e6], [1e-3, 2e-3], [5.0, 5.0 - 1e-9]])
    copies = np.array([[0, 1], [0, 1], [0, 1]])
    assert knapsack(np.zeros_like(cost), cost, copies, 3).tolist() == [0, 0, 0]  # below a part in 2**40
    cost[2] = [5.0, 4.99]
    assert knapsack(np.zeros_like(cost), cost, copies, 3).tolist() == [0, 0, 1]


# -- the pieces ----------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32 - 1), kept=st.integers(-1, 14), shape=st.sampled_from(["1x4x1", "1x2x2"]))
@settings(max_examples=30, deadline=None)
def test_thinning_drops_copies_and_nothing_else(seed: int, kept: int, shape: str) -> None:
    rng = np.random.default_rng(seed)
    layer = problem(noisy_trace(tokens=40, layers=1), shape, slots_per_gpu=7).layer(0)
    before = np.sort(rng.permutation(np.r_[np.arange(16), rng.integers(-1, 16, 12)]).reshape(4, 7), axis=1)
    before = before[:, ::-1].astype(np.int32)
    after = thinned(layer, before.ravel().copy(), kept).reshape(4, 7)
    copies = int((before >= 0).sum()) - 16
    assert (after >= 0).sum() - 16 == min(copies, max(0, kept))
    assert set(after[after >= 0].tolist()) == set(range(16))
    assert not ((after[:, :-1] < 0) & (after[:, 1:] >= 0)).any()
    for old, new in zip(before, after, strict=True):
        assert (np.bincount(new[new >= 0], minlength=16) <= np.bincount(old[old >= 0], minlength=16)).all()


@given(seed=st.integers(0, 2**32 - 1), wider=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_table_follows_its_slots(seed: int, wider: int) -> None:
    rng = np.random.default_rng(seed)
    slots = rng.permutation(12).astype(np.int32)
    table = rng.integers(-1, 12, size=(3, 5)).astype(np.int32)
    moved, there = resized(slots, 4, 3 + wider), relabelled(table, 3, 3 + wider)
    assert (there < 0).tolist() == (table < 0).tolist()
    assert moved[there[table >= 0]].tolist() == slots[table[table >= 0]].tolist()
    assert resized(moved, 4, 3).tolist() == slots.tolist()
    assert relabelled(there, 3 + wider, 3).tolist() == table.tolist()


def test_what_is_tried_fits_the_copies_and_the_memory(posed: Problem) -> None:
    assert candidates(posed, 0) == [4]
    assert candidates(posed, 1) == [4, 5]  # thinned
    assert candidates(posed, 12) == [4, 5, 6]  # the even share is 5; one layer could have 12 on 7 slots
    assert candidates(posed, 24) == [4, 5, 6, 8]
    assert candidates(posed, 24, "lpt") == [4]
    assert candidates(replace(posed, gpu_memory=13 * 6e6), 24) == [4, 5]  # 4 + 4 + 5
    assert candidates(replace(posed, gpu_memory=12 * 6e6), 24) == [4]
    assert even_slots(posed, 10**6) == 16


# -- whole models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["nearest", "spread", "table", "cover"])
@pytest.mark.parametrize("shape", ["1x4x1", "1x2x2"])
def test_the_evaluator_agrees_with_the_sum_of_the_layers(trace: Trace, rule: str, shape: str) -> None:
    posed = problem(trace, shape, model=TOY, reserve=0.0, replica_choice=rule)
    result = shared_out(posed, "eplb", copies=12, budget=QUICK)
    assert 0 < sum(copies_of(result)) <= 12
    assert result.objective == pytest.approx(seconds_on_links(result, trace, posed), rel=1e-9)
    assert (result.placement.table is not None) == (rule == "table")
    assert result.placement.rule == rule


@pytest.mark.parametrize("method", ["linear", "eplb", "auto"])
@pytest.mark.parametrize("copies", [12, 24])
def test_no_worse_than_an_even_split_of_as_many(posed: Problem, method: str, copies: int) -> None:
    even = solve(replace(posed, slots_per_rank=even_slots(posed, copies)), method, budget=QUICK)
    assert sum(copies_of(even)) <= copies
    result = shared_out(posed, method, copies=copies, budget=QUICK)
    assert sum(copies_of(result)) <= copies
    assert result.objective <= even.objective * (1 + 1e-9)


def test_copies_go_where_they_pay(posed: Problem) -> None:
    result = shared_out(posed, "linear", copies=12, budget=QUICK)
    assert copies_of(result)[2] == 0  # experts 0 to 3 stand together as it is
    assert max(copies_of(result)) > 4  # more than the even share
    assert result.placement.slots_per_rank == max(5, -(-(16 + max(copies_of(result))) // 4))


def test_load_above_the_caps_comes_first(posed: Problem) -> None:
    capped = replace(posed, max_load=1.0)
    widest = replace(capped, slots_per_rank=candidates(capped, 12)[-1], load_margin=0.0)

    def judged(result: Result) -> tuple[float, float]:
        layers = [replace(widest.layer(index), copies=True) for index in range(3)]
        rows = [resized(row, 4, widest.slots_per_rank) for row in result.placement.physical_to_logical]
        values = [layer.score(row) for layer, row in zip(layers, rows, strict=True)]
        return round(sum(over for over, _ in values), 4), sum(cost for _, cost in values)

    even = solve(replace(capped, slots_per_rank=even_slots(capped, 12)), "eplb", budget=QUICK)
    tight, free = (shared_out(each, "eplb", copies=12, budget=QUICK) for each in (capped, posed))
    assert judged(tight) <= judged(even)
    assert judged(tight)[0] < judged(free)[0]
    assert judged(tight)[1] > judged(free)[1]


@pytest.mark.parametrize(("copies", "most"), [(0, 0), (1, 1), (3, 3), (10**6, 3 * 48)])
def test_the_limit_is_on_copies_held(posed: Problem, copies: int, most: int) -> None:
    result = shared_out(posed, "linear", copies=copies, budget=QUICK)
    assert sum(copies_of(result)) <= most
    assert copies == 0 or sum(copies_of(result)) > 0
    assert f"{sum(copies_of(result))} of {copies} copies over 3 layers: " in result.notes[-1]


def test_experts_that_do_not_divide_need_no_copies(trace: Trace) -> None:
    posed = problem(trace, "1x3x1", slots_per_gpu=6)  # 18 slots, which linear fills
    assert copies_of(shared_out(posed, "linear", copies=0, budget=QUICK)) == [0, 0, 0]
    assert sum(copies_of(shared_out(posed, "linear", copies=3, budget=QUICK))) <= 3


def test_one_layer_may_have_more_than_memory_would_hold_in_all(posed: Problem) -> None:
    tight = replace(posed, gpu_memory=13 * 6e6)  # 4 slots in two layers and 5 in one
    with pytest.raises(Infeasible):
        solve(replace(tight, slots_per_rank=5), "linear", budget=QUICK)
    result = shared_out(tight, "linear", copies=24, budget=QUICK)
    held = (result.placement.physical_to_logical >= 0).reshape(3, 4, -1).sum(axis=(0, 2))
    assert 0 < sum(copies_of(result)) <= 4
    assert held.max() <= 13


@pytest.mark.parametrize(("shape", "copies"), [("1x4x1", 2), ("1x4x1", 12), ("1x2x2", 8), ("1x3x1", 4)])
def test_no_gpu_holds_more_than_its_share(trace: Trace, shape: str, copies: int) -> None:
    posed = problem(trace, shape, slots_per_gpu=6)
    least = math.ceil(16 / posed.num_ranks)
    share = max(3 * least, math.ceil((48 + copies) / posed.num_ranks))

    def fullest(result: Result) -> int:
        held = (result.placement.physical_to_logical >= 0).reshape(3, posed.num_ranks, -1)
        return int(held.sum(axis=(0, 2)).max())

    wide = replace(posed, slots_per_rank=2 * least)
    assert fullest(solve(wide, "tabu", budget=QUICK)) > share  # few GPUs that hold nearly all
    result = shared_out(posed, "tabu", copies=copies, slots=(least, 2 * least), budget=QUICK)
    assert fullest(result) <= share


def test_methods_without_copies_say_so(posed: Problem) -> None:
    result = shared_out(posed, "lpt", copies=8, budget=QUICK)
    assert copies_of(result) == [0, 0, 0]
    assert result.notes[-1] == "no copies: lpt makes none"


def test_a_stop_keeps_what_is_done_and_says_so(posed: Problem) -> None:
    stop = threading.Event()
    result = shared_out(posed, "linear", copies=12, stop=stop, on_event=lambda event: stop.set())
    assert (result.status, result.placement.slots_per_rank) == ("interrupted", 4)


def test_the_same_for_any_number_of_jobs(posed: Problem) -> None:
    one, two = (shared_out(posed, "auto", copies=8, budget=QUICK, jobs=jobs) for jobs in (1, 2))
    assert one.placement.digest == two.placement.digest


def test_nonsense_is_refused(posed: Problem) -> None:
    with pytest.raises(InvalidInput, match="copies: found -1, expected 0 or more"):
        shared_out(posed, copies=-1)
    with pytest.raises(InvalidInput, match="found no number of slots"):
        shared_out(posed, copies=1, slots=())


# -- the command ---------------------------------------------------------------------------------------------

MACHINE = ("-t", "dgx-h100", "--shape", "1x4x1")
SIZED = ("--model", "mixtral-8x7b", "--reserve", "0GB")  # 0.352 GB an expert


@pytest.fixture(scope="module")
def file(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "uneven.npz"
    trace.save(path)
    return path


def test_solve_shares_out_and_check_counts_held_slots_only(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    memory = (*SIZED, "--gpu-memory", "4.6GB")  # 13 experts over three layers
    outcome = placer(
        "solve", file, *MACHINE, *memory, "--method", "linear", "--copies", 12, "-o", path, "--json"
    )
    assert outcome.code == 0
    placement = Placement.load(path)
    assert placement.slots_per_rank == 5  # in three layers 15 experts a GPU, which would be 5.3 GB
    held = int((placement.physical_to_logical >= 0).sum()) - 48
    assert outcome.document["notes"][-1] == f"{held} of 12 copies over 3 layers: 0 to {held} a layer"
    assert placement.provenance["copies"] == 12
    assert "4 ranks x 4, 5 slots" in outcome.err
    checked = placer("check", path, file, *memory, "--json")
    assert checked.code == 0
    assert checked.document["worst_gpu_bytes"] == pytest.approx(13 * 3 * 4096 * 14336 * 2)
    assert placer("check", path, file, *SIZED, "--gpu-memory", "4.5GB").code == 3
    assert placer("evaluate", path, file, "-t", "dgx-h100", *memory).code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--copies", "many"), "found 'many', expected a number of 0 or more"),
        (("--copies", "-1"), "found '-1', expected a number of 0 or more"),
        (("--copies", "4", "--redundant", "0"), "--copies and --redundant exclude each other"),
        (("--copies", "4", "--redundant", "auto"), "--copies and --redundant exclude each other"),
        (("--copies", "4", "--slots-per-gpu", 5), "--copies and --slots-per-gpu exclude each other"),
        (("--copies", "4", "--max-load", "auto"), "--copies and --max-load auto exclude each other"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(file: Path, arguments: tuple[object, ...], words: str) -> None:
    outcome = placer("solve", file, *MACHINE, *arguments)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert words in outcome.err


def test_layers_above_their_caps_are_named_and_no_unit_is_heaped() -> None:
    """Two hot experts; of their copies one alone would put both on one unit."""
    rng = np.random.default_rng(0)
    topk = np.array([[rng.choice([0, 1]), 2 + rng.integers(6)] for _ in range(400)])
    trace = Trace(topk_idx=np.stack([topk, topk], axis=1), num_experts=8)
    posed = problem(trace, "1x4x1", max_load=1.05)
    solved = shared_out(posed, "auto", copies=1, budget=Budget(seconds=None, rounds=2))
    single = solve(posed, "auto", budget=Budget(seconds=None, rounds=2))
    width = max(candidates(posed, 1))  # under whose caps layers are compared
    layers = [replace(posed, slots_per_rank=width).layer(at, copies=True) for at in (0, 1)]
    rows = [resized(row, 4, width) for row in solved.placement.physical_to_logical]
    heats = [judged(layer, row)[0] for layer, row in zip(layers, rows, strict=True)]
    above = sum(excess > 0 for excess, _, _ in heats)
    assert above > 0
    assert any(note.startswith(f"load is above the caps in {above} of 2 layers") for note in solved.notes)
    alone = [posed.layer(at).judge(single.placement.physical_to_logical[at])[2] for at in (0, 1)]
    assert max(heat for _, _, heat in heats) <= max(alone) + 1e-9
    assert {(row["layer"], row["asked"]) for row in solved.caps_raised} <= {(0, 1.05), (1, 1.05)}
