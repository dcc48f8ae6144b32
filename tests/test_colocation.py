"""The co-location bound: true for every partition, and its certificate holds in exact arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.bounds import Partition, Proof, colocation
from placer.clock import Clock


def partition_of(
    tokens: list[list[int]], count: list[int], num_items: int, units: int, size: int
) -> Partition:
    width = max(len(token) for token in tokens)
    sets = np.array([token + [-1] * (width - len(token)) for token in tokens], np.int16)
    load = np.zeros(num_items, np.int64)
    for token, n in zip(tokens, count, strict=True):
        load[token] += n
    return Partition(
        num_items=num_items, units=units, size=size, sets=sets, count=np.array(count, np.int64), load=load
    )


def prove(partition: Partition, rounds: float = 0.3) -> Proof:
    start = np.arange(partition.num_items) // partition.size
    return colocation.prove(partition, start, clock=Clock.start(seconds=rounds))


def splits(num_items: int, units: int, size: int) -> Iterator[list[int]]:
    """Every way to split items over alike units."""

    def extend(chosen: list[int], held: list[int]) -> Iterator[list[int]]:
        if len(chosen) == num_items:
            yield chosen
            return
        for unit in range(min(len(held) + 1, units)):
            now = held + [0] if unit == len(held) else held
            if now[unit] < size:
                yield from extend(chosen + [unit], [n + (u == unit) for u, n in enumerate(now)])

    yield from extend([], [])


def least(partition: Partition) -> int:
    tokens = [[int(e) for e in row if e >= 0] for row in partition.sets]
    return min(
        sum(int(n) * len({unit[e] for e in token}) for n, token in zip(partition.count, tokens, strict=True))
        for unit in splits(partition.num_items, partition.units, partition.size)
    )


def is_semidefinite(matrix: list[list[Fraction]]) -> bool:
    """Elimination in exact numbers."""
    rows = [row[:] for row in matrix]
    n = len(rows)
    for i in range(n):
        if rows[i][i] < 0 or (rows[i][i] == 0 and any(rows[i][j] != 0 for j in range(i, n))):
            return False
        for j in range(i + 1, n):
            if rows[i][i] != 0 and rows[j][i] != 0:
                ratio = rows[j][i] / rows[i][i]
                rows[j] = [a - ratio * b for a, b in zip(rows[j], rows[i], strict=True)]
    return True


def checked(partition: Partition, proof: Proof) -> int:
    """The bound that a certificate proves: what the module's docstring says, step by step."""
    given = proof.certificate
    items, size, units = partition.num_items, partition.size, partition.units
    unit, monomials = colocation.UNIT, [int(m) for m in given["monomials"]]
    tokens = {tuple(sorted(int(e) for e in row if e >= 0)): 0 for row in partition.sets}
    for row, n in zip(partition.sets, partition.count, strict=True):
        tokens[tuple(sorted(int(e) for e in row if e >= 0))] += int(n)

    remains: dict[frozenset[int], int] = {}
    for row, n, prices in zip(given["sets"], given["count"], given["prices"], strict=True):
        members = [int(e) for e in row if e >= 0]
        match = min((t for t in tokens if set(members) <= set(t) and tokens[t] >= n), key=len)
        tokens[match] -= int(n)
        price = {m: int(p) for m, p in zip(monomials, prices, strict=True) if m < 1 << len(members)}
        for subset in range(1, 1 << len(members)):
            if subset.bit_count() <= size:
                assert sum(p for m, p in price.items() if m & ~subset == 0) <= unit
        for m, p in price.items():
            key = frozenset(members[b] for b in range(len(members)) if m >> b & 1)
            remains[key] = remains.get(key, 0) + int(n) * p
    others = sum(n for token, n in tokens.items() if token)
    assert given["rest"] <= others

    slack = [[[int(x) for x in row] for row in block] for block in given["slack"]]
    lifted = len(slack) > 1 or items == 1
    total = Fraction(0)
    for e, block in enumerate(slack):
        v = [1 - size * (f == e) if lifted else 1 for f in range(items)]
        tilt = int(given["tilt"]) if items == units * size else 0
        shift = int(given["shift"][e])
        assert tilt >= 0
        assert shift >= 0
        for f in range(items):
            for g in range(items):
                assert block[f][g] == block[g][f]
                key = frozenset({e, f, g} if lifted else {f, g})
                remains[key] = remains.get(key, 0) - block[f][g]
        assert is_semidefinite(
            [
                [Fraction(block[f][g] + tilt * v[f] * v[g] + shift * (f == g)) for g in range(items)]
                for f in range(items)
            ]
        )
        total -= shift * (size if lifted else items - Fraction(items, units))
        if not lifted:
            total += Fraction(sum(map(sum, block)), units)
    assert all(value >= 0 for key, value in remains.items() if len(key) > 1)
    total += sum(value for key, value in remains.items() if len(key) == 1)
    return int(given["rest"]) + math.ceil(total / unit)


@st.composite
def partitions(draw: st.DrawFn) -> Partition:
    num_items = draw(st.integers(2, 8))
    units = draw(st.integers(2, 4))
    size = draw(st.integers(-(-num_items // units), num_items))
    token = st.lists(st.integers(0, num_items - 1), max_size=min(num_items, 5), unique=True)
    tokens = draw(st.lists(token, min_size=1, max_size=8).filter(any))
    count = draw(st.lists(st.integers(1, 9), min_size=len(tokens), max_size=len(tokens)))
    return partition_of(tokens, count, num_items, units, size)


@pytest.fixture(params=[True, False], ids=["triples", "pairs"])
def lifted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(colocation, "LIFTED", 0)
    return bool(request.param)


@pytest.mark.parametrize("triples", [True, False])
@given(partition=partitions())
@settings(max_examples=60, deadline=None)
def test_no_partition_costs_less_and_the_certificate_holds_in_exact_numbers(
    triples: bool, partition: Partition
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(colocation, "LIFTED", 128 if triples else 0)
        proof = prove(partition, 0.05)
    assert proof.bound <= least(partition)
    assert checked(partition, proof) == proof.bound


def test_tokens_that_are_blocks_are_bounded_by_their_number(lifted: bool) -> None:
    blocks = [list(range(4 * b, 4 * b + 4)) for b in range(3)]
    assert prove(partition_of(blocks, [11, 12, 13], 12, 3, 4), 20.0).bound == 36


def test_every_pair_once_costs_what_the_units_cannot_hold(lifted: bool) -> None:
    pairs = [list(pair) for pair in combinations(range(8), 2)]
    # Every partition keeps 2 * 6 of 28 pairs together.
    assert prove(partition_of(pairs, [5] * 28, 8, 2, 4), 20.0).bound == 5 * (12 + 2 * 16)


def test_triples_prove_more_than_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    tokens = [sorted(rng.choice(12, 5, replace=False).tolist()) for _ in range(60)]
    partition = partition_of(tokens, [3] * 60, 12, 3, 4)
    with_triples = prove(partition, 3.0).bound
    monkeypatch.setattr(colocation, "LIFTED", 0)
    assert prove(partition, 3.0).bound < with_triples <= least(partition)


def test_a_stopped_clock_still_gives_a_bound_that_holds() -> None:
    partition = partition_of([[0, 1, 2, 3], [2, 3]], [5, 5], 6, 3, 2)
    proof = prove(partition, 0.0)
    assert checked(partition, proof) == proof.bound
    assert proof.bound == 15  # four experts need two units of two


def test_better_bounds_are_told_in_order_next_to_the_known_cost() -> None:
    rng = np.random.default_rng(1)
    tokens = [sorted(rng.choice(12, 4, replace=False).tolist()) for _ in range(40)]
    partition = partition_of(tokens, [1] * 40, 12, 3, 4)
    incumbent = np.arange(12) // 4
    told: list[tuple[int, int]] = []
    proof = colocation.prove(
        partition, incumbent, clock=Clock.start(seconds=2), workers=2, tell=lambda *x: told.append(x)
    )
    bounds = [bound for bound, _ in told]
    assert bounds == sorted(set(bounds))
    assert bounds[-1] == proof.bound
    assert {known for _, known in told} == {partition.cost(incumbent)}
    assert proof.unit_of_item.tolist() == incumbent.tolist()


def test_wide_and_rare_tokens_count_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colocation, "WIDTH", 3)
    monkeypatch.setattr(colocation, "SETS", 2)
    partition = partition_of([[0, 1, 2, 3, 4], [1, 2, 3], [4, 5], []], [7, 5, 2, 9], 6, 3, 2)
    proof = prove(partition)
    assert proof.certificate["rest"] == 2
    assert checked(partition, proof) == proof.bound
    assert 3 / 2 * (7 + 5) + 2 <= proof.bound <= least(partition)
