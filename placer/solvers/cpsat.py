"""Fewest touched units by choosing whole server contents with CP-SAT: a set-partition master.

Idea: a column is a server content (the experts of one server and how they stand inside it), its cost the
tokens that touch it, weighted over the levels within; load caps filter columns. CP-SAT picks contents that hold
every expert once. Where all contents can be listed and one level matters, the optimum is proved and its bound
reported; elsewhere the columns are all contents that a tabu search met, and the master recombines them.
The linear relaxation's duals leave only columns that a better partition could use. The search's best
arrangement is a complete hint, and nothing worse is ever returned.

The textbook model (expert-to-server and token-touches-server booleans) has a root bound of one server per
token and is not used. Complexity: tokens x columns to price them, then CP-SAT's own.
Wins on layers of up to some ten thousand contents (16 experts, or pairs of experts), where it is a proof.

References: Barnhart et al., "Branch-and-Price", 1998, doi:10.1287/opre.46.3.316; OR-Tools CP-SAT.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt

from placer.clock import Clock
from placer.layer import Layer, Occupant
from placer.solvers import Placed, tabu

needs = frozenset({"routes"})
handles = frozenset({"caps", "levels"})

ALL_CONTENTS = 40_000  # list every content up to so many
DETERMINISTIC_SECONDS = 20.0  # of CP-SAT's own clock, the same on every machine


def place(
    layer: Layer, *, rng: np.random.Generator, clock: Clock, initial: npt.NDArray[np.int32] | None = None
) -> Placed:
    """Tabu search, then the best recombination of the contents it met, or of all contents there are."""
    best = tabu.fallback(layer, initial)
    if len(layer.levels) == 0 or not layer.load.any():
        return Placed(slots=layer.slots(best))
    if clock.expired:
        return Placed(slots=layer.slots(best), notes=(tabu.OUT_OF_TIME,))
    met: list[Occupant] = []
    best, rounds = tabu.search(layer, best, rng=rng, clock=clock, met=met)
    if clock.expired:
        return Placed(slots=layer.slots(best), claim=layer.cost(best), rounds=rounds)
    found, bound = recombined(layer, best, met, clock)
    best = min(found, best, key=lambda option: tabu.quality(layer, option))
    return Placed(
        slots=layer.slots(best),
        claim=layer.cost(best),
        bound=bound,
        bound_method=None if bound is None else "set partition over all contents",
        rounds=rounds,
    )


def provable(layer: Layer) -> bool:
    """Whether every content of a unit can be listed and one level alone decides the cost.

    With spare slots copies could lower the cost below any partition's, so nothing is proved there.
    """
    if len(layer.levels) != 1 or layer.num_slots > 64 or layer.num_slots > layer.num_experts:
        return False
    return math.comb(layer.num_slots, int(layer.sizes[0])) <= ALL_CONTENTS


def recombined(
    layer: Layer, best: Occupant, met: list[Occupant], clock: Clock
) -> tuple[Occupant, float | None]:
    """The cheapest partition into known contents, and a lower bound where the contents are all there are."""
    width = _width(layer)
    rows = [occupant.reshape(-1, width) for occupant in [best, *met]]
    contents = np.unique(np.concatenate(rows), axis=0)
    complete = provable(layer)
    if complete:
        contents = np.array(list(itertools.combinations(range(layer.num_slots), width)), np.int32)
    contents = contents[_within_caps(layer, contents)]
    contents, cost = _cheapest_of_equal(contents, _cost(layer, contents))
    held = {tuple(sorted(row)) for row in best.reshape(-1, width).tolist()}
    hint = np.array([tuple(sorted(row)) in held for row in contents.tolist()])
    chosen, bound = _partition(contents, cost, hint, layer.num_slots // width, clock)
    found = contents[chosen].ravel().astype(np.int32)
    return found, layer.cost_of(bound) if complete else None


def _width(layer: Layer) -> int:
    """Slots of the master's unit: the server, or where there is one server only, the largest level."""
    server = layer.server_ranks * layer.slots_per_rank
    return server if server in layer.sizes else int(layer.sizes[-1])


def _within_caps(layer: Layer, contents: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    load = layer.expert_load[contents]
    fits = np.ones(len(contents), bool)
    for level in layer.levels:
        size = layer.unit_slots[level]
        if size <= contents.shape[1]:
            heat = load.reshape(len(contents), -1, size).sum(axis=2)
            fits &= (heat <= layer.caps[level]).all(axis=1)
    return fits


def _cost(layer: Layer, contents: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Tokens that touch each content, plus those that touch the units inside it, by `weights_of_levels`."""
    from placer.search.counting import count_covered

    sets, count = layer.distinct
    tokens = _masks(sets, layer.num_slots)
    cost = np.zeros(len(contents))
    for size, weight in zip(layer.sizes.tolist(), layer.weights_of_levels, strict=True):
        if size <= contents.shape[1]:
            units = contents.reshape(-1, size)
            covered = count_covered(tokens, count, _masks(units, layer.num_slots))
            cost += weight * covered.reshape(len(contents), -1).sum(axis=1)
    return cost


def _masks(rows: npt.NDArray[np.signedinteger], size: int) -> npt.NDArray[np.uint64]:
    masks = np.zeros((len(rows), -(-size // 64)), np.uint64)
    for column in rows.T:
        held = np.flatnonzero(column >= 0)
        expert = column[held].astype(np.uint64)
        masks[held, (expert >> np.uint64(6)).astype(np.int64)] |= np.uint64(1) << (expert & np.uint64(63))
    return masks


def _cheapest_of_equal(
    contents: npt.NDArray[np.int32], cost: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """One column per set of experts: its cheapest inner arrangement."""
    order = np.argsort(cost, kind="stable")
    _, first = np.unique(np.sort(contents[order], axis=1), axis=0, return_index=True)
    keep = order[np.sort(first)]
    return contents[keep], cost[keep]


def _partition(
    contents: npt.NDArray[np.int32],
    cost: npt.NDArray[np.float64],
    hint: npt.NDArray[np.bool_],
    units: int,
    clock: Clock,
) -> tuple[npt.NDArray[np.int64], float]:
    """The cheapest choice of `units` columns that holds every expert once, and a lower bound over all columns.

    With duals p, a partition costs ``sum(p)`` plus its columns' reduced costs r, so it costs at least
    ``sum(p) + units * min(r)``, and a column whose ``sum(p) + (units - 1) * min(r) + r`` reaches the hint's
    cost cannot be part of a better one.
    """
    from ortools.sat.python import cp_model
    from scipy.optimize import linprog
    from scipy.sparse import csc_array

    width, count = contents.shape[1], len(contents)
    columns = np.repeat(np.arange(count), width)
    holds = csc_array((np.ones(count * width), (contents.ravel(), columns)), shape=(units * width, count))
    relaxed = linprog(cost, A_eq=holds, b_eq=np.ones(units * width), method="highs")
    best, floor = float(cost[hint].sum()), 0.0
    useful = np.ones(count, bool)
    if relaxed.status == 0:
        duals = relaxed.eqlin.marginals
        reduced = cost - holds.T @ duals
        rest = float(duals.sum() + (units - 1) * reduced.min())
        floor = float(duals.sum() + units * reduced.min())
        useful = (rest + reduced < best) | hint
    slack = 1e-9 * best  # of the duals' arithmetic
    whole = bool(np.array_equal(cost, np.round(cost)))
    floor = math.ceil(floor - slack) if whole else floor - slack
    kept = np.flatnonzero(useful)
    unit = 1.0 if whole else best / 2**40
    model = cp_model.CpModel()
    picks = [model.new_bool_var("") for _ in kept]
    holders: list[list[int]] = [[] for _ in range(units * width)]
    for at, column in enumerate(kept.tolist()):
        model.add_hint(picks[at], bool(hint[column]))
        for expert in contents[column].tolist():
            holders[expert].append(at)
    for members in holders:
        model.add_exactly_one(picks[at] for at in members)
    model.minimize(cp_model.LinearExpr.weighted_sum(picks, np.floor(cost[kept] / unit).astype(int).tolist()))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.catch_sigint_signal = False  # Ctrl-C belongs to the caller
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = DETERMINISTIC_SECONDS
    solver.parameters.relative_gap_limit = clock.gap
    solver.parameters.max_time_in_seconds = min(clock.remaining, 1e6)
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return np.flatnonzero(hint), floor
    chosen = kept[[solver.boolean_value(pick) for pick in picks]]
    return chosen, max(floor, min(best, solver.best_objective_bound * unit))
