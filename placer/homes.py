"""Homes: the rank on which each token lives before dispatch."""

from __future__ import annotations

from heapq import heapreplace

import numpy as np
from numpy.typing import NDArray

from placer.batches import arrivals
from placer.errors import InvalidInput
from placer.files import nearest
from placer.trace import Trace

#: What is known of homes: nothing, what was recorded, or that a sequence stays on one rank.
RULES = ("uniform", "trace", "sticky")


def homes(trace: Trace, num_ranks: int, rule: str, seed: int = 0) -> NDArray[np.int32] | None:
    """The home of each token.

    Parameters
    ----------
    trace
        The tokens.
    num_ranks
        Ranks to live on.
    rule
        "uniform": every rank is equally likely, and expectations over them are exact. "trace": `source_rank`
        of the trace. "sticky": a sequence lives on one rank; in the order of `placer.batches.arrivals`, each
        goes to the rank with the fewest tokens so far, the lowest on ties, so ranks differ by at most the
        longest sequence.
    seed
        Another seed gives another order of arrival, for "sticky".

    Returns
    -------
    (num_tokens,) int32 in ``[0, num_ranks)``, or None for "uniform"

    Raises
    ------
    InvalidInput
        When the rule is unknown, or the trace lacks what it needs or names ranks that do not exist.

    Examples
    --------
    >>> sequence = np.array([0, 0, 0, 1, 1, 2])  # which arrive in the order 1, 2, 0
    >>> trace = Trace(topk_idx=np.zeros((6, 1, 1), dtype=np.uint8), num_experts=1, sequence=sequence)
    >>> homes(trace, 2, "sticky").tolist()
    [1, 1, 1, 0, 0, 1]
    """
    if rule not in RULES:
        raise InvalidInput(f"unknown homes {rule!r}; {nearest(rule, RULES)}")
    if num_ranks < 1:
        raise InvalidInput(f"homes: found {num_ranks} ranks, expected at least 1")
    if rule == "uniform":
        return None
    return _recorded(trace, num_ranks) if rule == "trace" else _sticky(trace, num_ranks, seed)


def _recorded(trace: Trace, num_ranks: int) -> NDArray[np.int32]:
    ranks = trace.source_rank
    if ranks is None:
        raise InvalidInput(f"source_rank: not in {trace.name}, expected the rank of each token")
    wrong = (ranks < 0) | (ranks >= num_ranks)
    if wrong.any():
        token = int(wrong.argmax())
        raise InvalidInput(
            f"source_rank: found rank {ranks[token]} at token {token} of {trace.name}, expected 0 to {num_ranks - 1}"
        )
    return ranks.astype(np.int32)


def _sticky(trace: Trace, num_ranks: int, seed: int) -> NDArray[np.int32]:
    turn = arrivals(trace, seed)
    lengths = np.bincount(turn).tolist()
    # No rank gets a second sequence before every rank has one, so those past the last sequence stay empty.
    ranks = [(0, rank) for rank in range(min(num_ranks, len(lengths)))]
    home = []
    for length in lengths:
        tokens, rank = ranks[0]
        home.append(rank)
        heapreplace(ranks, (tokens + length, rank))
    return np.array(home, dtype=np.int32)[turn]
