from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from placer.batches import arrivals
from placer.errors import InvalidInput
from placer.homes import RULES, homes
from placer.trace import Trace

Ints = np.ndarray[Any, Any]


def trace_of(tokens: int, **arrays: Any) -> Trace:
    return Trace(topk_idx=np.zeros((tokens, 1, 1), np.uint8), num_experts=1, name="mine", **arrays)


def sticky(sequence: Ints, num_ranks: int, seed: int = 0) -> Ints:
    found = homes(trace_of(len(sequence), sequence=sequence), num_ranks, "sticky", seed)
    assert found is not None
    return found


@given(
    sequence=hnp.arrays(np.int16, st.integers(1, 80), elements=st.integers(-2, 12)),
    num_ranks=st.integers(1, 20),
    seed=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_sticky_sequences_stay_on_one_rank_and_ranks_are_even(
    sequence: Ints, num_ranks: int, seed: int
) -> None:
    found = sticky(sequence, num_ranks, seed)
    assert found.dtype == np.int32
    tokens = np.bincount(found, minlength=num_ranks)
    assert tokens.size == num_ranks
    for one in np.unique(sequence):
        assert np.unique(found[sequence == one]).size == 1
    longest = np.unique(sequence, return_counts=True)[1].max()
    assert tokens.max() - tokens.min() <= longest


@given(
    sequence=hnp.arrays(np.int16, st.integers(1, 60), elements=st.integers(0, 12)),
    num_ranks=st.integers(1, 9),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_sticky_sequences_are_dealt_to_the_rank_with_the_fewest_tokens(
    sequence: Ints, num_ranks: int, seed: int
) -> None:
    turn = arrivals(trace_of(len(sequence), sequence=sequence), seed)
    expected, tokens = np.empty(len(sequence), int), [0] * num_ranks
    for place in range(turn.max() + 1):
        rank = tokens.index(min(tokens))
        expected[turn == place] = rank
        tokens[rank] += int((turn == place).sum())
    np.testing.assert_array_equal(sticky(sequence, num_ranks, seed), expected)


def test_a_seed_fixes_sticky_homes_and_another_changes_them() -> None:
    sequence = np.repeat(np.arange(40), 3)
    np.testing.assert_array_equal(sticky(sequence, 8, 5), sticky(sequence, 8, 5))
    assert (sticky(sequence, 8, 5) != sticky(sequence, 8, 6)).any()


def test_recorded_homes_are_the_source_ranks() -> None:
    ranks = np.array([3, 0, 1], np.uint16)
    found = homes(trace_of(3, source_rank=ranks), 4, "trace")
    assert found is not None
    assert found.dtype == np.int32
    assert found.tolist() == [3, 0, 1]


def test_uniform_homes_are_left_to_expectation() -> None:
    assert homes(trace_of(3, source_rank=np.array([9, 9, 9])), 4, "uniform") is None
    assert set(RULES) == {"uniform", "trace", "sticky"}


@pytest.mark.parametrize(
    ("arrays", "num_ranks", "rule", "words"),
    [
        ({}, 4, "trace", "source_rank: not in mine"),
        (
            {"source_rank": np.array([0, 4, 1])},
            4,
            "trace",
            "found rank 4 at token 1 of mine, expected 0 to 3",
        ),
        ({"source_rank": np.array([0, 1, -1])}, 4, "trace", "found rank -1 at token 2"),
        ({}, 4, "sticky", "sequence: not in mine"),
        ({}, 4, "stiky", "did you mean sticky"),
        ({}, 0, "uniform", "found 0 ranks"),
    ],
)
def test_homes_that_are_not_there_are_refused_in_one_line(
    arrays: dict[str, Any], num_ranks: int, rule: str, words: str
) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        homes(trace_of(3, **arrays), num_ranks, rule)
    assert "\n" not in str(caught.value)
