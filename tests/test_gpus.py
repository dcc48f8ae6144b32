"""Experts on the GPUs of their servers, against plain loops and all arrangements of tiny servers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer import Trace, gpus
from placer.layer import Layer
from placer.tables import fitted_table
from tests.instances import problem

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def layer_of(
    topk: Ints,
    experts: int,
    shape: str,
    slots: int,
    *,
    sequence: Ints | None = None,
    max_load: float | None = 1.1,
) -> Layer:
    trace = Trace(topk_idx=topk[:, None].astype(np.int16), num_experts=experts, sequence=sequence)
    return problem(trace, shape, slots_per_gpu=slots, max_load=max_load).layer(0)


def tokens_of(rng: np.random.Generator, tokens: int, experts: int, dropped: float = 0.0) -> Ints:
    """Three experts a token, in sequences of ten tokens with tastes of their own."""
    taste = np.repeat(rng.normal(size=(-(-tokens // 10), experts)), 10, axis=0)[:tokens]
    liked = taste + rng.normal(size=experts) * 0.7 + rng.gumbel(size=(tokens, experts))
    topk = np.argsort(-liked, axis=1)[:, :3]
    topk[rng.random(topk.shape) < dropped] = -1
    return topk


# -- parts of the trace -----------------------------------------------------------------------------------------


def plain_parts(layer: Layer) -> list[list[float]]:
    """By loops: the part of a token is that of its sequence, or of its place where sequences are few."""
    tokens = layer.tokens.tolist()
    keys = [] if layer.key is None else layer.key.tolist()
    order = {key: place for place, key in enumerate(sorted(set(keys)))}
    number = min(gpus.PARTS, len(order))
    if len(order) < 8:
        number = gpus.PARTS
        keys, order = [*range(len(tokens))], {t: t for t in range(len(tokens))}
    parts: dict[int, list[float]] = defaultdict(lambda: [0.0] * layer.num_experts)
    for key, token in zip(keys, tokens, strict=True):
        for expert in token:
            if expert >= 0:
                parts[order[key] * number // len(order)][expert] += 1.0
    total = sum(map(sum, parts.values()))
    return [[x * total / sum(row) for x in row] for _, row in sorted(parts.items())]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 999),
    tokens=st.sampled_from([1, 30, 64, 200, 701]),
    sequences=st.sampled_from([1, 5, 8, 63, 64, 65, 150]),
    dropped=st.sampled_from([0.0, 0.3, 0.97]),
    keyed=st.booleans(),
)
def test_parts_are_what_loops_over_tokens_count(
    seed: int, tokens: int, sequences: int, dropped: float, keyed: bool
) -> None:
    rng = np.random.default_rng(seed)
    topk = tokens_of(rng, tokens, 8, dropped)
    layer = layer_of(topk, 8, "1x2x2", 3, sequence=rng.integers(0, sequences, tokens))
    layer = layer if keyed else replace(layer, key=None)
    parts = gpus.part_loads(layer)
    assert parts.shape[1] == 8
    assert len(parts) <= gpus.PARTS
    assert parts == pytest.approx(np.array(plain_parts(layer)).reshape(-1, 8))
    assert parts.sum(axis=1) == pytest.approx(float(layer.load.sum()))


def test_of_many_sequences_each_part_has_equally_many() -> None:
    """Each of 128 uses an expert of its own, once or twice."""
    sequence = np.repeat(np.arange(128), 1 + np.arange(128) % 2)
    layer = layer_of(sequence[:, None], 128, "1x2x2", 33, sequence=sequence)
    parts = gpus.part_loads(layer)
    assert parts.shape == (64, 128)
    assert (parts > 0).sum(axis=1).tolist() == [2] * 64
    assert (parts > 0).sum(axis=0).tolist() == [1] * 128


def test_a_trace_of_equal_tokens_has_equal_parts_and_one_without_choices_none() -> None:
    layer = layer_of(np.array([[0, 1]] * 100), 4, "1x2x2", 1)
    assert gpus.part_loads(layer).tolist() == [[100.0, 100.0, 0.0, 0.0]] * 64
    idle = layer_of(np.full((100, 2), -1), 4, "1x2x2", 1)
    assert gpus.part_loads(idle).shape == (0, 4)
    assert gpus.part_loads(replace(idle, topk=np.zeros((0, 2), np.int16), key=None)).shape == (0, 4)


# -- products of unseen loads ---------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), parts=st.integers(2, 20), experts=st.integers(2, 6))
def test_unseen_products_are_means_and_twice_the_covariance_of_the_mean(
    seed: int, parts: int, experts: int
) -> None:
    rng = np.random.default_rng(seed)
    mean, loads = rng.random(experts), rng.random((parts, experts))
    expected = np.outer(mean, mean) + 2.0 * np.cov(loads.T) / parts
    assert gpus.together(mean, loads) == pytest.approx(expected)


@pytest.mark.parametrize("parts", [0, 1])
def test_without_two_parts_only_means_count(parts: int) -> None:
    mean = np.array([1.0, 2.0, 5.0])
    assert gpus.together(mean, np.ones((parts, 3)) * 7).tolist() == np.outer(mean, mean).tolist()


# -- arrangements -----------------------------------------------------------------------------------------------


def content_of(rng: np.random.Generator, experts: int, servers: int, slots: int, empty: int = 0) -> Ints:
    """Every expert once, then copies in random slots but `empty` of each server; rows in random order."""
    content = np.full((servers, slots), -1)
    for place, expert in enumerate(rng.permutation(experts)):
        content[place % servers, place // servers] = expert
    for row in content:
        free = np.flatnonzero(row < 0)
        free = free[: max(0, len(free) - empty)]
        others = rng.permutation([e for e in range(experts) if e not in row])[: len(free)]
        row[free[: len(others)]] = others
    return rng.permuted(content, axis=1)


def arrangements(members: Sequence[int], ranks: int, room: int) -> Iterator[list[tuple[int, ...]]]:
    """All ways to deal the members to GPUs of `room` slots; a GPU takes any subset that leaves the rest a place."""
    if ranks == 1:
        if len(members) <= room:
            yield [tuple(members)]
        return
    for size in range(max(0, len(members) - room * (ranks - 1)), min(room, len(members)) + 1):
        for held in combinations(members, size):
            left = [e for e in members if e not in held]
            yield from ([held, *rest] for rest in arrangements(left, ranks - 1, room))


def arranged(layer: Layer, content: Ints, seed: int = 0) -> npt.NDArray[np.int32]:
    return gpus.on_gpus(layer, layer, content, np.random.default_rng(seed))


def members_of(row: Ints) -> list[int]:
    return sorted(row[row >= 0].tolist())


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 999),
    shape=st.sampled_from([("1x2x2", 3, 8), ("1x3x2", 2, 9), ("2x1x3", 3, 10), ("1x2x4", 1, 6)]),
    empty=st.integers(0, 4),
    max_load=st.sampled_from([None, 1.0, 1.1]),
)
def test_experts_stay_in_their_server_and_gpus_are_in_order(
    seed: int, shape: tuple[str, int, int], empty: int, max_load: float | None
) -> None:
    """Experts ascend within a GPU, empty slots are last."""
    machine, slots, experts = shape
    rng = np.random.default_rng(seed)
    layer = layer_of(tokens_of(rng, 80, experts, 0.1), experts, machine, slots, max_load=max_load)
    content = content_of(rng, experts, layer.num_ranks // layer.server_ranks, layer.unit_slots[1], empty)
    before = content.copy()
    found = arranged(layer, content)
    assert found.dtype == np.int32
    assert np.array_equal(content, before)
    assert np.array_equal(np.sort(found.reshape(content.shape), axis=1), np.sort(content, axis=1))
    for row in found.reshape(layer.num_ranks, -1).tolist():
        held = [e for e in row if e >= 0]
        assert row == [*sorted(held), *[-1] * (slots - len(held))]
    assert np.array_equal(arranged(layer, content), found)


@pytest.mark.parametrize("max_load", [None, 1.1])
def test_a_server_may_be_empty_or_idle(max_load: float | None) -> None:
    """The second holds nothing, the third experts without a token."""
    layer = layer_of(np.array([[0, 1]] * 20), 6, "1x3x2", 2, max_load=max_load)
    content = np.array([[1, 2, 0, 3], [-1, -1, -1, -1], [-1, 4, -1, 5]])
    found = arranged(layer, content).reshape(3, -1)
    assert found[1].tolist() == [-1] * 4
    assert sorted(found[2].tolist()) == [-1, -1, 4, 5]
    assert sorted(found[0].tolist()) == [0, 1, 2, 3]


def cases(max_load: float | None, number: int = 40) -> Iterator[tuple[Layer, Ints]]:
    """Servers of two GPUs with three slots, or of three with two; some slots empty."""
    for seed in range(number):
        rng = np.random.default_rng(seed)
        machine, slots = [("1x2x2", 3), ("1x2x3", 2)][seed % 2]
        layer = layer_of(
            tokens_of(rng, 700, 9, 0.05), 9, machine, slots, sequence=np.arange(700) // 10, max_load=max_load
        )
        yield replace(layer, copies=True), content_of(rng, 9, 2, 6, seed % 3)


def share_of(layer: Layer, content: Ints) -> Floats:
    found: Floats = layer.load / np.maximum(
        np.bincount(content[content >= 0], minlength=layer.num_experts), 1
    )
    return found


def test_the_cap_of_a_gpu_is_kept_where_some_arrangement_keeps_it() -> None:
    """In nearly all of 80 seeded servers."""
    possible = kept = 0
    for layer, content in cases(1.1):
        share, ranks = share_of(layer, content), layer.server_ranks
        heat = share_of_gpus(arranged(layer, content), share, layer)
        for server, row in enumerate(content):
            least = min(
                max(sum(share[e] for e in gpu) for gpu in dealt)
                for dealt in arrangements(members_of(row), ranks, layer.slots_per_rank)
            )
            here = heat[server * ranks : (server + 1) * ranks]
            possible += least <= layer.caps[0]
            kept += max(here) <= layer.caps[0]
            assert max(here) >= least - 1e-9
        assert sum(heat) == pytest.approx(float(layer.load.sum()))
    assert possible >= 40
    assert kept >= possible - 2


def share_of_gpus(slots: npt.NDArray[np.int32], share: Floats, layer: Layer) -> list[float]:
    return [float(share[row[row >= 0]].sum()) for row in slots.reshape(layer.num_ranks, -1)]


def square(dealt: Sequence[Sequence[int]], product: Floats) -> float:
    """Expected squares of the GPUs' loads, summed."""
    return sum(float(product[np.ix_(gpu, gpu)].sum()) for gpu in dealt)


def test_of_the_arrangements_within_the_cap_the_one_of_least_expected_square_is_found() -> None:
    """In nearly all of 80 seeded servers where there is one."""
    possible = hits = 0
    for layer, content in cases(1.3):
        share, found = share_of(layer, content), arranged(layer, content).reshape(2, layer.server_ranks, -1)
        held = np.maximum(np.bincount(content[content >= 0], minlength=9), 1)
        product = np.outer(share, share)
        parts = np.array(plain_parts(layer)) / held
        product += 2.0 * np.cov(parts.T) / len(parts)
        for row, here in zip(content, found, strict=True):
            within = [
                square(dealt, product)
                for dealt in arrangements(members_of(row), layer.server_ranks, layer.slots_per_rank)
                if max(share[list(gpu)].sum() for gpu in dealt) <= layer.caps[0]
            ]
            possible += bool(within)
            reached = square([gpu[gpu >= 0].tolist() for gpu in here], product)
            hits += bool(within) and abs(reached / min(within) - 1) <= 1e-9
    assert possible >= 40
    assert hits >= possible - 1


@pytest.mark.parametrize("seed", range(3))
def test_in_a_large_server_no_swap_within_the_cap_lowers_the_expected_square(seed: int) -> None:
    rng = np.random.default_rng(seed)
    topk = tokens_of(rng, 2_000, 32, 0.0)
    layer = layer_of(topk, 32, "1x1x8", 4, sequence=np.arange(2_000) // 10, max_load=1.3)
    found = arranged(layer, rng.permutation(32)[None]).astype(np.int64)
    product = np.outer(layer.load, layer.load) + 2.0 * np.cov(np.array(plain_parts(layer)).T) / gpus.PARTS

    def judged(slots: Ints) -> tuple[float, float]:
        """Load above the cap, expected square."""
        rows, peak = slots.reshape(8, 4), float(layer.load[slots].reshape(8, 4).sum(axis=1).max())
        return max(0.0, peak - float(layer.caps[0])), square(rows.tolist(), product)

    assert judged(found)[0] == 0.0
    for i, j in combinations(range(32), 2):
        other = found.copy()
        other[[i, j]] = other[[j, i]]
        assert judged(other) >= (0.0, judged(found)[1] * (1 - 1e-9))


def test_experts_that_are_hot_together_are_parted_where_their_means_are_equal() -> None:
    """Experts 0 and 1 are used by one half of the sequences, 2 and 3 by the other."""
    topk = np.repeat([[0, 1], [2, 3]], 10, axis=0)[np.arange(2000) % 20]
    layer = layer_of(topk, 4, "1x1x2", 2, sequence=np.arange(2000) // 10)
    for seed in range(5):
        content = np.random.default_rng(seed).permutation(4)[None]
        pairs = {frozenset(gpu) for gpu in arranged(layer, content, seed).reshape(2, 2).tolist()}
        assert pairs in ({frozenset({0, 2}), frozenset({1, 3})}, {frozenset({0, 3}), frozenset({1, 2})})


def test_copies_count_by_their_share_of_the_load() -> None:
    """Expert 0 has 8 of 17 tokens and stands on both servers: 4 there, as much as 1 and 2 together."""
    uses = [0] * 80 + [1] * 20 + [2] * 20 + [3] * 25 + [4] * 25
    topk = np.array(uses)[np.random.default_rng(0).permutation(len(uses))][:, None]
    layer = layer_of(topk, 5, "1x2x2", 2, max_load=1.2)
    found = arranged(layer, np.array([[1, 0, 2, -1], [3, 4, 0, -1]])).reshape(4, 2).tolist()
    assert {frozenset(gpu) for gpu in found[:2]} == {frozenset({0, -1}), frozenset({1, 2})}
    assert {frozenset(gpu) for gpu in found[2:]} == {frozenset({0, -1}), frozenset({3, 4})}


def test_without_a_cap_tokens_touch_the_fewest_gpus_of_their_server() -> None:
    """In nearly all of 40 seeded servers; each is arranged as if a token took all its experts there."""
    hits = total = 0
    for layer, content in cases(None, 20):
        found = arranged(layer, content).reshape(2, layer.server_ranks, -1)
        assert math.isinf(layer.caps[0])
        for row, here in zip(content, found, strict=True):

            def touched(dealt: Sequence[Sequence[int]], layer: Layer = layer) -> int:
                return sum(int(np.isin(layer.tokens, gpu).any(axis=1).sum()) for gpu in dealt)

            ways = arrangements(members_of(row), layer.server_ranks, layer.slots_per_rank)
            hits += touched([gpu[gpu >= 0].tolist() for gpu in here]) == min(map(touched, ways))
            total += 1
    assert hits >= total - 2


def test_a_token_that_touches_two_gpus_anyway_is_no_reason_to_part_others() -> None:
    """Most tokens use experts 0 to 3, of which a GPU holds three: fewer of their pairs are cut three to one."""
    four, pairs = [[0, 1, 2, 3]] * 20, [[0, 4, -1, -1], [1, 4, -1, -1], [2, 5, -1, -1], [3, 5, -1, -1]] * 5
    layer = layer_of(np.array(four + pairs), 6, "1x1x2", 3, max_load=None)
    found = arranged(layer, np.arange(6)[None]).reshape(2, 3).tolist()
    assert sorted(map(sorted, found)) == [[0, 1, 4], [2, 3, 5]]


def test_the_cap_goes_before_evenness_over_parts() -> None:
    """Expert 0 with 1 is as much as 2 with 3, but 0 and 1 are hot in the same sequences."""
    first, second = [0] * 11 + [1] * 9, [2] * 10 + [3] * 10
    topk = np.array([first, second] * 40).reshape(-1, 1)
    sequence = np.arange(len(topk)) // 20
    for max_load, mates in ((1.0, {1}), (1.1, {2, 3})):  # within the lower cap only 0 with 1
        layer = layer_of(topk, 4, "1x1x2", 2, sequence=sequence, max_load=max_load)
        rows = arranged(layer, np.array([[3, 1, 0, 2]])).reshape(2, 2).tolist()
        (held,) = [set(row) for row in rows if 0 in row]
        assert held - {0} <= mates


def test_what_gpus_tokens_touch_is_learnt_from_the_sample() -> None:
    """All tokens use experts 0 and 1, or 2 and 3 together; those of the sample 0 and 2, or 1 and 3."""
    layer = layer_of(np.array([[0, 1], [2, 3]] * 50), 4, "1x1x2", 2, max_load=None)
    sample = replace(layer, topk=np.array([[0, 2], [1, 3]] * 9, np.int16), key=None)
    content = np.array([[3, 1, 0, 2]])
    for small, pairs in ((layer, [{0, 1}, {2, 3}]), (sample, [{0, 2}, {1, 3}])):
        found = gpus.on_gpus(layer, small, content, np.random.default_rng(0)).reshape(2, 2).tolist()
        assert [set(gpu) for gpu in sorted(map(sorted, found))] == pairs


# -- what falls to servers ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), rule=st.sampled_from(["nearest", "spread", "table", "cover"]))
def test_what_falls_to_servers_of_each_expert_is_what_the_evaluator_counts(seed: int, rule: str) -> None:
    """Expert by expert: of tokens that use only one, every load of a server is a share of that expert's."""
    rng = np.random.default_rng(seed)
    content = np.full((3, 4), -1)
    for unit in range(3):
        copied = rng.choice([e for e in range(6) if e % 3 != unit], rng.integers(0, 3), replace=False)
        content[unit, : 2 + len(copied)] = [unit, unit + 3, *copied]
    topk = np.argsort(rng.gumbel(size=(200, 6)), axis=1)[:, :2]
    layer = replace(layer_of(topk, 6, "1x3x2", 2), rule=rule)
    shares = gpus._shares(layer, content)
    assert shares.sum(axis=0) == pytest.approx(np.ones(6))
    assert not shares[[[e not in row for e in range(6)] for row in content.tolist()]].any()
    slots = np.where(content < 0, -1, content).ravel().astype(np.int32)
    table = fitted_table(layer, slots) if rule == "table" else None
    loads = layer.counts(slots, table).load[1][:3]
    assert shares @ layer.load == pytest.approx(loads)
