"""Set partition: the cheapest choice of contents that holds every item once, by linear relaxation, cuts and CP-SAT.

A content is one unit's items; its cost does not depend on the other units'. `relax` prices items so that contents
cost at least their items' prices; what is cheaper is a new column. `cheapest` finishes over a given list. Bounds
are computed from rounded prices, in arithmetic that is exact for whole costs: HiGHS only proposes.

References: Barnhart et al., "Branch-and-Price", 1998, doi:10.1287/opre.46.3.316; subset-row cuts: Jepsen et al., 2008,
doi:10.1287/opre.1070.0449.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.clock import Clock

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.integer[Any]]  # (n, size) items of contents, -1 = none

GRAIN = 2.0**-16  # prices are multiples of it: sums of them and of whole costs are exact
CUTS = 60  # subset-row cuts added at a time
CUT_ROUNDS = 25
DETERMINISTIC_SECONDS = 20.0  # of CP-SAT's own clock, the same on every machine
HEURISTIC_SECONDS, HEURISTIC_NODES = 10.0, 1000
SEARCHED = 50_000  # contents that an integer program is asked to choose from, at most


@dataclass(frozen=True, kw_only=True, eq=False)
class Prices:
    """What a linear relaxation says items are worth.

    Parameters
    ----------
    item : (num_items,) float64
        Multiples of `GRAIN`.
    unit : float
        The same for the use of a unit.
    used : (n,) int64
        Contents that the relaxation uses.
    at_border : bool
        Whether some price is as far from where it was as it was allowed to go.
    """

    item: Floats
    unit: float
    used: npt.NDArray[np.int64]
    at_border: bool

    def of(self, rows: Rows) -> Floats:
        """Prices of contents, (n,)."""
        padded = np.append(self.item, 0.0)
        return np.asarray(padded[rows].sum(axis=1) + self.unit, np.float64)

    def total(self, units: int) -> float:
        """Prices of everything."""
        return float(self.item.sum()) + units * self.unit


def relax(
    rows: Rows, cost: Floats, items: int, units: int, around: Floats, radius: float, clock: Clock
) -> Prices:
    """Prices that together are worth most while no listed content costs less than its items' prices.

    They are the dual solution of the linear relaxation over the listed contents, here no further than `radius` from
    the prices `around`: far away they are right for the listed contents only (the box step of Marsten et al., 1975,
    doi:10.1287/opre.23.3.389). The price of a unit may take any value, so that prices this near always exist;
    without a box, where units are full, items count the units. Out of time, prices are `around`.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, hstack

    holds = incidence(rows, items).T
    counted = math.isfinite(radius) or bool((rows < 0).any())
    if counted:
        holds = hstack([holds, csr_array(np.ones((len(rows), 1)))])
    worth = np.append(np.ones(items), [units] * counted)
    box = [*zip(around - radius, around + radius, strict=True), *[(None, None)] * counted]
    solved = linprog(
        -worth, A_ub=holds.tocsr(), b_ub=cost, bounds=box, method="highs", options=_within(clock)
    )
    if solved.status != 0:
        return Prices(item=_rounded(around), unit=0.0, used=np.arange(0), at_border=False)
    price = _rounded(solved.x)
    return Prices(
        item=price[:items],
        unit=float(price[items]) if counted else 0.0,
        used=np.flatnonzero(solved.ineqlin.marginals < -1e-9),
        at_border=bool((np.abs(solved.x[:items] - around) > radius * (1 - 1e-6)).any()),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """What `cheapest` found.

    Parameters
    ----------
    chosen : (units,) int64 or None
        Contents that make the cheapest partition found; None when none was found that costs less than known before.
    cost : float
        What it costs, or what was known before.
    bound : float
        No partition into the listed contents costs less; at most `cost`, and equal to it when that is proved.
    """

    chosen: npt.NDArray[np.int64] | None
    cost: float
    bound: float


def cheapest(rows: Rows, cost: Floats, items: int, units: int, *, known: float, clock: Clock) -> Choice:
    """The cheapest partition into listed contents, if it costs less than is `known`.

    The relaxation is raised by subset-row cuts: at most one content of a partition holds two of the same three
    items. Contents that cannot be part of anything cheaper than known are dropped. HiGHS then proposes partitions, and
    CP-SAT proves that nothing better is left.

    Parameters
    ----------
    rows : (n, size) int
    cost : (n,) float64
        Whole numbers.
    items, units : int
        Items to hold, and contents to choose.
    known : float
        Cost of a known partition.
    clock : Clock
        When to stop.

    Examples
    --------
    >>> rows = np.array([[0, 1], [2, 3], [0, 2], [1, 3]])
    >>> choice = cheapest(rows, np.array([5.0, 4, 3, 7]), 4, 2, known=10, clock=Clock.start())
    >>> choice.chosen.tolist(), choice.cost, choice.bound
    ([0, 1], 9.0, 9.0)
    """
    best: npt.NDArray[np.int64] | None = None
    bound = -math.inf
    alive = np.arange(len(rows))
    cuts = np.zeros((0, 3), np.int64)
    steps = [_proposed, _proved]
    while steps and len(alive) and bound <= known - 1 and not clock.expired:
        alive, cuts, raised = _cut_off(rows, cost, items, units, known, alive, cuts, clock)
        bound = max(bound, min(known, raised))
        if len(alive) == 0 or len(alive) > SEARCHED or bound > known - 1:
            break
        picked, below = steps.pop(0)(rows[alive], cost[alive], items, units, known, clock)
        bound = max(bound, min(known, below))
        if picked is not None and cost[alive[picked]].sum() < known:
            best, known = alive[picked], float(cost[alive[picked]].sum())
    proved = len(alive) == 0 or bound > known - 1
    return Choice(chosen=best, cost=known, bound=known if proved else bound)


def _cut_off(
    rows: Rows,
    cost: Floats,
    items: int,
    units: int,
    known: float,
    alive: npt.NDArray[np.int64],
    cuts: npt.NDArray[np.int64],
    clock: Clock,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], float]:
    """The contents that something cheaper than `known` may use, the cuts that say so, and a bound over all."""
    bound = -math.inf
    for _ in range(CUT_ROUNDS):
        if clock.expired or len(alive) == 0:
            break
        relaxed = _relax_with_cuts(rows[alive], cost[alive], items, units, cuts, clock)
        if relaxed is None:
            break
        bound = max(bound, relaxed.rest + units * relaxed.least)
        used = relaxed.solution > 1e-6
        more = _violated(rows[alive[used]], relaxed.solution[used], items)
        alive = alive[relaxed.rest + (units - 1) * relaxed.least + relaxed.reduced <= known - 1]
        if len(more) == 0 or bound > known - 1:
            break
        cuts = np.unique(np.concatenate([cuts[relaxed.weight < 0], more]), axis=0)
    return alive, cuts, bound


@dataclass(frozen=True, kw_only=True, eq=False)
class _Relaxed:
    solution: Floats  # of the contents, 0 to 1
    reduced: Floats  # cost of each content above its prices
    least: float  # the smallest of them, at most 0
    rest: float  # prices of everything: with units * least, a bound
    weight: Floats  # of each cut, at most 0


def _relax_with_cuts(
    rows: Rows, cost: Floats, items: int, units: int, cuts: npt.NDArray[np.int64], clock: Clock
) -> _Relaxed | None:
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, vstack

    holds = incidence(rows, items)
    shared = _holds_two(rows, items, cuts)
    counted = vstack([holds, csr_array(np.ones((1, len(rows))))])
    solved = linprog(
        cost,
        A_eq=counted.tocsc(),
        b_eq=np.append(np.ones(items), units),
        A_ub=csr_array(shared) if len(cuts) else None,
        b_ub=np.ones(len(cuts)) if len(cuts) else None,
        method="highs",
        options=_within(clock),
    )
    if solved.status != 0:
        return None
    price = _rounded(solved.eqlin.marginals)
    weight = np.minimum(_rounded(solved.ineqlin.marginals), 0.0) if len(cuts) else np.zeros(0)
    reduced = cost - counted.T @ price - weight @ shared
    return _Relaxed(
        solution=solved.x,
        reduced=reduced,
        least=min(0.0, float(reduced.min())),
        rest=float(price[:items].sum() + units * price[items] + weight.sum()),
        weight=weight,
    )


def _holds_two(rows: Rows, items: int, cuts: npt.NDArray[np.int64]) -> Floats:
    """Whether a content holds two items or more of a cut's three, (cuts, n)."""
    held = np.zeros((items + 1, len(rows)), np.int8)
    held[rows.T, np.arange(len(rows))] = 1
    return np.array([held[cut].sum(axis=0) >= 2 for cut in cuts], np.float64).reshape(len(cuts), len(rows))


def _violated(rows: Rows, solution: Floats, items: int) -> npt.NDArray[np.int64]:
    """The subset-row cuts that a solution of the relaxation violates most, (n, 3).

    The contents that hold two or more of a, b, c are those that hold a and b, or a and c, or b and c, less twice
    those that hold all three.
    """
    held = np.zeros((items + 1, len(rows)))
    held[rows.T, np.arange(len(rows))] = 1.0
    held = held[:items]
    pairs = (held * solution) @ held.T
    found: list[tuple[float, int, int, int]] = []
    for a in range(items - 2):
        later = held[a + 1 :]
        triples = (later * (held[a] * solution)) @ later.T
        two = pairs[a, a + 1 :, None] + pairs[a, None, a + 1 :] + pairs[a + 1 :, a + 1 :] - 2 * triples
        for b, c in np.argwhere(np.triu(two, 1) > 1 + 1e-4).tolist():
            found.append((-float(two[b, c]), a, a + 1 + b, a + 1 + c))
    return np.array([row[1:] for row in sorted(found)[:CUTS]], np.int64).reshape(-1, 3)


def _proposed(
    rows: Rows, cost: Floats, items: int, units: int, known: float, clock: Clock
) -> tuple[npt.NDArray[np.int64] | None, float]:
    """A cheaper partition by HiGHS's branch and bound, whose floating-point bound is not used."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    solved = milp(
        cost,
        integrality=np.ones(len(rows)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(incidence(rows, items), 1, 1),
        options={
            "time_limit": max(0.1, min(HEURISTIC_SECONDS, clock.remaining)),
            "node_limit": HEURISTIC_NODES,
        },
    )
    if solved.x is None:
        return None, -math.inf
    picked = np.flatnonzero(solved.x > 0.5)
    held = np.sort(rows[picked][rows[picked] >= 0])
    fits = len(picked) == units and np.array_equal(held, np.arange(items))
    return (picked if fits else None), -math.inf


def _proved(
    rows: Rows, cost: Floats, items: int, units: int, known: float, clock: Clock
) -> tuple[npt.NDArray[np.int64] | None, float]:
    """The cheapest partition below `known`, by CP-SAT, and a bound on all such; `known` when there is none."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    picks = [model.new_bool_var("") for _ in range(len(rows))]
    holders: list[list[int]] = [[] for _ in range(items)]
    for at, row in enumerate(rows.tolist()):
        for item in row:
            if item >= 0:
                holders[item].append(at)
    for members in holders:
        model.add_exactly_one(picks[at] for at in members)
    model.add(sum(picks) == units)
    total = cp_model.LinearExpr.weighted_sum(picks, cost.astype(np.int64).tolist())
    if math.isfinite(known):
        model.add(total <= math.ceil(known) - 1)
    model.minimize(total)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.catch_sigint_signal = False  # Ctrl-C belongs to the caller
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = DETERMINISTIC_SECONDS
    solver.parameters.max_time_in_seconds = min(clock.remaining, 1e6)
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return None, known
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None, solver.best_objective_bound
    return np.flatnonzero([solver.boolean_value(pick) for pick in picks]), solver.best_objective_bound


def incidence(rows: Rows, items: int) -> Any:
    """Which item is in which content, (items, n) scipy sparse float64."""
    from scipy.sparse import csr_array

    at, place = np.nonzero(rows >= 0)
    return csr_array((np.ones(len(at)), (rows[at, place], at)), shape=(items, len(rows)))


def _within(clock: Clock) -> dict[str, float]:
    """Options of HiGHS."""
    return {} if math.isinf(clock.deadline) else {"time_limit": max(0.1, clock.remaining)}


def _rounded(value: Any) -> Any:
    return np.round(np.asarray(value) / GRAIN) * GRAIN
