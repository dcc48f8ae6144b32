"""Slots for batches of tokens, against the evaluator that prices the same rules."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import brute
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cover import H100, copied
from test_links import Case

from placer.census import census
from placer.dispatch import complete_table, take_cover, take_table
from placer.errors import InvalidInput
from placer.placement import Placement
from tests.instances import noisy_trace

Ints = np.ndarray[Any, Any]


def layout(placement: Placement) -> dict[str, int]:
    racks, servers, gpus = placement.shape
    return {
        "slots_per_rank": placement.slots_per_rank,
        "server_ranks": gpus,
        "num_servers": racks * servers,
    }


def everywhere(case: Case, layer: int) -> tuple[Ints, Ints]:
    """The tokens of a layer from every home in turn."""
    topk, ranks = case.trace.topk_idx[:, layer], case.placement.num_ranks
    return np.repeat(topk, ranks, axis=0), np.tile(np.arange(ranks), len(topk))


def counted(case: Case, slots: Ints, homes: Ints) -> dict[str, Ints]:
    """Touched and remote units of all tokens, and the load of each unit, per level."""
    found: dict[str, Ints] = {"touched": np.zeros(3), "remote": np.zeros(3)}
    for level, size in enumerate(case.topology.unit_sizes):
        unit = np.where(slots < 0, -1, slots // case.placement.slots_per_rank // size)
        for row, home in zip(unit, homes, strict=True):
            reached = set(row[row >= 0].tolist())
            found["touched"][level] += len(reached)
            found["remote"][level] += len(reached - {home // size})
        found[f"load {level}"] = np.bincount(unit[unit >= 0], minlength=case.placement.num_ranks)
    return found


def with_table(case: Case, seed: int) -> Case:
    """The case with a slot of each expert for every server; for those that stand once, mostly no entry."""
    rng, placement = np.random.default_rng(seed), case.placement
    table = np.full((placement.num_layers, layout(placement)["num_servers"], placement.num_experts), -1)
    for layer, row in enumerate(placement.physical_to_logical):
        for expert in range(placement.num_experts):
            held = np.flatnonzero(row == expert)
            if len(held) > 1 or rng.random() < 0.3:
                table[layer, :, expert] = rng.choice(held, table.shape[1])
    return replace(case, placement=replace(placement, table=table))


def olmoe_like(seed: int = 0) -> Case:
    """64 experts, 12 copies of the hotter half, 8 servers of one GPU, eight experts a token."""
    rng = np.random.default_rng(seed)
    trace = noisy_trace(num_experts=64, top_k=8, tokens=400, layers=2, seed=seed)
    rows = []
    for _ in range(2):
        held = np.concatenate([np.arange(64), rng.choice(32, 12), np.full(4, -1)])
        grid = rng.permutation(held).reshape(8, 10)
        rows.append(np.take_along_axis(grid, np.argsort(grid < 0, axis=1, kind="stable"), axis=1).ravel())
    placement = Placement(physical_to_logical=np.array(rows), num_experts=64, shape=(1, 8, 1))
    topology = H100.with_shape("1x8x1")
    return Case(topology, brute.machine_of(placement.shape), placement, trace)


def covered(case: Case, layer: int, **options: int) -> tuple[Ints, Ints]:
    """Slots under ``cover`` of all tokens from all homes, and the homes."""
    topk, homes = everywhere(case, layer)
    slots_of = case.placement.logical_to_physical[layer]
    return take_cover(topk, homes, slots_of, **layout(case.placement), **options), homes


# -- table ------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(case=copied(), seed=st.integers(0, 99))
def test_a_table_serves_exactly_what_the_evaluator_counts(case: Case, seed: int) -> None:
    case = with_table(case, seed)
    table, ranks = complete_table(case.placement), case.placement.num_ranks
    for layer, expected in enumerate(census(case.placement, case.trace, case.topology, rule="table")):
        topk, homes = everywhere(case, layer)
        slots = take_table(topk, homes, table[layer], server_ranks=case.placement.shape[2])
        assert np.array_equal(np.where(slots < 0, -1, case.placement.physical_to_logical[layer][slots]), topk)
        found = counted(case, slots, homes)
        assert found["touched"] / ranks == pytest.approx(expected.touched.sum(axis=1))
        assert found["remote"] / ranks == pytest.approx(expected.remote.sum(axis=1))
        for level, load in enumerate(expected.load):
            assert found[f"load {level}"] / ranks == pytest.approx(load)


def test_a_table_that_leaves_copies_open_is_refused() -> None:
    placement = Placement(physical_to_logical=np.array([[0, 0]]), num_experts=1, shape=(1, 2, 1))
    with pytest.raises(InvalidInput, match="holds none"):
        complete_table(placement)
    with pytest.raises(InvalidInput, match=r"table\[0\]\[1\]: no slot for expert 0"):
        complete_table(replace(placement, table=np.array([[[0], [-1]]])))


# -- cover ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(case=copied(), first=st.integers(0, 10**6))
def test_cover_takes_one_of_the_outcomes_of_the_rule(case: Case, first: int) -> None:
    for layer, row in enumerate(case.placement.physical_to_logical):
        slots, homes = covered(case, layer, first=first)
        topk, _ = everywhere(case, layer)
        assert np.array_equal(np.where(slots < 0, -1, row[slots]), topk)
        for served, token, home in zip(slots, topk.tolist(), homes.tolist(), strict=True):
            ranks = tuple((served[served >= 0] // case.placement.slots_per_rank).tolist())
            possible = brute.outcomes(token, home, row.tolist(), case.machine, "cover", None)
            assert ranks in {outcome for _, outcome in possible}


def test_cover_reaches_as_many_servers_as_the_evaluator_expects() -> None:
    case = olmoe_like()
    for layer, expected in enumerate(census(case.placement, case.trace, case.topology, rule="cover")):
        found = counted(case, *covered(case, layer))
        assert found["remote"][1] / 8 == pytest.approx(expected.remote[1].sum(), rel=1e-12)
        assert found["load 1"] / 8 == pytest.approx(expected.load[1], rel=0.02)  # ties as they fall


def test_ties_are_shared_out_evenly() -> None:
    """Six servers, the middle four of which hold 01, 01, 12, 12: each of the pairs of sets is as good."""
    slots = np.array([[3, -1, 0, 1, 0, 1, 1, 2, 1, 2, 4, -1]])
    placement = Placement(physical_to_logical=slots, num_experts=5, shape=(1, 6, 1))
    topk, homes = np.tile([0, 1, 2], (6000, 1)), np.tile([0, 5], 3000)
    found = take_cover(topk, homes, placement.logical_to_physical[0], **layout(placement))
    times = Counter(map(tuple, found.tolist()))
    # expert 1 goes along with 0 or with 2
    assert set(times) == {(a, b, c) for a in (2, 4) for c in (7, 9) for b in (a + 1, c - 1)}
    assert all(number == pytest.approx(6000 / 8, rel=0.15) for number in times.values())


def test_a_set_that_is_found_in_two_orders_counts_once() -> None:
    """Servers A to D hold 01, 02, 1, 2: the pairs AB, AD and BC are as good, and AB starts with A or with B."""
    slots = np.array([[0, 1, 0, 2, 1, -1, 2, -1, 3, -1]])
    placement = Placement(physical_to_logical=slots, num_experts=4, shape=(1, 5, 1))
    topk, homes = np.tile([0, 1, 2], (6000, 1)), np.full(6000, 4)
    found = take_cover(topk, homes, placement.logical_to_physical[0], **layout(placement))
    times = Counter(frozenset(row) for row in (found // 2).tolist())
    assert set(times) == {frozenset(pair) for pair in ((0, 1), (0, 3), (1, 2))}
    assert all(number == pytest.approx(2000, rel=0.1) for number in times.values())


def test_the_index_of_the_first_token_continues_where_a_batch_ended() -> None:
    case = olmoe_like(1)
    topk, homes = everywhere(case, 0)
    whole, _ = covered(case, 0)
    slots_of = case.placement.logical_to_physical[0]
    parts = [
        take_cover(
            topk[start : start + 500],
            homes[start : start + 500],
            slots_of,
            first=start,
            **layout(case.placement),
        )
        for start in range(0, len(topk), 500)
    ]
    assert np.array_equal(np.concatenate(parts), whole)


def test_no_tokens_and_dropped_choices_take_no_slot() -> None:
    case = olmoe_like()
    slots_of, machine = case.placement.logical_to_physical[0], layout(case.placement)
    none = take_cover(np.zeros((0, 3), int), np.zeros(0, int), slots_of, **machine)
    assert none.shape == (0, 3)
    assert (take_cover(np.full((4, 3), -1), np.arange(4), slots_of, **machine) == -1).all()


def test_many_experts_a_token_are_told_apart_up_to_the_width_of_a_mask() -> None:
    slots_of = np.stack([np.arange(63), np.full(63, -1)], axis=1)
    machine = {"slots_per_rank": 1, "server_ranks": 1, "num_servers": 64}
    topk, home = np.arange(63)[None], np.array([63])
    assert take_cover(topk[:, :62], home, slots_of, **machine).tolist() == [list(range(62))]
    with pytest.raises(InvalidInput, match="found 63 experts a token, expected at most 62"):
        take_cover(topk, home, slots_of, **machine)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"homes of \(3,\)"):
        take_table(np.zeros((2, 1), int), np.zeros(3, int), np.zeros((1, 1), int), server_ranks=1)


@pytest.mark.parametrize(
    ("topk", "homes", "said"),
    [
        ([[3]], [0], "topk_idx: found int64 from 3 to 3, expected integers from -1 to 2"),
        ([[-2]], [0], "topk_idx: found int64 from -2 to -2"),
        ([[0.5]], [0], "topk_idx: found float64"),
        ([[True]], [0], "topk_idx: found bool"),
        ([[0]], [4], "homes: found int64 from 4 to 4, expected integers from 0 to 3"),
        ([[0]], [-1], "homes: found int64 from -1 to -1"),
    ],
)
def test_values_out_of_range_are_refused(topk: list[list[float]], homes: list[int], said: str) -> None:
    ids, ranks, table = np.array(topk), np.array(homes), np.zeros((2, 3), int)
    with pytest.raises(InvalidInput, match=said):
        take_table(ids, ranks, table, server_ranks=2)
    with pytest.raises(InvalidInput, match=said):
        take_cover(ids, ranks, table.T, slots_per_rank=1, server_ranks=2, num_servers=2)


def test_lists_and_machines_without_ranks_are_refused() -> None:
    with pytest.raises(InvalidInput, match="found list and list, expected numpy arrays or torch tensors"):
        take_table([[0]], [0], np.zeros((1, 1), int), server_ranks=1)
    with pytest.raises(InvalidInput, match="ranks: found 0"):
        take_table(np.zeros((1, 1), int), np.zeros(1, int), np.zeros((1, 1), int), server_ranks=0)


def test_ids_of_any_integer_type_are_taken() -> None:
    case = olmoe_like()
    topk, homes = everywhere(case, 0)
    topk = np.maximum(topk, 0)
    slots_of, machine = case.placement.logical_to_physical[0], layout(case.placement)
    expected = take_cover(topk.astype(np.int64), homes, slots_of, **machine)
    for dtype in (np.uint8, np.int16, np.uint32):
        assert np.array_equal(take_cover(topk.astype(dtype), homes, slots_of, **machine), expected)


# -- torch ------------------------------------------------------------------------------------------------------


def test_the_module_does_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import placer.dispatch"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_tensors_take_the_same_slots() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    case = with_table(olmoe_like(), 0)
    topk, homes = everywhere(case, 0)
    moved = [torch.as_tensor(each) for each in (topk.astype(np.int32), homes)]
    slots_of, machine = case.placement.logical_to_physical[0], layout(case.placement)
    found = take_cover(*moved, torch.tensor(slots_of), **machine)
    assert found.dtype == torch.int64
    assert np.array_equal(found.numpy(), take_cover(topk, homes, slots_of, **machine))
    table = complete_table(case.placement)[0]
    found = take_table(*moved, torch.tensor(table), server_ranks=1)
    assert np.array_equal(found.numpy(), take_table(topk, homes, table, server_ranks=1))
