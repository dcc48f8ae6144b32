"""A second opinion on certificates of `placer.bounds.columns`, by code that shares nothing with what found them.

It has its own counting, its own branch and bound (experts one after the other, their companions bounded by Jensen's
inequality, nothing else) and its own integer program (HiGHS over the listed contents, where the package proves with
CP-SAT). Units hold equally many experts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

SECONDS = 10.0  # for HiGHS to choose among the contents of one certificate


@njit(cache=True, nogil=True)
def _visit(order, size, sets, count, start, uses, pairs, price, load, low, high, limit, rows):  # type: ignore[no-untyped-def]
    """Contents of ``order[0]`` and later experts that cost less than `limit` above prices: how many, and the least."""
    experts = len(price)
    table = np.empty((size + 1, experts, experts))
    left = np.empty((size + 1, experts), np.int64)
    many, tried = np.zeros(size + 1, np.int64), np.zeros(size + 1, np.int64)
    value, heat = np.zeros(size + 1), np.zeros(size + 1)
    held = np.zeros(size + 1, np.int64)
    floors = np.zeros((size + 1, experts))
    share = np.empty(experts)
    by = np.zeros(len(sets), np.int64)
    found, least = 0, np.inf
    table[0] = pairs
    held[1], depth, entered = order[0], 1, False
    many[1] = len(order) - 1
    left[1, : many[1]] = order[1:]
    while depth > 0:
        if not entered:
            e = held[depth]
            table[depth] = table[depth - 1]
            value[depth] = value[depth - 1] + table[depth, e, e] - price[e]
            heat[depth] = heat[depth - 1] + load[e]
            for at in range(start[e], start[e + 1]):
                t = uses[at]
                if by[t] == 0:
                    by[t] = depth
                    for a in sets[t]:
                        for b in sets[t]:
                            if a >= 0 and b >= 0:
                                table[depth, a, b] -= count[t]
            room, n = size - depth, many[depth]
            tried[depth] = 0
            if room == 0:
                if value[depth] < limit and low <= heat[depth] <= high:
                    least = min(least, value[depth])
                    if found < len(rows):
                        rows[found] = held[1:]
                    found += 1
                n = many[depth] = 0
            for i in range(n):
                e = left[depth, i]
                mates = np.sort(table[depth, e][left[depth, :n]])
                others = mates.sum() - table[depth, e, e] if n < room else 0.0
                if n >= room:
                    skipped, taken = False, 0
                    for x in range(n - 1, -1, -1):
                        if mates[x] == table[depth, e, e] and not skipped:
                            skipped = True  # the expert itself
                        elif taken < room - 1:
                            others += mates[x]
                            taken += 1
                own = table[depth, e, e]
                mean = min(1.0 + others / own, float(room)) if own > 0 else 1.0
                c = np.floor(mean)
                share[i] = own * (1.0 / c - (mean - c) / (c * (c + 1.0))) - price[e]
            ascending = np.argsort(share[:n])
            left[depth, :n] = left[depth, :n][ascending]
            for i in range(n):
                total = value[depth]
                for x in range(i, min(i + room, n)):
                    total += share[ascending[x]]
                floors[depth, i] = total if i + room <= n else np.inf
            entered = True
        i = tried[depth]
        if i < many[depth] and floors[depth, i] < limit + 1e-6:
            tried[depth] += 1
            held[depth + 1] = left[depth, i]
            many[depth + 1] = many[depth] - i - 1
            left[depth + 1, : many[depth + 1]] = left[depth, i + 1 : many[depth]]
            depth += 1
            entered = False
            continue
        for at in range(start[held[depth]], start[held[depth] + 1]):
            if by[uses[at]] == depth:
                by[uses[at]] = 0
        depth -= 1
    return found, least


def confirmed(
    sets: npt.NDArray[Any],
    count: npt.NDArray[Any],
    load: npt.NDArray[Any],
    *,
    units: int,
    size: int,
    cap: float,
    bound: int,
    certificate: Any,
) -> bool | None:
    """Whether a certificate proves its bound; None where HiGHS is not through with its contents in `SECONDS`.

    With prices p, no content cheaper than p + floor and none but the listed cheaper than p + reach, a partition costs
    at least ``sum(p) + units * floor``; if not all its contents are listed, ``sum(p) + (units - 1) * floor + reach``.
    """
    # A full unit's price may as well be paid by its experts.
    price = np.asarray(certificate["prices"], float) + float(certificate["unit_price"]) / size
    experts = len(price)
    if units * size != experts:
        raise ValueError("expected units that hold equally many experts")
    flat = sets.ravel()
    by_expert = np.argsort(flat, kind="stable")
    start = np.searchsorted(flat[by_expert], np.arange(experts + 1))
    uses = by_expert // sets.shape[1]
    used = np.zeros((experts, len(sets)))
    rows, _ = np.nonzero(sets >= 0)
    used[sets[sets >= 0], rows] = 1.0
    pairs = (used * count) @ used.T
    low = load.sum() - (units - 1) * cap if math.isfinite(cap) else 0.0
    listed = "contents" in certificate
    floor = min(0.0, float(certificate["floor"]))
    limit = float(certificate["reach"]) if listed else floor
    order = np.argsort(-np.diag(pairs), kind="stable")
    contents, least = [], np.inf
    for first in range(experts - size + 1):
        room = np.empty((1_000_000, size), np.int64)
        found, cheapest = _visit(
            order[first:], size, sets, count, start, uses, pairs, price, load * 1.0, low, cap, limit, room
        )
        if found > len(room):
            raise ValueError(f"found {found} contents below the limit, expected at most {len(room)}")
        least = min(least, cheapest)
        contents += [tuple(sorted(row)) for row in room[:found].tolist()]
    if least < floor - 1e-6:
        return False
    total = float(price.sum())
    if not listed:
        return math.ceil(total + units * floor - 1e-6) >= bound
    if set(contents) - {tuple(sorted(row)) for row in np.asarray(certificate["contents"]).tolist()}:
        return False
    if math.ceil(total + (units - 1) * floor + limit - 1e-6) < bound:
        return False
    least, through = _cheapest(contents, used, count)
    if least >= bound:
        return True
    return False if through else None


def _cheapest(contents: list[tuple[int, ...]], used: Any, count: Any) -> tuple[float, bool]:
    """What HiGHS says the cheapest partition into these contents costs at least, and whether it is through."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    if not contents:
        return math.inf, True
    rows = np.array(contents)
    cost = np.array([(used[row].max(axis=0) * count).sum() for row in rows])
    holds = np.zeros((len(used), len(rows)))
    holds[rows.T, np.arange(len(rows))] = 1.0
    solved = milp(
        cost,
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(holds, 1, 1),
        options={"mip_rel_gap": 0.0, "time_limit": SECONDS},
    )
    if solved.status == 2:
        return math.inf, True
    if solved.mip_dual_bound is None:
        return -math.inf, False
    return float(np.ceil(solved.mip_dual_bound - 1e-3)), solved.status == 0
