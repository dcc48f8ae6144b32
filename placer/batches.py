"""Batches: in which engine step each token of a trace runs.

Load and traffic of one step depend on which tokens run together. A recorded trace often has no steps, or those
of another batch size; here its sequences are queued as an engine would queue them.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapreplace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from placer.errors import InvalidInput

if TYPE_CHECKING:
    from placer.trace import Trace

Ints = NDArray[np.int64]


def steps(
    trace: Trace, tokens_per_step: int, *, seed: int = 0, phase: str | None = None
) -> NDArray[np.int32]:
    """The engine step in which each token runs, 0, 1, ... without gaps.

    Sequences arrive in the order of `arrivals`. "prefill" packs whole sequences into a step until the next
    one does not fit; only a sequence longer than a step is cut, and what is left of it shares its last step.
    "decode" is continuous batching (Orca, OSDI 2022): `tokens_per_step` sequences run at once, each gives
    one token a step, and a finished one is replaced by the next in the following step. The last steps of
    "decode", when none is left to replace a finished one, run fewer tokens and are kept.

    Parameters
    ----------
    trace
        With `sequence`; the order of its tokens is the order within a sequence.
    tokens_per_step
        Tokens in one step over all ranks, at most.
    seed
        Another seed gives another order of arrival.
    phase
        "prefill" or "decode"; by default "decode" where the trace's own phase begins so, else "prefill".

    Returns
    -------
    (num_tokens,) int32

    Raises
    ------
    InvalidInput
        When the trace has no sequences, a step holds no token or the phase is another.

    Examples
    --------
    >>> from placer.trace import Trace
    >>> sequence = np.array([0, 0, 0, 1, 1, 2])  # which arrive in the order 1, 2, 0
    >>> trace = Trace(topk_idx=np.zeros((6, 1, 1), dtype=np.uint8), num_experts=1, sequence=sequence)
    >>> steps(trace, 3, phase="prefill").tolist(), steps(trace, 2, phase="decode").tolist()
    ([1, 1, 1, 0, 0, 0], [1, 2, 3, 0, 1, 0])
    """
    if (
        not isinstance(tokens_per_step, int | np.integer)
        or isinstance(tokens_per_step, bool)
        or tokens_per_step < 1
    ):
        raise InvalidInput(f"tokens_per_step: found {tokens_per_step!r}, expected an integer of at least 1")
    if phase is None:
        phase = "decode" if (trace.phase or "").lower().startswith("decode") else "prefill"
    if phase not in PHASES:
        raise InvalidInput(f"phase: found {phase!r}, expected {' or '.join(PHASES)}")
    turn = arrivals(trace, seed)
    lengths = np.bincount(turn)
    position = np.empty_like(turn)
    position[np.argsort(turn, kind="stable")] = np.arange(turn.size) - np.repeat(
        np.cumsum(lengths) - lengths, lengths
    )
    size = min(int(tokens_per_step), turn.size)  # so that any integer fits the arithmetic of arrays
    return PHASES[phase](turn, position, lengths, size).astype(np.int32)


def uses_by_step(
    topk: NDArray[np.signedinteger], step: NDArray[np.integer], num_experts: int
) -> NDArray[np.int64]:
    """Tokens of every step that use each expert, ``(num_steps, num_experts)``, steps ascending.

    Parameters
    ----------
    topk
        Experts of each token in one layer, ``(num_tokens, top_k)``, -1 = none.
    step
        The step in which each token runs, ``(num_tokens,)``.
    num_experts
        Logical experts.

    Examples
    --------
    Both tokens of step 5 use expert 0, whose weights that step reads once:

    >>> uses = uses_by_step(np.array([[0, 1], [0, 2], [2, -1]]), np.array([5, 5, 9]), 3)
    >>> uses.tolist(), activations(uses).tolist()
    ([[2, 1, 1], [0, 0, 1]], [1, 1, 2])
    """
    ids, place = np.unique(step, return_inverse=True)
    used = topk >= 0
    key = (place.reshape(-1, 1) * num_experts + topk)[used]
    return np.bincount(key, minlength=len(ids) * num_experts).reshape(len(ids), num_experts)


def activations(uses: NDArray[np.int64]) -> NDArray[np.int64]:
    """Steps in which at least one token uses each expert, ``(num_experts,)``, from `uses_by_step`.

    In memory-bound decode they are an expert's load: a step reads the weights of every expert that it uses once,
    however many tokens do.
    """
    steps: Ints = np.count_nonzero(uses, axis=0)
    return steps


def arrivals(trace: Trace, seed: int = 0) -> Ints:
    """Place of each token's sequence in a random order of arrival, ``(num_tokens,)``: 0 is the first.

    The order is that of `placer.trace.sequence_hash`, so it depends neither on the order of the tokens nor on
    the machine, and steps and homes of one seed see the same queue.

    Raises
    ------
    InvalidInput
        When the trace has no array `sequence`.
    """
    if trace.sequence is None:
        raise InvalidInput(f"sequence: not in {trace.name}, expected the sequence of each token")
    return np.unique(trace.sequence_key(seed), return_inverse=True)[1].reshape(-1).astype(np.int64)


def _prefill(turn: Ints, position: Ints, lengths: Ints, size: int) -> Ints:
    first, step, filled = [], 0, 0
    for length in lengths.tolist():
        if filled and filled + length > size:
            step, filled = step + 1, 0
        first.append(step)
        full, filled = divmod(filled + length, size)  # several only if it began an empty step
        step += full
    return np.array(first)[turn] + position // size


def _decode(turn: Ints, position: Ints, lengths: Ints, size: int) -> Ints:
    first, free = [], [0] * min(size, lengths.size)  # the step from which each place is free, as a heap
    for length in lengths.tolist():
        first.append(free[0])
        heapreplace(free, free[0] + length)
    return np.array(first)[turn] + position


#: How sequences are batched, by phase: (turn, position in the sequence, sequence lengths, size) to steps.
PHASES: dict[str, Callable[[Ints, Ints, Ints, int], Ints]] = {"prefill": _prefill, "decode": _decode}
