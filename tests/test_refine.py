from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.clock import Clock
from placer.errors import InvalidInput
from placer.layer import Layer, Occupant
from placer.solvers import refine

LONG = Clock.start(
    rounds=500
)  # far more swaps than any descent here takes, so a cycle fails instead of hanging
Tokens = list[list[int]]
SHAPES = [(1, 1, 2), (1, 1, 4), (1, 2, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1), (2, 2, 2), (1, 3, 2), (3, 2, 1)]


def layer_of(
    tokens: Tokens,
    num_experts: int,
    shape: tuple[int, int, int],
    slots_per_rank: int,
    *,
    seconds: tuple[float, float, float] = (1.0, 10.0, 25.0),
    max_load: float | None = None,
) -> Layer:
    racks, servers, gpus = shape
    topk = np.array(tokens, np.int16)
    return Layer(
        index=0,
        num_experts=num_experts,
        num_ranks=racks * servers * gpus,
        slots_per_rank=slots_per_rank,
        unit_ranks=(1, gpus, gpus * servers),
        seconds=seconds,
        server_ranks=gpus,
        rule="nearest",
        max_load=max_load,
        margin=0.0,
        load=np.bincount(topk[topk >= 0], minlength=num_experts).astype(np.int64),
        topk=topk,
    )


@st.composite
def arranged(draw: st.DrawFn, max_load: float | None = None) -> tuple[Layer, Occupant]:
    """A layer with anything a trace may hold, and experts and empty slots in any order."""
    shape = draw(st.sampled_from(SHAPES))
    ranks = int(np.prod(shape))
    per_rank = draw(st.integers(1, 3))
    num_experts = draw(st.integers(max(2, ranks * per_rank - 3), ranks * per_rank))
    width = draw(st.integers(1, min(4, num_experts)))
    used = draw(st.integers(width, num_experts))  # experts beyond stay unused
    token = st.lists(st.integers(0, used - 1), min_size=width, max_size=width, unique=True)
    dropped = st.lists(st.booleans(), min_size=width, max_size=width)
    rows = draw(st.lists(st.tuples(token, dropped), min_size=1, max_size=25))
    tokens = [[-1 if gone else e for e, gone in zip(*row, strict=True)] for row in rows]
    seconds = draw(st.tuples(*[st.sampled_from([0.0, 1.0, 7.5])] * 3))
    layer = layer_of(tokens, num_experts, shape, per_rank, seconds=seconds, max_load=max_load)
    return layer, np.array(draw(st.permutations(range(layer.num_slots))), np.int32)


def touched(layer: Layer, occupant: Occupant) -> float:
    """Weighted touched units, token by token."""
    slot = {int(expert): p for p, expert in enumerate(occupant)}
    total = 0.0
    for token in layer.tokens.tolist():
        for size, weight in zip(layer.sizes, layer.weights_of_levels, strict=True):
            total += weight * len({slot[e] // size for e in token if e >= 0})
    return total


def swapped(occupant: Occupant, p: int, q: int) -> Occupant:
    other = occupant.copy()
    other[[p, q]] = other[[q, p]]
    return other


def by_hand(layer: Layer, occupant: Occupant, value: object) -> npt.NDArray[np.float64]:
    table = np.zeros((len(occupant), len(occupant)))
    for p in range(len(occupant)):
        for q in range(len(occupant)):
            table[p, q] = value(layer, swapped(occupant, p, q)) - value(layer, occupant)  # type: ignore[operator]
    return table


@settings(max_examples=60, deadline=None)
@given(arranged())
def test_every_swap_changes_the_objective_as_counting_anew_says(case: tuple[Layer, Occupant]) -> None:
    layer, occupant = case
    np.testing.assert_allclose(
        refine.swap_changes(layer, occupant), by_hand(layer, occupant, touched), rtol=0, atol=1e-9
    )


@settings(max_examples=30, deadline=None)
@given(arranged())
def test_the_objective_is_what_counting_token_by_token_says(case: tuple[Layer, Occupant]) -> None:
    layer, occupant = case
    assert refine.weighted_touched(layer, occupant) == pytest.approx(touched(layer, occupant))


@settings(max_examples=30, deadline=None)
@given(arranged(max_load=1.05))
def test_every_swap_changes_the_excess_as_the_layer_says(case: tuple[Layer, Occupant]) -> None:
    layer, occupant = case
    np.testing.assert_allclose(
        refine.excess_changes(layer, occupant), by_hand(layer, occupant, Layer.excess), rtol=0, atol=1e-9
    )


def test_a_token_with_both_experts_keeps_its_count() -> None:
    layer = layer_of([[0, 2], [0, 2], [0, 3]], 4, (1, 1, 2), 2)
    changes = refine.swap_changes(layer, np.arange(4, dtype=np.int32))
    assert changes[0, 2] == -1  # 0 joins 3; the two tokens of 0 and 2 still touch both units
    assert changes[1, 2] == -2  # 2 joins 0
    assert changes[1, 3] == -1
    assert changes[0, 3] == -2


@settings(max_examples=30, deadline=None)
@given(arranged())
def test_a_descent_ends_where_no_swap_helps_and_never_above_its_start(case: tuple[Layer, Occupant]) -> None:
    layer, occupant = case
    start = layer.slots(occupant)
    placed = refine.place(layer, rng=np.random.default_rng(0), clock=LONG, initial=start)
    end = layer.occupant(placed.slots)
    assert sorted(placed.slots[placed.slots >= 0]) == list(range(layer.num_experts))
    assert refine.swap_changes(layer, end).min() >= -1e-6
    assert touched(layer, end) <= touched(layer, occupant) + 1e-6
    assert placed.claim == pytest.approx(layer.cost(end))
    assert (placed.rounds == 0) == (touched(layer, end) > touched(layer, occupant) - 1e-6)


@settings(max_examples=30, deadline=None)
@given(arranged(max_load=1.05))
def test_with_caps_the_descent_stays_within_them_from_its_own_start(case: tuple[Layer, Occupant]) -> None:
    layer, _ = case
    placed = refine.place(layer, rng=np.random.default_rng(0), clock=LONG)
    assert layer.excess(layer.occupant(placed.slots)) <= 1e-6
    assert touched(layer, layer.occupant(placed.slots)) <= touched(layer, layer.reference) + 1e-6


def test_an_excess_is_lowered_even_where_that_costs_traffic() -> None:
    hot = [[0, 1]] * 10 + [[2, 3]] * 2
    layer = layer_of(hot, 4, (1, 1, 2), 2, max_load=1.0)
    placed = refine.place(
        layer, rng=np.random.default_rng(0), clock=LONG, initial=np.arange(4, dtype=np.int32)
    )
    assert layer.excess(np.arange(4, dtype=np.int32)) == 8
    assert layer.excess(layer.occupant(placed.slots)) == 0
    free = layer_of(hot, 4, (1, 1, 2), 2)
    placed = refine.place(
        free, rng=np.random.default_rng(0), clock=LONG, initial=np.arange(4, dtype=np.int32)
    )
    assert placed.slots.tolist() == [0, 1, 2, 3]


def test_a_swap_that_breaks_a_cap_is_refused() -> None:
    tokens = [[0, 2]] * 10 + [[1, 3]] * 2
    layer = layer_of(tokens, 4, (1, 1, 2), 2, max_load=1.0)
    assert refine.best_swap(layer, np.arange(4, dtype=np.int32)) is None
    assert refine.best_swap(layer_of(tokens, 4, (1, 1, 2), 2), np.arange(4, dtype=np.int32)) == (0, 3)


def test_rounds_are_swaps_and_the_clock_limits_them() -> None:
    tokens = [[0, 4], [1, 5], [2, 6], [3, 7]] * 3
    layer = layer_of(tokens, 8, (1, 1, 4), 2)
    free = refine.place(layer, rng=np.random.default_rng(0), clock=LONG)
    assert free.rounds > 1
    once = refine.place(layer, rng=np.random.default_rng(0), clock=Clock.start(rounds=1))
    assert once.rounds == 1
    assert touched(layer, layer.occupant(free.slots)) < touched(layer, layer.occupant(once.slots))
    none = refine.place(layer, rng=np.random.default_rng(0), clock=Clock.start(rounds=0))
    assert (none.rounds, none.slots.tolist()) == (0, list(range(8)))


def test_the_start_given_is_left_as_it_was() -> None:
    layer = layer_of([[0, 2], [1, 3]], 4, (1, 1, 2), 2)
    start = np.arange(4, dtype=np.int32)
    assert refine.place(layer, rng=np.random.default_rng(0), clock=LONG, initial=start).rounds == 1
    assert start.tolist() == [0, 1, 2, 3]
    capped = layer_of([[0, 2], [1, 3]], 4, (1, 1, 2), 2, max_load=2.0)
    before = capped.reference.tolist()
    refine.place(capped, rng=np.random.default_rng(0), clock=LONG)
    assert capped.reference.tolist() == before


def test_a_start_with_copies_is_refused_in_one_line() -> None:
    layer = layer_of([[0, 1]], 3, (1, 1, 2), 2)
    with pytest.raises(InvalidInput) as caught:
        refine.place(
            layer, rng=np.random.default_rng(0), clock=LONG, initial=np.array([0, 1, 1, 2], np.int32)
        )
    assert str(caught.value) == (
        "initial: expert 1 of layer 0 has 2 slots, expected 1, for refine makes no copies"
    )


def test_counts_alone_are_refused_in_one_line() -> None:
    with_tokens = layer_of([[0, 1]], 2, (1, 1, 2), 1)
    counts = Layer(
        **{
            name: getattr(with_tokens, name)
            for name in Layer.__dataclass_fields__
            if name not in ("topk", "pair_counts")
        },
        pair_counts=np.array([[0, 1], [1, 0]]),
    )
    with pytest.raises(InvalidInput, match="found counts only"):
        refine.swap_changes(counts, counts.linear())
