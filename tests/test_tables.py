"""The compiled swap tables against recounts from scratch, in the words of `placer.search.tabu`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.search.tabu import (
    FAR,
    _excess,
    apply_exact,
    apply_pairs,
    best_swap,
    build_exact,
    build_pairs,
    move_costs,
    tabu,
)

# (positions, positions per unit of each level, inside out): one, two and three levels; twice the same level
SHAPES = (
    (6, (3,)),
    (8, (2,)),
    (12, (2, 6)),
    (8, (2, 4)),
    (16, (2, 4, 8)),
    (12, (3, 3, 6)),
    (9, (3,)),
    (6, (1, 2)),
)


@dataclass(frozen=True)
class Instance:
    """Token sets with weights, and experts on positions; experts at the end are placeholders."""

    tokens: np.ndarray[Any, Any]
    weights: np.ndarray[Any, Any]
    occupant: np.ndarray[Any, Any]
    size: np.ndarray[Any, Any]
    level_weight: np.ndarray[Any, Any]
    cap: np.ndarray[Any, Any]

    @property
    def positions(self) -> int:
        return len(self.occupant)

    @property
    def units(self) -> int:
        return self.positions // int(self.size[0])

    @property
    def load(self) -> np.ndarray[Any, Any]:
        """Tokens per expert."""
        load = np.zeros(self.positions)
        for token, weight in zip(self.tokens.tolist(), self.weights.tolist(), strict=True):
            for expert in token:
                if expert >= 0:
                    load[expert] += weight
        return load

    @property
    def uses(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        rows = [np.flatnonzero((self.tokens == e).any(axis=1)) for e in range(self.positions)]
        start = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        return start.astype(np.int64), np.concatenate(rows).astype(np.int32)

    @property
    def pairs(self) -> np.ndarray[Any, Any]:
        table = np.zeros((self.positions, self.positions), np.int64)
        for token, weight in zip(self.tokens.tolist(), self.weights.tolist(), strict=True):
            for e in token:
                for f in token:
                    if e >= 0 and f >= 0 and e != f:
                        table[e, f] += weight
        return table


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    positions, sizes = draw(st.sampled_from(SHAPES))
    experts = draw(st.integers(max(1, positions - 3), positions))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    top_k = draw(st.integers(1, min(5, experts)))
    count = draw(st.integers(1, 15))
    tokens = np.argsort(rng.random((count, experts)), axis=1)[:, :top_k].astype(np.int16)
    tokens[rng.random(tokens.shape) < draw(st.sampled_from([0.0, 0.3]))] = -1
    if draw(st.booleans()):
        tokens[tokens == rng.integers(experts)] = -1  # an expert that nobody uses
    weights = rng.integers(1, 5, count).astype(np.int64)
    cap = rng.integers(0, 2 * int(weights.sum()) * top_k + 1, len(sizes)).astype(np.float64)
    cap[rng.random(len(sizes)) < 0.3] = np.inf
    return Instance(
        tokens=tokens,
        weights=weights,
        occupant=rng.permutation(positions).astype(np.int32),
        size=np.array(sizes, np.int64),
        level_weight=rng.integers(1, 9, len(sizes)) / 4.0,
        cap=cap,
    )


# -- recounts ---------------------------------------------------------------------------------------------------


def touched_cost(case: Instance, occupant: np.ndarray[Any, Any]) -> float:
    """Weighted sum over tokens and levels of the units touched."""
    where = {expert: position for position, expert in enumerate(occupant.tolist())}
    cost = 0.0
    for token, weight in zip(case.tokens.tolist(), case.weights.tolist(), strict=True):
        for size, level_weight in zip(case.size.tolist(), case.level_weight.tolist(), strict=True):
            cost += level_weight * weight * len({where[e] // size for e in token if e >= 0})
    return cost


def cut_cost(case: Instance, occupant: np.ndarray[Any, Any]) -> float:
    """Weighted sum over levels of the pairs in two different units."""
    pairs, cost = case.pairs, 0.0
    for i in range(case.positions):
        for j in range(i):
            for size, level_weight in zip(case.size.tolist(), case.level_weight.tolist(), strict=True):
                if i // size != j // size:
                    cost += level_weight * pairs[occupant[i], occupant[j]]
    return cost


def excess_load(case: Instance, occupant: np.ndarray[Any, Any]) -> float:
    """Tokens above the caps, over all units and levels."""
    load, over = case.load, 0.0
    for size, cap in zip(case.size.tolist(), case.cap.tolist(), strict=True):
        for unit in range(case.positions // size):
            over += max(0.0, sum(load[e] for e in occupant[unit * size : (unit + 1) * size]) - cap)
    return over


def recount_exact(case: Instance, occupant: np.ndarray[Any, Any]) -> tuple[Any, Any, Any]:
    """H, Q and S by their definitions."""
    levels, positions = len(case.size), case.positions
    where = {expert: position for position, expert in enumerate(occupant.tolist())}
    H = np.zeros((levels, positions, case.units), int)
    Q = np.zeros((levels, positions), int)
    S = np.zeros((positions, positions))
    for token, weight in zip(case.tokens.tolist(), case.weights.tolist(), strict=True):
        used = [where[e] for e in token if e >= 0]
        for level, size in enumerate(case.size.tolist()):
            for i in used:
                for u in {p // size for p in used}:
                    H[level, i, u] += weight
                if any(p != i and p // size == i // size for p in used):
                    Q[level, i] += weight
                else:
                    for j in used:
                        if j != i:
                            S[min(i, j), max(i, j)] += case.level_weight[level] * weight
    return H, Q, S


def recount_pairs(case: Instance, occupant: np.ndarray[Any, Any]) -> tuple[Any, Any, Any]:
    levels, positions, pairs = len(case.size), case.positions, case.pairs
    H = np.zeros((levels, positions, case.units), int)
    Q = np.zeros((levels, positions), int)
    S = np.zeros((positions, positions))
    for level, size in enumerate(case.size.tolist()):
        for i in range(positions):
            for j in range(positions):
                weight = pairs[occupant[i], occupant[j]]
                H[level, i, j // size] += weight
                if i // size == j // size:
                    Q[level, i] += weight
                elif i < j:
                    S[i, j] += 2 * case.level_weight[level] * weight
    return H, Q, S


def swapped(occupant: np.ndarray[Any, Any], i: int, j: int) -> np.ndarray[Any, Any]:
    other = occupant.copy()
    other[[i, j]] = other[[j, i]]
    return other


class Tables:
    """The compiled tables of one kind, with all that a swap keeps up to date."""

    def __init__(self, case: Instance, exact: bool) -> None:
        self.case, self.exact = case, exact
        self.occupant = case.occupant.copy()
        self.position_of = np.argsort(self.occupant).astype(np.int32)
        self.load = case.load[self.occupant]
        shape = (self.occupant, case.size, case.level_weight, case.units)
        if exact:
            self.H, self.Q, self.S, self.cost = build_exact(case.tokens, case.weights, *shape)
        else:
            self.H, self.Q, self.S, self.cost = build_pairs(case.pairs, *shape)

    def swap(self, i: int, j: int) -> None:
        case = self.case
        state = (i, j, self.occupant, self.position_of, self.load, self.H, self.Q, self.S)
        if self.exact:
            first, uses = case.uses
            apply_exact(*state, case.tokens, case.weights, first, uses, case.size, case.level_weight)
        else:
            apply_pairs(*state, case.pairs, case.size, case.level_weight)

    def costs(self) -> np.ndarray[Any, Any]:
        costs = np.full((self.case.units, self.case.positions), np.nan)
        move_costs(self.H, self.Q, self.case.size, self.case.level_weight, int(self.case.size[0]), costs)
        return costs

    def check(self) -> None:
        recount = recount_exact if self.exact else recount_pairs
        H, Q, S = recount(self.case, self.occupant)
        assert np.array_equal(self.H, H)
        assert np.array_equal(self.Q, Q)
        assert np.allclose(self.S, S, atol=1e-9)
        assert np.array_equal(self.position_of[self.occupant], np.arange(self.case.positions))
        assert np.array_equal(self.load, self.case.load[self.occupant])

    def real_cost(self, occupant: np.ndarray[Any, Any]) -> float:
        return (touched_cost if self.exact else cut_cost)(self.case, occupant)


# -- tables -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(case=instances(), exact=st.booleans())
def test_tables_from_scratch_equal_their_definition(case: Instance, exact: bool) -> None:
    tables = Tables(case, exact)
    tables.check()
    assert tables.cost == pytest.approx(tables.real_cost(case.occupant))
    assert np.array_equal(tables.occupant, case.occupant)


@settings(max_examples=100, deadline=None)
@given(case=instances(), exact=st.booleans(), swaps=st.integers(1, 8), seed=st.integers(0, 2**16))
def test_tables_stay_true_over_any_sequence_of_swaps(
    case: Instance, exact: bool, swaps: int, seed: int
) -> None:
    tables, rng = Tables(case, exact), np.random.default_rng(seed)
    for _ in range(swaps):
        i, j = sorted(rng.choice(case.positions, 2, replace=False).tolist())
        before = tables.occupant.copy()
        tables.swap(i, j)
        assert np.array_equal(tables.occupant, swapped(before, i, j))
        tables.check()


@settings(max_examples=40, deadline=None)
@given(case=instances(), exact=st.booleans())
def test_a_swap_and_the_same_swap_again_change_nothing(case: Instance, exact: bool) -> None:
    tables, fresh = Tables(case, exact), Tables(case, exact)
    for _ in range(2):
        tables.swap(0, case.positions - 1)
    assert np.array_equal(tables.H, fresh.H)
    assert np.array_equal(tables.Q, fresh.Q)
    assert np.allclose(tables.S, fresh.S, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(case=instances(), exact=st.booleans(), turns=st.integers(0, 3), seed=st.integers(0, 99))
def test_the_change_of_every_swap_is_two_moves_and_the_pair(
    case: Instance, exact: bool, turns: int, seed: int
) -> None:
    tables, rng, inner = Tables(case, exact), np.random.default_rng(seed), int(case.size[0])
    for _ in range(turns):
        tables.swap(*sorted(rng.choice(case.positions, 2, replace=False).tolist()))
    costs = tables.costs()
    now = tables.real_cost(tables.occupant)
    for i in range(case.positions):
        assert costs[i // inner, i] == 0.0
        for j in range(i + 1, case.positions):
            change = costs[j // inner, i] + costs[i // inner, j] + tables.S[i, j]
            if i // inner != j // inner:
                assert change == pytest.approx(tables.real_cost(swapped(tables.occupant, i, j)) - now)
            else:
                assert tables.S[i, j] == 0.0


def test_tokens_that_hold_both_experts_move_who_is_alone() -> None:
    """Two units of three; the token uses 0, 1 and 3: swapping 0 with 3 leaves its units, not who is alone."""
    case = Instance(
        tokens=np.array([[0, 1, 3]], np.int16),
        weights=np.array([7]),
        occupant=np.arange(6, dtype=np.int32),
        size=np.array([3]),
        level_weight=np.array([1.0]),
        cap=np.array([np.inf]),
    )
    tables = Tables(case, exact=True)
    assert tables.S[0, 3] == tables.S[1, 3] == 7
    assert tables.Q[0].tolist() == [7, 7, 0, 0, 0, 0]
    tables.swap(0, 3)
    assert tables.Q[0].tolist() == [7, 7, 0, 0, 0, 0]  # now 3 and 1 share the first unit, 0 is alone
    tables.swap(1, 4)
    tables.check()


# -- the best swap ----------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    case=instances(),
    exact=st.booleans(),
    penalty=st.sampled_from([0.0, 0.02, 1.0, 50.0]),
    rest=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 999),
)
def test_the_best_swap_is_the_least_change_by_recount(
    case: Instance, exact: bool, penalty: float, rest: float, seed: int
) -> None:
    tables, rng, inner = Tables(case, exact), np.random.default_rng(seed), int(case.size[0])
    frozen = rng.random(case.positions) < rest
    now = tables.real_cost(case.occupant) + penalty * excess_load(case, case.occupant)
    changes = {}
    for i in range(case.positions):
        for j in range(i + 1, case.positions):
            if i // inner != j // inner:
                other = swapped(case.occupant, i, j)
                changes[i, j] = tables.real_cost(other) + penalty * excess_load(case, other) - now
    # A line between two changes that really differ, so that rounding decides nothing.
    distinct = np.unique(np.round(list(changes.values()), 6))
    wanted = float(rng.choice(np.concatenate([distinct - 1e-4, [-FAR]])))
    free = {(i, j): c for (i, j), c in changes.items() if c < wanted or not (frozen[i] or frozen[j])}
    unit_load, excess = _excess(tables.load, case.size, case.cap)
    assert excess == pytest.approx(excess_load(case, case.occupant))
    i, j, change = best_swap(
        tables.costs(), tables.S, tables.load, unit_load, case.size, case.cap, penalty, inner, frozen, wanted,
        np.empty(case.positions),
    )  # fmt: skip
    if not free:
        assert (i, j) == (-1, -1)
        assert change == FAR
        return
    assert (i, j) in free
    assert change == pytest.approx(min(free.values()), abs=1e-6)
    assert changes[i, j] == pytest.approx(min(free.values()), abs=1e-6)


def test_equal_swaps_are_settled_by_position() -> None:
    case = Instance(
        tokens=np.zeros((0, 2), np.int16),
        weights=np.zeros(0, np.int64),
        occupant=np.arange(6, dtype=np.int32),
        size=np.array([2]),
        level_weight=np.array([1.0]),
        cap=np.array([np.inf]),
    )
    tables = Tables(case, exact=True)
    unit_load, _ = _excess(tables.load, case.size, case.cap)
    frozen = np.array([True, False, False, False, False, False])
    found = best_swap(
        tables.costs(),
        tables.S,
        tables.load,
        unit_load,
        case.size,
        case.cap,
        1.0,
        2,
        frozen,
        -FAR,
        np.empty(6),
    )
    assert found == (1, 2, 0.0)


# -- the search -------------------------------------------------------------------------------------------------


def search(case: Instance, exact: bool, steps: int = 60, seed: int = 0) -> tuple[Any, float, float]:
    first, uses = case.uses
    rests = np.random.default_rng(seed).integers(1, 4, (steps, 2))
    found: tuple[Any, float, float] = tabu(
        case.occupant, case.load, exact, case.tokens, case.weights, first, uses, case.pairs,
        case.size, case.level_weight, case.cap, case.units, max(1, steps), rests,
    )  # fmt: skip
    return found


@settings(max_examples=60, deadline=None)
@given(case=instances(), exact=st.booleans(), seed=st.integers(0, 99))
def test_tabu_returns_what_it_says_and_nothing_worse_than_its_start(
    case: Instance, exact: bool, seed: int
) -> None:
    start = case.occupant.copy()
    best, cost, excess = search(case, exact, seed=seed)
    measure = touched_cost if exact else cut_cost
    assert np.array_equal(case.occupant, start)
    assert sorted(best.tolist()) == list(range(case.positions))
    assert cost == pytest.approx(measure(case, best))
    assert excess == pytest.approx(excess_load(case, best))
    assert (excess, cost) <= (excess_load(case, start), measure(case, start) + 1e-9)


def test_tabu_finds_the_optimum_of_small_cases() -> None:
    """Two units of three experts: all ten arrangements tried by hand."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        case = Instance(
            tokens=np.argsort(rng.random((12, 6)), axis=1)[:, :3].astype(np.int16),
            weights=rng.integers(1, 5, 12),
            occupant=rng.permutation(6).astype(np.int32),
            size=np.array([3]),
            level_weight=np.array([1.0]),
            cap=np.array([np.inf]),
        )
        first = [[0, a, b] for a in range(1, 6) for b in range(a + 1, 6)]
        all_of_them = [np.array([*unit, *(set(range(6)) - set(unit))]) for unit in first]
        assert search(case, exact=True)[1] == pytest.approx(min(touched_cost(case, o) for o in all_of_them))


@settings(max_examples=10, deadline=None)
@given(case=instances(), exact=st.booleans())
def test_no_steps_leave_the_start(case: Instance, exact: bool) -> None:
    best, cost, _ = search(case, exact, steps=0)
    assert np.array_equal(best, case.occupant)
    assert cost == pytest.approx((touched_cost if exact else cut_cost)(case, case.occupant))
