from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.clock import Clock
from placer.errors import InvalidInput
from placer.hierarchy import top_down_by_pairs
from placer.layer import Ints, Layer
from placer.problem import Problem
from placer.solvers import eplb, greedy, lpt, random, round_robin, spectral
from placer.topology import Topology
from placer.trace import Trace

README_LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
GROUPINGS = [greedy, spectral]


def layer_of(
    tokens: object, num_experts: int, shape: str, *, redundant: int = 0, num_groups: int = 1
) -> Layer:
    """The only layer of a trace on a cluster of that shape, without caps."""
    ids = np.array(tokens)[:, None]
    trace = Trace(topk_idx=ids, num_experts=num_experts, num_groups=num_groups)
    machine = Topology.load("dgx-h100").with_shape(shape)
    return Problem.from_trace(trace, machine, redundant=redundant, max_load=None).layer(0)


def uniform(num_experts: int, top_k: int = 2, tokens: int = 400, seed: int = 0) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).random((tokens, num_experts)).argsort(axis=1)[:, :top_k]


def placed(method: object, layer: Layer, seed: int = 0) -> npt.NDArray[np.int32]:
    result = method.place(layer, rng=np.random.default_rng(seed), clock=Clock())  # type: ignore[attr-defined]
    slots: npt.NDArray[np.int32] = result.slots
    assert slots.dtype == np.int32
    return slots


def units(slots: npt.NDArray[np.int32], size: int) -> set[frozenset[int]]:
    """The sets of experts that share a unit of `size` slots."""
    return {frozenset(row[row >= 0].tolist()) for row in slots.reshape(-1, size)}


def empty_ends(slots: npt.NDArray[np.int32], slots_per_rank: int) -> bool:
    held = slots.reshape(-1, slots_per_rank) >= 0
    return bool((held[:, :-1] >= held[:, 1:]).all())


# -- round robin and random ----------------------------------------------------------------------------


def test_round_robin_deals_experts_to_ranks_in_turn() -> None:
    assert placed(round_robin, layer_of(uniform(8), 8, "1x2x2")).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_round_robin_leaves_spare_slots_empty_and_last() -> None:
    layer = layer_of(uniform(6), 6, "1x2x2", redundant=2)
    assert placed(round_robin, layer).tolist() == [0, 4, 1, 5, 2, -1, 3, -1]


def test_random_differs_by_seed_and_only_by_seed() -> None:
    layer = layer_of(uniform(32), 32, "1x2x2")
    first = placed(random, layer, seed=1)
    assert first.tolist() == placed(random, layer, seed=1).tolist()
    assert units(first, 8) != units(placed(random, layer, seed=2), 8)


def test_random_puts_any_two_experts_together_equally_often() -> None:
    layer = layer_of(uniform(8), 8, "1x2x2", redundant=4)
    together = np.zeros(8)
    for seed in range(400):
        rank = next(gpu for gpu in units(placed(random, layer, seed), 3) if 5 in gpu)
        together[list(rank - {5})] += 1
    assert together[5] == 0
    assert np.delete(together, 5).min() > 30  # 57 each on average, standard deviation 7


# -- load ----------------------------------------------------------------------------------------------


def test_lpt_evens_out_the_load_of_gpus_and_servers_together() -> None:
    tokens = [[e] for e, count in enumerate([8, 7, 6, 5, 4, 3, 2, 1]) for _ in range(count)]
    slots = placed(lpt, layer_of(tokens, 8, "1x2x2"))
    load = np.array([8, 7, 6, 5, 4, 3, 2, 1])[slots]
    assert load.reshape(4, 2).sum(axis=1).tolist() == [9, 9, 9, 9]


def test_eplb_reproduces_the_published_example() -> None:
    assert eplb.rebalance(README_LOAD, num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8).tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_eplb_ignores_servers_that_groups_do_not_divide_by() -> None:
    alone = eplb.rebalance(README_LOAD, 16, num_groups=1, num_nodes=1, num_gpus=8)
    assert eplb.rebalance(README_LOAD, 16, num_groups=3, num_nodes=2, num_gpus=8).tolist() == alone.tolist()
    assert eplb.rebalance(README_LOAD, 16, num_groups=4, num_nodes=2, num_gpus=8).tolist() != alone.tolist()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((16, 5, 1, 8), "experts: found 12, expected a multiple of the 5 groups"),
        ((16, 4, 2, 7), "GPUs: found 7, expected a multiple of the 2 nodes"),
        ((15, 4, 2, 8), "replicas: found 15, expected a multiple of the 8 GPUs"),
        ((8, 4, 2, 8), "replicas: found 8, expected at least the 12 experts"),
    ],
)
def test_eplb_refuses_counts_that_do_not_fit(counts: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        eplb.rebalance(README_LOAD, *counts)
    assert str(caught.value) == message


def test_eplb_keeps_gate_groups_whole_within_servers() -> None:
    layer = layer_of(uniform(32), 32, "1x4x2", redundant=16, num_groups=8)
    for server in units(placed(eplb, layer), layer.unit_slots[1]):
        assert len(server) == 8
        assert all(set(range(e // 4 * 4, e // 4 * 4 + 4)) <= server for e in server)


def test_eplb_without_spare_slots_packs_every_expert_once_by_load() -> None:
    tokens = [[e] for e, count in enumerate([80, 5, 40, 10, 60, 20, 30, 25]) for _ in range(count)]
    slots = placed(eplb, layer_of(tokens, 8, "1x1x4"))
    assert units(slots, 2) == {frozenset(pair) for pair in [(0, 1), (4, 3), (2, 5), (6, 7)]}


def test_eplb_copies_the_hottest_expert() -> None:
    tokens = [[0]] * 100 + [[e] for e in range(1, 6)]
    slots = placed(eplb, layer_of(tokens, 6, "1x2x2", redundant=2))
    assert np.bincount(slots).tolist() == [3, 1, 1, 1, 1, 1]


def duplicates(slots: npt.NDArray[np.integer], num_ranks: int) -> int:
    return sum(len(row) - len(set(row)) for row in slots.reshape(num_ranks, -1).tolist())


def test_the_published_map_lets_copies_meet_and_they_are_parted_within_their_servers() -> None:
    ranks, servers = 32, 4
    load = (np.random.default_rng(0).lognormal(0, 0.8, 256) * 1000).astype(np.int64)
    slots = eplb.rebalance(load[None], 288, 8, servers, ranks)[0]
    parted = eplb.part_copies(slots, load, ranks, servers)
    assert duplicates(slots, ranks) > 0
    assert duplicates(parted, ranks) == 0
    for before, after in zip(slots.reshape(servers, -1), parted.reshape(servers, -1), strict=True):
        assert sorted(before) == sorted(after)
    share = load / np.bincount(slots)
    before, after = (share[s].reshape(ranks, -1).sum(axis=1).max() for s in (slots, parted))
    assert after <= 1.01 * before


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_only_copies_beyond_one_a_gpu_stay_where_they_meet(data: st.DataObject) -> None:
    servers, gpus, per_rank = (data.draw(st.integers(1, 3)) for _ in range(3))
    ranks = servers * gpus
    num_experts = data.draw(st.integers(1, ranks * per_rank))
    more = data.draw(
        st.lists(
            st.integers(0, num_experts - 1),
            min_size=ranks * per_rank - num_experts,
            max_size=ranks * per_rank - num_experts,
        )
    )
    slots = np.array(data.draw(st.permutations([*range(num_experts), *more])))
    load = np.array(data.draw(st.lists(st.integers(0, 9), min_size=num_experts, max_size=num_experts)))
    parted = eplb.part_copies(slots, load, ranks, servers)
    assert sorted(parted) == sorted(slots)
    assert duplicates(parted, ranks) == np.maximum(np.bincount(slots) - ranks, 0).sum()


def test_eplb_leaves_slots_of_surplus_copies_empty_and_last() -> None:
    """Expert 0 gets three copies, and there are two GPUs."""
    layer = layer_of([[0]] * 90 + [[1], [2], [3]], 4, "1x1x2", redundant=2)
    slots = placed(eplb, layer)
    assert sorted(slots) == [-1, 0, 0, 1, 2, 3]
    assert all(0 in gpu for gpu in units(slots, 3))
    assert empty_ends(slots, 3)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_eplb_holds_every_expert_and_none_twice_on_a_gpu(data: st.DataObject) -> None:
    servers, gpus, per_rank = (data.draw(st.integers(1, 3)) for _ in range(3))
    slots_in_all = servers * gpus * per_rank
    num_experts = data.draw(st.integers(per_rank, slots_in_all))
    num_groups = data.draw(st.sampled_from([g for g in range(1, num_experts + 1) if num_experts % g == 0]))
    tokens = data.draw(st.lists(st.integers(0, num_experts - 1), min_size=1, max_size=20))
    layer = layer_of(
        [[e] for e in tokens],
        num_experts,
        f"1x{servers}x{gpus}",
        redundant=slots_in_all - num_experts,
        num_groups=num_groups,
    )
    slots = placed(eplb, layer)
    assert set(slots[slots >= 0].tolist()) == set(range(num_experts))
    assert all(len(row[row >= 0]) == len(set(row[row >= 0])) for row in slots.reshape(-1, per_rank))
    assert empty_ends(slots, per_rank)


# -- co-activation ---------------------------------------------------------------------------------------


def planted(blocks: list[list[int]], noise: int = 0, seed: int = 0) -> npt.NDArray[np.int64]:
    """Tokens that each use two experts of one block, and `noise` that use any two."""
    pairs = [[e, f] for block in blocks for e in block for f in block if e < f]
    stray = uniform(sum(map(len, blocks)), tokens=noise, seed=seed)
    return np.concatenate([np.array(pairs * 20), stray])


@pytest.mark.parametrize("method", GROUPINGS)
@pytest.mark.parametrize("seed", range(3))
def test_planted_blocks_are_found(method: object, seed: int) -> None:
    blocks = np.random.default_rng(seed).permutation(32).reshape(4, 8).tolist()
    layer = layer_of(planted(blocks, noise=300, seed=seed), 32, "1x4x1")
    assert units(placed(method, layer, seed), 8) == {frozenset(block) for block in blocks}


@pytest.mark.parametrize("method", GROUPINGS)
def test_blocks_within_blocks_are_found_at_every_level(method: object) -> None:
    order = np.random.default_rng(3).permutation(32)
    inner, outer = order.reshape(8, 4).tolist(), order.reshape(4, 8).tolist()
    widest = order.reshape(2, 16).tolist()
    tokens = np.concatenate([planted(inner)] * 8 + [planted(outer)] * 3 + [planted(widest)])
    slots = placed(method, layer_of(tokens, 32, "2x2x2"))
    for size, blocks in ((4, inner), (8, outer), (16, widest)):
        assert units(slots, size) == {frozenset(block) for block in blocks}


@pytest.mark.parametrize("divide", [greedy.grow, partial(spectral.cut, rng=np.random.default_rng(0))])
def test_spare_slots_stay_empty_and_spread_evenly(divide: Callable[[Ints, Ints], Ints]) -> None:
    layer = layer_of(uniform(10), 10, "2x2x2", redundant=14)
    slots = top_down_by_pairs(layer, divide)
    held = (slots >= 0).reshape(8, 3)
    assert sorted(held.sum(axis=1)) == [1] * 6 + [2] * 2
    assert held.reshape(2, -1).sum(axis=1).tolist() == [5, 5]
    assert empty_ends(slots, 3)


@pytest.mark.parametrize("method", GROUPINGS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_groupings_place_every_expert_once_whatever_the_sizes(method: object, data: st.DataObject) -> None:
    shape = [data.draw(st.integers(1, 3)) for _ in range(3)]
    per_rank = data.draw(st.integers(1, 3))
    slots_in_all = int(np.prod(shape)) * per_rank
    num_experts = data.draw(st.integers(per_rank, slots_in_all))
    top_k = data.draw(st.integers(1, min(3, num_experts)))
    used = data.draw(st.integers(top_k, num_experts))  # experts beyond have no load
    tokens = uniform(used, top_k, tokens=data.draw(st.integers(1, 30)), seed=data.draw(st.integers(0, 9)))
    layer = layer_of(tokens, num_experts, "x".join(map(str, shape)), redundant=slots_in_all - num_experts)
    slots = placed(method, layer)
    assert sorted(set(slots[slots >= 0].tolist())) == list(range(num_experts))
    assert method is greedy or (slots >= 0).sum() == num_experts
    assert empty_ends(slots, layer.slots_per_rank)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(["1x4x1", "1x2x2", "1x1x3", "2x2x1"]),
    spare=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_greedy_copies_are_those_used_most_with_what_a_server_holds(
    shape: str, spare: int, seed: int
) -> None:
    ranks = int(np.prod([int(n) for n in shape.split("x")]))
    layer = layer_of(uniform(6, tokens=30, seed=seed), 6, shape, redundant=-6 % ranks + spare * ranks)
    width = layer.slots_per_rank * (layer.server_ranks if layer.server_ranks < ranks else 1)
    bare = layer.slots(layer.linear())
    held = [list(row[row >= 0]) for row in bare.reshape(-1, width)]
    while any(len(row) < min(width, 6) for row in held):
        gains = {
            (-int(layer.pairs[expert, row].sum()), unit, expert): row
            for unit, row in enumerate(held)
            for expert in range(6)
            if len(row) < width and expert not in row
        }
        gains[min(gains)].append(min(gains)[2])
    slots = greedy.copied(layer, bare)
    assert units(slots, width) == {frozenset(row) for row in held}
    assert (slots.reshape(-1, width)[bare.reshape(-1, width) >= 0] == bare[bare >= 0]).all()
    assert empty_ends(slots, layer.slots_per_rank)


def test_a_group_starts_at_the_heaviest_pair_and_the_next_far_from_it() -> None:
    pairs = np.zeros((6, 6), np.int64)
    for e, f, weight in [(4, 1, 9), (1, 3, 5), (4, 3, 4), (0, 1, 3), (2, 4, 2), (5, 2, 1), (0, 5, 6)]:
        pairs[e, f] = pairs[f, e] = weight
    # 1 and 4 start, 3 joins with mean 4.5; of the others 5 has no tie to them, 0 has 6 with it, 2 is left.
    assert greedy.grow(pairs, np.array([3, 2, 1])).tolist() == [1, 0, 2, 0, 0, 1]


def test_an_expert_without_pairs_has_a_finite_place_in_the_embedding() -> None:
    pairs = np.array([[0, 3, 0], [3, 0, 0], [0, 0, 0]])
    points = spectral.embedding(pairs, 2)
    assert np.isfinite(points).all()
    np.testing.assert_allclose(points[0], points[1], atol=1e-9)
