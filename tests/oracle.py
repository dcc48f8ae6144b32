"""The optimum by dynamic programming over subsets: the judge of methods on up to 16 experts."""

from __future__ import annotations

import itertools

import numpy as np


def optimum(topk: np.ndarray, num_experts: int, units: int, cap: float = np.inf) -> float:
    """Fewest (token, unit) incidences when the experts are split into `units` equal sets within a load cap.

    `best[S]` is the cheapest partition of the experts in S into contents; the content that holds the lowest
    expert of S is tried in every way, so that each partition is met once.
    """
    size = num_experts // units
    sets = [sum(1 << int(e) for e in row if e >= 0) for row in topk]
    load = np.bincount(topk[topk >= 0], minlength=num_experts)
    best = {0: 0.0}

    def cost(content: int) -> int:
        return sum(1 for tokens in sets if tokens & content)

    costs: dict[int, float] = {}
    for members in itertools.combinations(range(num_experts), size):
        if load[list(members)].sum() <= cap:
            content = sum(1 << e for e in members)
            costs[content] = cost(content)
    by_lowest: dict[int, list[tuple[int, float]]] = {}
    for content, value in costs.items():
        by_lowest.setdefault(content & -content, []).append((content, value))

    def solve(left: int) -> float:
        if left not in best:
            best[left] = min(
                (
                    value + solve(left & ~content)
                    for content, value in by_lowest.get(left & -left, [])
                    if content & ~left == 0
                ),
                default=np.inf,
            )
        return best[left]

    return solve((1 << num_experts) - 1)
