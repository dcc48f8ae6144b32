from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from placer.batches import PHASES, arrivals, steps
from placer.errors import InvalidInput
from placer.trace import Trace

Ints = np.ndarray[Any, Any]
SEQUENCES = hnp.arrays(np.int16, st.integers(1, 80), elements=st.integers(-2, 12))


def trace_of(sequence: Ints | None, num_tokens: int = 3, **more: Any) -> Trace:
    tokens = num_tokens if sequence is None else len(sequence)
    return Trace(topk_idx=np.zeros((tokens, 1, 1), np.uint8), num_experts=1, sequence=sequence, **more)


def queue(trace: Trace, seed: int) -> list[list[int]]:
    """Tokens of each sequence, in the order of arrival."""
    turn = arrivals(trace, seed)
    return [np.flatnonzero(turn == place).tolist() for place in range(turn.max() + 1)]


def prefill_engine(waiting: list[list[int]], size: int) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    for tokens in waiting:
        if len(batches[-1]) + len(tokens) > size and batches[-1]:
            batches.append([])
        for token in tokens:
            if len(batches[-1]) == size:
                batches.append([])
            batches[-1].append(token)
    return batches


def decode_engine(waiting: list[list[int]], size: int) -> list[list[int]]:
    waiting = [list(tokens) for tokens in waiting]
    running: list[list[int]] = []
    batches: list[list[int]] = []
    while waiting or running:
        while waiting and len(running) < size:
            running.append(waiting.pop(0))
        batches.append([tokens.pop(0) for tokens in running])
        running = [tokens for tokens in running if tokens]
    return batches


@pytest.mark.parametrize(("phase", "engine"), [("prefill", prefill_engine), ("decode", decode_engine)])
@given(sequence=SEQUENCES, size=st.integers(1, 30), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_steps_are_those_of_an_engine_run_token_by_token(
    phase: str, engine: Any, sequence: Ints, size: int, seed: int
) -> None:
    trace = trace_of(sequence)
    expected = np.full(len(sequence), -1)
    for step, tokens in enumerate(engine(queue(trace, seed), size)):
        expected[tokens] = step
    np.testing.assert_array_equal(steps(trace, size, seed=seed, phase=phase), expected)


@pytest.mark.parametrize("phase", PHASES)
@given(sequence=SEQUENCES, size=st.integers(1, 100), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_no_step_is_empty_or_too_large_and_sequences_keep_their_order(
    phase: str, sequence: Ints, size: int, seed: int
) -> None:
    found = steps(trace_of(sequence), size, seed=seed, phase=phase)
    assert found.dtype == np.int32
    assert found.shape == sequence.shape
    held = np.bincount(found)
    assert held.min() >= 1
    assert held.max() <= size
    for one in np.unique(sequence):
        apart = np.diff(found[sequence == one])
        assert set(apart.tolist()) <= ({0, 1} if phase == "prefill" else {1})


@given(sequence=SEQUENCES, size=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_prefill_cuts_only_sequences_longer_than_a_step(sequence: Ints, size: int) -> None:
    found = steps(trace_of(sequence), size, phase="prefill")
    for one in np.unique(sequence):
        mine = found[sequence == one]
        assert np.unique(mine).size == -(-mine.size // size)


@given(sequence=SEQUENCES, size=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_decode_runs_full_until_none_is_left_to_join(sequence: Ints, size: int) -> None:
    held = np.bincount(steps(trace_of(sequence), size, phase="decode"))
    assert (np.diff(held) <= 0).all()
    assert held[0] == min(size, np.unique(sequence).size)


def test_a_trace_is_rebatched_and_otherwise_left_alone() -> None:
    sequence = np.array([5, 5, 5, 9, 9, 2], np.int8)
    trace = trace_of(sequence, step=np.zeros(6, int), domain=np.arange(6), name="mine", phase="decode")
    again = trace.rebatch(2)
    assert again.step is not None
    np.testing.assert_array_equal(again.step, steps(trace, 2))
    assert (again.name, again.phase, again.digest) == ("mine", "decode", trace.digest)
    np.testing.assert_array_equal(again.domain, np.arange(6))
    np.testing.assert_array_equal(trace.step, np.zeros(6))
    with pytest.raises(ValueError, match="read-only"):
        again.step[0] = 7


def test_a_seed_fixes_the_steps_and_another_changes_them() -> None:
    sequence = np.repeat(np.arange(30), 4)
    trace = trace_of(sequence)
    for phase in PHASES:
        first = steps(trace, 10, phase=phase)
        np.testing.assert_array_equal(trace.rebatch(10, phase=phase, seed=0).step, first)
        assert (steps(trace, 10, phase=phase, seed=1) != first).any()


def test_steps_follow_the_token_and_not_its_place_in_the_file() -> None:
    sequence = np.repeat(np.arange(12), np.arange(1, 13))
    order = np.argsort(np.random.default_rng(4).random(12)[sequence], kind="stable")  # whole sequences move
    trace = trace_of(sequence)
    for phase in PHASES:
        moved = steps(trace.select(order), 9, phase=phase)
        np.testing.assert_array_equal(moved, steps(trace, 9, phase=phase)[order])


@pytest.mark.parametrize(
    ("own", "meant"),
    [
        (None, "prefill"),
        ("prefill (teacher-forced)", "prefill"),
        ("training", "prefill"),
        ("decode", "decode"),
        ("Decode, greedy", "decode"),
    ],
)
def test_the_phase_is_the_trace_s_own(own: str | None, meant: str) -> None:
    sequence = np.repeat(np.arange(3), 4)
    np.testing.assert_array_equal(
        steps(trace_of(sequence, phase=own), 4), steps(trace_of(sequence), 4, phase=meant)
    )
    assert (
        steps(trace_of(sequence), 4, phase="prefill") != steps(trace_of(sequence), 4, phase="decode")
    ).any()


def test_a_step_larger_than_the_trace_is_one_step_of_prefill() -> None:
    trace = trace_of(np.array([0, 0, 1]))
    assert steps(trace, 10**30).tolist() == [0, 0, 0]
    assert steps(trace, 10**30, phase="decode").tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: trace_of(None, name="flat").rebatch(4), "sequence: not in flat"),
        (lambda: trace_of(np.zeros(3, int)).rebatch(0), "tokens_per_step: found 0"),
        (lambda: trace_of(np.zeros(3, int)).rebatch(2.5), "tokens_per_step: found 2.5"),  # type: ignore[arg-type]
        (lambda: trace_of(np.zeros(3, int)).rebatch(True), "tokens_per_step: found True"),
        (lambda: trace_of(np.zeros(3, int)).rebatch(2, phase="train"), "expected prefill or decode"),
    ],
)
def test_what_cannot_be_batched_is_refused_in_one_line(call: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
